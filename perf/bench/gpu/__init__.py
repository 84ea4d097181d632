"""perf gpu: what only a GPU can tell. command.py says what."""
