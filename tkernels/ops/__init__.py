"""Floor 2: operators. Checks, autocast, the autograd function and the PyTorch body, one file an operator."""
