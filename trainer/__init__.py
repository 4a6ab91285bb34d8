"""mconv.trainer."""
