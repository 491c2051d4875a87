"""mila_jax: a multi-view, long-duration driving-video world model for TPU pods."""

__version__ = "0.1.0"
