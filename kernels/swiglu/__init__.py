"""The gated product of a feed-forward layer."""
