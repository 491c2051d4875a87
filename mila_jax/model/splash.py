"""Spatial attention by the splash kernel of JAX (`jax.experimental.pallas.ops.tpu.splash_attention`): no scores in memory.

The kernel is for TPUs only and knows nothing of meshes, so it runs inside `shard_map` on each device's frames and heads. It wants
lengths that are multiples of its block: queries, keys and values are padded, and segment ids keep real tokens from seeing padding.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from mila_jax.parallel.aot.chips import chip_name
from mila_jax.parallel.logical import spec

LANES = 128
RESIDUALS = "attention_residuals"  # name of the kernel's result and softmax statistics, see remat.py

# The largest block of queries and of keys by chip (`chip_name`). Modelled, by instruction counts of the compiled kernel at 2,688
# tokens: 896 instead of 384 makes v5p's forward 1.6 and its backward 1.4 times cheaper; 1,408 no longer fits into VMEM.
BLOCKS = {"v5e": 896, "v5p": 896, "v6e": 896, "tpu7x": 896}
MOST_KEYS = 2688  # that the backward kernel holds at a time; 5,632 do not fit into VMEM
OTHER_BLOCK = 512  # chips that the table does not know


def largest_block(kind: str) -> int:
    """The largest block on devices of this kind (`device_kind`)."""
    return BLOCKS.get(chip_name(kind), OTHER_BLOCK)


def device_kind() -> str:
    """The kind of device that the program being traced is for: the mesh's, or the default one's. TPUs' begin with "TPU"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def choose_block(length: int, largest: int) -> int:
    """The block for a number of tokens: least padding first, then the largest. A multiple of 128, at most `largest`."""
    blocks = range(LANES, largest + 1, LANES)
    # Small blocks cost more than a little padding (they are last resorts for short sequences), so none below 384 if it can be.
    blocks = [b for b in blocks if b >= min(384, -(-length // LANES) * LANES)]
    return min(blocks, key=lambda b: (-(-length // b) * b, -b))


@functools.cache
def _mask_and_segments(heads: int, length: int, padded: int):
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((padded, padded))] * heads)
    return mask, None if padded == length else np.where(np.arange(padded) < length, 1, 0).astype(np.int32)


def splash(q, k, v, *, block: int, interpret: bool = False):
    """Softmax attention over the token axis by the kernel, statistics in float32. Arrays [..., n, k, e] → [..., n, k, e].

    block: see `choose_block`; interpret: emulates the kernel on any device (tests). Differentiable, backward fused in one kernel.
    """
    lead, (n, heads, e) = q.shape[:-3], q.shape[-3:]
    padded = -(-n // block) * block

    def prepare(x):  # [..., n, k, e] → [N, k, padded, e]
        x = jnp.swapaxes(x.reshape(-1, n, heads, e), 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - n), (0, 0)))

    mask, segments = _mask_and_segments(heads, n, padded)
    # The backward kernel returns a part of dq for every block of keys that it holds at a time, which XLA adds up.
    keys = max(n for n in range(block, max(block, MOST_KEYS) + 1, block) if padded % n == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash_attention_kernel.make_splash_mha(
        mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )
    if segments is not None:
        segments = splash_attention_kernel.SegmentIds(q=jnp.asarray(segments), kv=jnp.asarray(segments))
    scaled = q * jnp.asarray(1 / math.sqrt(e), q.dtype)  # the kernel does not scale
    y = jax.vmap(lambda a, b, c: kernel(a, b, c, segment_ids=segments))(prepare(scaled), prepare(k), prepare(v))
    return jnp.swapaxes(y[:, :, :n], 1, 2).reshape(*lead, n, heads, e)


def attend_splash(q, k, v, axes, kind: str):
    """`splash` on every device's own part; axes: logical names of the arrays' axes, of which n and e must be whole.

    kind: the device kind to choose blocks for. Raises `UserError` as `spec` does.
    """
    local = functools.partial(splash, block=choose_block(q.shape[-3], largest_block(kind)))
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v)
    partition = spec(*axes)
    # Not checked for replication: the kernel's outputs carry none of the types that the check reads.
    return jax.shard_map(local, in_specs=(partition,) * 3, out_specs=partition, check_vma=False)(q, k, v)
