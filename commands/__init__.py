"""mconv.commands."""
