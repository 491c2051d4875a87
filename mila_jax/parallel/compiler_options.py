"""Options of the TPU compiler by chip. The steps that run and `mila plan` take them from here, so that what is planned is what runs.

Only TPUs get any: other compilers refuse options that they do not know.
"""

import jax

from mila_jax.parallel.aot.chips import chip_name

# Matmuls with an operand split over devices may be cut into a ring of small ones that overlap with its exchange. On v5e the compiler
# does so for whole activations instead of gathering the kernels, which are smaller: modelled on v5e:4x4 (one sample a chip), 15,000
# permutes a step. No operand reaches this many MiB.
_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# chip (`aot.chips.chip_name`) → options
OPTIONS = {"v5e": _NO_RINGS, "v5p": _NO_RINGS, "v6e": _NO_RINGS, "tpu7x": _NO_RINGS}


def compiler_options(kind: str) -> dict[str, str] | None:
    """What `jax.jit(…, compiler_options=…)` takes for programs of devices of this kind (`device_kind`); None where nothing is changed."""
    return OPTIONS.get(chip_name(kind))


def options_of(shardings) -> dict[str, str] | None:
    """`compiler_options` of the devices that a tree of shardings is for: real ones or those of a topology."""
    first = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))[0]
    return compiler_options(next(iter(first.device_set)).device_kind)
