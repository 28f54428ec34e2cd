"""The Triton passes, importable as ``fusedloss.triton_kernels`` and under no other name.

``passes.py`` says what is in which file.

A package of the Triton project is called ``triton_kernels`` too, and other libraries import it by that name.
Where the repository is on ``sys.path`` (in its root, or through an editable install), this folder must not
pass for it.
"""

if "." not in __name__:
    raise ImportError(
        f"{__path__[0]} is a part of fusedloss: import fusedloss.triton_kernels. "
        "The triton_kernels of the Triton project is another package, and it is not installed here "
        "or stands behind fusedloss's repository on sys.path.",
        name=__name__,
    )
