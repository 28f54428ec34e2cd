"""The losses, one file each: signature, docstring and epilogue in PyTorch."""
