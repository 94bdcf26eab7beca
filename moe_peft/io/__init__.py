"""Files: base models, adapters, and writing that is never seen half-done."""
