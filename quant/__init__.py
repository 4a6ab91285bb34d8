"""mconv.quant."""
