"""A network that starts as a smaller one: more pairs of blocks, or more inputs, and yet the same function at the first step.

New pairs come last and start as identity (the projections that end their branches are zero, as in published temporal blocks); new input
channels come last and start with weights of zero, and so do the weights of the sweep's guesses (`DiTConfig.mixture`).
"""

import jax.numpy as jnp
from flax import nnx

from mila_jax.model.dit import DiTConfig

BRANCH_ENDS = ("attn.proj.kernel", "attn.proj.bias", "cross.proj.kernel", "cross.proj.bias", "mlp.fc2.kernel", "mlp.fc2.bias")


def can_grow(small: DiTConfig, large: DiTConfig) -> bool:
    """Whether `large` is `small` with more pairs or more input channels and otherwise has its sizes."""
    sizes = ("width", "heads", "patch", "out_channels", "text_width", "text_length", "mlp_ratio")
    same = all(getattr(small, key) == getattr(large, key) for key in sizes)
    # Corridors come before what evidence adds, so that they can be added only while there is none.
    same &= small.sweep == large.sweep and large.evidence if small.evidence else small.sweep <= large.sweep
    same &= small.mixture in (0, large.mixture) and small.detail in (0, large.detail)
    same &= not small.detail or (small.in_channels, small.mixture) == (large.in_channels, large.mixture)  # which its kernels are made for
    return same and small.depth <= large.depth and small.in_channels <= large.in_channels


def grow(arrays: dict, small: DiTConfig, large: DiTConfig, fresh: nnx.State) -> dict:
    """Parameters by dotted name of `small` → those of `large`; what they lack is taken from `fresh`, a new state of `large`."""
    grown = dict(arrays)
    if large.in_channels > small.in_channels:  # rows of the kernel are (channel, frame, row, column)
        kernel = arrays["patch.kernel"]
        more = (large.in_channels - small.in_channels) * small.patch[0] * small.patch[1] * small.patch[2]
        grown["patch.kernel"] = jnp.concatenate([kernel, jnp.zeros((more, kernel.shape[1]), kernel.dtype)])
    if large.mixture > small.mixture:
        grown |= {f"final.mixture.{name}": value[...] for name, value in fresh["final"]["mixture"].items()}  # which start at zero
    if large.detail > small.detail:
        grown |= {f"final.detail.{'.'.join(map(str, path))}": value[...] for path, value in nnx.to_flat_state(fresh["final"]["detail"])}
    if large.depth > small.depth:
        for path, value in nnx.to_flat_state(fresh):
            name = ".".join(map(str, path))
            if name.startswith("pairs."):
                new = value[...][small.depth :]
                grown[name] = jnp.concatenate([arrays[name], jnp.zeros_like(new) if name.endswith(BRANCH_ENDS) else new])
    return grown
