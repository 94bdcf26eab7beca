"""A router's choice of experts."""
