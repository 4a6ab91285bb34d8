"""Before a run: what a layout takes, which layout fits, what work a token is."""
