"""Logical axis names → mesh axes: sharding is data. Nothing else in the package names a mesh axis on an array.

A name maps to a mesh axis, a tuple of them, or None (not split). `use_rules` swaps the table for an experiment.
"""

import contextlib
import contextvars

import jax
from jax.sharding import PartitionSpec as P

RULES = {
    # activations
    "batch": ("data", "fsdp"),
    "frames": "context",  # spatial attention: each frame is independent of the others
    "places": "context",  # temporal attention: each place of each view is independent of the others
    # parameters
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "head_dim": None,
    None: None,
}

_rules = contextvars.ContextVar("logical_rules", default=RULES)


@contextlib.contextmanager
def use_rules(**changes):
    """Within the block, the given names map elsewhere: `with use_rules(embed=None): …`."""
    token = _rules.set({**_rules.get(), **changes})
    try:
        yield
    finally:
        _rules.reset(token)


def spec(*names) -> P:
    """The partition of an array whose axes have these logical names. `KeyError` for a name that is not in the table."""
    rules = _rules.get()
    return P(*(rules[name] for name in names))


def constrain(x, *names):
    """States the sharding of an activation by logical names (None = leave whole). Without a mesh this does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))
