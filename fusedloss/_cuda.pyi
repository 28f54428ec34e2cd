targets: str
stages: int
item_bytes: int
max_threads: int
max_candidates: int
sum_bytes: int

class Launch:
    forward: bool
    groups: int
    parts: int
    slots: int
    threads: int
    def __init__(
        self,
        dtype: int,
        logits: int,
        rows: int,
        classes: int,
        row_stride: int,
        target: int,
        candidates: int,
        candidate_count: int,
        top_k: int,
        below: bool,
        mean: bool,
        class_weight: int,
        weight_sum: int,
        epilogue: int,
        class_term: bool,
        params: list[tuple[int, int]],
        common: int,
        loss: int,
        statistics: int,
        index: int,
        coefficients: int,
        grad: int,
        grad_row_stride: int,
        upstream: int,
        upstream_stride: int,
        sums: int,
        top_q: int,
        threads: int,
    ) -> None: ...
    def set_top_rest(self, top_rest: int) -> None: ...
    def set_stream(self, stream: int) -> None: ...

def run(launch: Launch) -> None: ...
def sum(launch: Launch) -> None: ...
def scale(dtype: int, grad: int, count: int, factor: int, blocks: int, stream: int) -> None: ...
def shared_bytes(dtype: int, threads: int, slots: int) -> int: ...
def limits(device: int) -> tuple[int, bool]: ...
def epilogues() -> tuple[dict[str, int], dict[str, int], dict[str, int]]: ...
