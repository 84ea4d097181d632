"""What all operators rest on. No module here imports an operator."""
