class Job:
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

def forward(job: Job) -> None: ...
def backward(job: Job) -> None: ...
def class_sums(job: Job) -> None: ...
def term_sums(job: Job) -> None: ...
def class_terms(job: Job) -> None: ...
def first_invalid(target: int, count: int, classes: int, ignored: int, lowest: int = 0) -> int: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def epilogues() -> tuple[dict[str, int], dict[str, int], dict[str, int]]: ...
def set_threads_after_fork(threads: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
