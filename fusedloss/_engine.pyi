class Rows:
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
        weight_sum: float,
        threads: int,
    ) -> None: ...

def forward(
    rows: Rows,
    epilogue: str,
    params: list[tuple[int, int]],
    common: int,
    loss: int,
    statistics: int,
    index: int,
    coefficients: int,
) -> None: ...
def backward(
    rows: Rows,
    epilogue: str,
    params: list[tuple[int, int]],
    statistics: int,
    index: int,
    coefficients: int,
    grad_output: int,
    grad_output_stride: int,
    grad: int,
    grad_row_stride: int,
) -> None: ...
def class_sums(
    rows: Rows,
    epilogue: str,
    params: list[tuple[int, int]],
    statistics: int,
    index: int,
    row_weight: int,
    row_weight_stride: int,
    top_q: int,
    sums: int,
) -> None: ...
def term_sums(
    rows: Rows, epilogue: str, params: list[tuple[int, int]], statistics: int, index: int, sums: int
) -> None: ...
def class_terms(
    rows: Rows,
    epilogue: str,
    params: list[tuple[int, int]],
    statistics: int,
    index: int,
    loss: int,
    coefficients: int,
) -> None: ...
def first_invalid(target: int, count: int, classes: int, ignored: int, lowest: int = 0) -> int: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def epilogues() -> tuple[dict[str, int], dict[str, int], dict[str, int]]: ...
def set_threads_after_fork(threads: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
