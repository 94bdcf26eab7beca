"""The frozen output head fused with the cross-entropy loss."""
