"""Beside a run: validation, samples, importance matrices, perplexity, curves."""
