"""From logits: the per-token statistics as an op, its kernels, and the plain-PyTorch fallback."""
