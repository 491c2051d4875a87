"""Compiled programs that the runs of one process share, for tests of what runs do and not of what they compile."""

import contextlib

import jax
import pytest

from mila_jax.train import step


@contextlib.contextmanager
def kept_however_small():
    """Within it, programs are kept on disk however soon they compiled: each run makes the same ones anew."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, 0.0)
    try:
        yield
    finally:
        jax.config.update(least, before)


@contextlib.contextmanager
def shared_steps():
    """Within it, runs with equal networks, objectives and states have one training step: the first one's, traced and compiled once.

    For runs whose optimizers have the same settings, and whose step does not depend on how long they are (`train.decay`).
    """
    make, made = step.jit_train_step, {}

    def shared(shardings, batch_shardings, rules=None, *, config, objective, prior, accumulate, groups, **static):
        numbers = None if prior is None else tuple(x.tobytes() for x in prior)
        structure, mesh = jax.tree.structure(shardings), jax.tree.leaves(shardings)[0].mesh
        key = str(rules), config, objective, numbers, accumulate, groups, structure, mesh, static["trainable"]
        if key not in made:
            more = dict(config=config, objective=objective, prior=prior, accumulate=accumulate, groups=groups)
            made[key] = make(shardings, batch_shardings, rules, **more, **static)
        return made[key]

    with pytest.MonkeyPatch.context() as patch, kept_however_small():
        patch.setattr(step, "jit_train_step", shared)
        yield
