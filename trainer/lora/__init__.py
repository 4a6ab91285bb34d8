"""Low-rank adapters: the update of a layer, its dropout, PEFT's files."""
