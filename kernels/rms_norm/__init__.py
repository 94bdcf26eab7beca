"""Root-mean-square normalisation under a frozen weight."""
