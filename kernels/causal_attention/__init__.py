"""Causal attention over samples of equal length."""
