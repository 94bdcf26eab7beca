"""From files of records to samples of tokens: formats, templates, tokenizers, and the fused batches made of them."""
