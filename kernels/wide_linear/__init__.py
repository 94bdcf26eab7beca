"""A trainable linear layer of few outputs in a wider dtype than its input."""
