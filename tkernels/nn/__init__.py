"""Floor 3: modules shaped like their torch.nn twins. Parameters, buffers and one call into an operator."""

__all__: list[str] = []
