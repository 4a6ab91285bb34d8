"""mconv.convert."""
