"""A frozen linear layer with a different LoRA on each token range."""
