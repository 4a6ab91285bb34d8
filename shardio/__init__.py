"""mconv.shardio."""
