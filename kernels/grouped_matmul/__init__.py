"""One matrix a group, on rows sorted by group."""
