targets: str
stages: int
item_bytes: int
max_threads: int
max_candidates: int
sum_bytes: int

class Job:
    logits: int
    rows: int
    row_stride: int
    classes: int
    target: int
    candidates: int
    candidate_count: int
    top_k: int
    below: bool
    mean: bool
    class_weight: int
    weight_sum: int
    epilogue: int
    class_term: bool
    common: int
    forward: bool
    loss: int
    statistics: int
    index: int
    coefficients: int
    grad: int
    grad_row_stride: int
    upstream: int
    upstream_stride: int
    groups: int
    sums: int
    top_q: int
    top_rest: int
    threads: int
    parts: int
    slots: int
    stream: int
    def __init__(self) -> None: ...
    def set_params(self, params: list[tuple[int, int]]) -> None: ...

def run(job: Job, dtype: int) -> None: ...
def sum(job: Job, dtype: int) -> None: ...
def scale(job: Job, dtype: int) -> None: ...
def shared_bytes(job: Job, dtype: int) -> int: ...
def limits(device: int) -> tuple[int, bool]: ...
def epilogues() -> tuple[dict[str, int], dict[str, int], dict[str, int]]: ...
