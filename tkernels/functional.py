"""Floor 3: the public functions, with names and arguments as in torch.nn.functional."""

__all__: list[str] = []
