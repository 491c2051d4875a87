"""Comparison of our networks with recorded numbers of the original code: `python -m mila_jax.parity FILE.npz`."""
