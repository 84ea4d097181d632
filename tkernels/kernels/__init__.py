"""Floor 1: device code and the launch functions beside it, one file an operator. Importing a file needs triton."""
