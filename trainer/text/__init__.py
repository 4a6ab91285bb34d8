"""Text to tokens: reading, chat templates, tokenizers, token files, packing."""
