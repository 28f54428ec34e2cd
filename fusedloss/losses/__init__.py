"""The losses, one file each, with signature, docstring and PyTorch epilogue."""
