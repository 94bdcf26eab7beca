"""The mixture of LoRA experts inside a gated feed-forward layer."""
