"""From checkpoints to models that run: namings, architectures, tokenizers, GGUF.

The public functions (``mconv.reshard``, ``mconv.to_gguf``, ``mconv.diff``) live in the modules of
their names.
"""
