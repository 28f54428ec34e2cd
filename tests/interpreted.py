"""What the tests change in Triton's interpreter, in every process that interprets kernels."""

from typing import Any


def prepare() -> None:
    import triton
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_builtin"):
        _spare_the_interpreter(interpreter)
    if triton.__version__.startswith("3.6."):
        _mend_the_interpreter(interpreter)


def _spare_the_interpreter(interpreter: Any) -> None:
    """Whenever a kernel calls a function, Triton's interpreter looks through all of triton.language for what it has to
    replace, a third of the tests' time. What it has replaced stays so until the launch is over."""
    seen: set[int] = set()
    replace, launch = interpreter._patch_builtin, interpreter.GridExecutor.__call__

    def replace_once(module: object, *arguments: object) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            replace(module, *arguments)

    def launch_anew(self: object, *arguments: object, **options: object) -> None:
        seen.clear()
        launch(self, *arguments, **options)

    interpreter._patch_builtin, interpreter.GridExecutor.__call__ = replace_once, launch_anew


def _mend_the_interpreter(interpreter: Any) -> None:
    """Triton 3.6 makes an int of an array of one element, which newer versions of NumPy refuse."""
    patch = interpreter._patch_lang_tensor

    def patch_again(tensor: object, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_again
