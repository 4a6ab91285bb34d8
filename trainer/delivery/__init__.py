"""After a run: merge, GGUF, Modelfile, proofs; the whole way in one command."""
