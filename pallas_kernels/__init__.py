"""Dilated flash attention for Hopper GPUs; `pallas_kernels.flash` is the way in."""
