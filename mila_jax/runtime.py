"""What every command sets up before JAX starts."""

import os
import pathlib

import jax


def setup() -> None:
    """Keeps compiled programs on disk (MILA_CACHE, default ~/.cache/mila_jax; empty = off), so that a second start is quick."""
    folder = os.environ.get("MILA_CACHE", str(pathlib.Path.home() / ".cache" / "mila_jax"))
    if not folder:
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home is no reason not to run
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
