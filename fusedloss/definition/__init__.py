"""What a loss is, in plain PyTorch: the statistics of a row, losses as functions of them, the dense reference."""
