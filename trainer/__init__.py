"""A compact distributed trainer whose checkpoints the rest of mconv converts. Needs torch."""
