"""The PyTorch body on a CPU: passes over activations compiled by Inductor, and buffers they reuse."""
