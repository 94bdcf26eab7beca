"""A frozen linear layer."""
