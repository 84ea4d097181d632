"""What the static reports compile: one file an operator, each with cases() at the shapes of real networks."""
