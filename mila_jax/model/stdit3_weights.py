"""Published STDiT3 state dicts (Open-Sora 1.2) ↔ our parameter tree.

A state dict maps names such as `spatial_blocks.3.attn.qkv.weight` to arrays with PyTorch's axes (linear weights [out, in]).
Both directions are written from one table, so that loading and saving cannot drift apart. Our blocks are stacked: the i-th
published block is row i of each stacked array. The embeddings that MiLA adds are in no published file and keep their values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.dit import DiT, DiTConfig


@dataclasses.dataclass(frozen=True)
class _Entry:
    ours: tuple  # path in the parameter tree
    published: str  # name; {i} is the block number
    to_ours: object
    to_published: object


def _linear(ours, published):
    kernel = _Entry((*ours, "kernel"), published + ".weight", lambda a, s: a.T, lambda a: a.T)
    bias = _Entry((*ours, "bias"), published + ".bias", lambda a, s: a, lambda a: a)
    return [kernel, bias]


def _fused(ours, published):
    """A fused projection, published [m·k·e, d], ours [d, m, k, e]."""
    kernel = _Entry(ours, published + ".weight", lambda a, s: a.T.reshape(s), lambda a: a.reshape(a.shape[0], -1).T)
    bias = _Entry((*ours[:-1], ours[-1] + "_bias"), published + ".bias", lambda a, s: a.reshape(s), lambda a: a.reshape(-1))
    return [kernel, bias]


def _plain(ours, published):
    return [_Entry(ours, published, lambda a, s: a, lambda a: a)]


def _mlp(ours, published, first, second):
    return _linear((*ours, "fc1"), f"{published}.{first}") + _linear((*ours, "fc2"), f"{published}.{second}")


def _table(config: DiTConfig) -> list[_Entry]:
    """Every published tensor and where it goes; `{i}` marks stacked ones."""
    c, (pt, ph, pw) = config.in_channels, config.patch
    patch_kernel = _Entry(
        ("patch", "kernel"), "x_embedder.proj.weight",
        lambda a, s: a.reshape(a.shape[0], -1).T, lambda a: a.T.reshape(-1, c, pt, ph, pw),
    )  # fmt: skip
    out = [patch_kernel, *_plain(("patch", "bias"), "x_embedder.proj.bias")]
    out += _mlp(("time",), "t_embedder.mlp", 0, 2) + _mlp(("fps",), "fps_embedder.mlp", 0, 2)
    out += _linear(("modulation",), "t_block.1")
    # The null text has a row for every token that the base model may see; a model with shorter texts takes the first ones.
    out.append(_Entry(("text", "null"), "y_embedder.y_embedding", lambda a, s: a[: s[0]], lambda a: a))
    out += _mlp(("text", "proj"), "y_embedder.y_proj", "fc1", "fc2")
    out += _plain(("final_table",), "final_layer.scale_shift_table") + _linear(("final",), "final_layer.linear")
    for kind in ("spatial", "temporal"):
        p, q = ("pairs", kind), kind + "_blocks.{i}"
        out += _plain((*p, "table"), q + ".scale_shift_table")
        out += _fused((*p, "attn", "qkv"), q + ".attn.qkv") + _linear((*p, "attn", "proj"), q + ".attn.proj")
        if config.qk_norm:
            out += _plain((*p, "attn", "q_norm"), q + ".attn.q_norm.weight") + _plain((*p, "attn", "k_norm"), q + ".attn.k_norm.weight")
        out += _linear((*p, "cross", "q"), q + ".cross_attn.q_linear") + _fused((*p, "cross", "kv"), q + ".cross_attn.kv_linear")
        out += _linear((*p, "cross", "proj"), q + ".cross_attn.proj") + _mlp((*p, "mlp"), q + ".mlp", "fc1", "fc2")
    return out


# `rope.freqs` is a constant that we compute; the position table's frequencies are not saved upstream either.
IGNORED = ("rope.freqs", "pos_embed.inv_freq")


def published_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the published state dict of a model of these sizes, without `rope.freqs`. Nothing is allocated."""
    flat = dict(nnx.to_flat_state(abstract_parameters(config)))
    out = {}
    for entry in _table(config):
        array = flat[entry.ours]
        stacked = "{i}" in entry.published
        shape = jax.eval_shape(entry.to_published, jax.ShapeDtypeStruct(array.shape[stacked:], array.dtype)).shape
        out |= {entry.published.format(i=i): shape for i in range(config.depth if stacked else 1)}
    return out


def load(params: nnx.State, config: DiTConfig, state_dict, *, source: str = "state dict", dtype=np.float32) -> nnx.State:
    """`params` of a `DiT(config)` with the values of a published state dict (name → array).

    `params` may hold shapes only (`abstract_parameters`) where the new embeddings are off; `dtype`: of the result's parameters.
    Raises `UserError` naming `source` and the tensor that is missing, misshapen, or not known.
    """
    flat = {path: value for path, value in nnx.to_flat_state(params)}
    left = set(state_dict) - set(IGNORED)
    missing, wrong = [], []

    def take(name, entry, shape):
        if name not in state_dict:
            missing.append(name)
            return np.zeros(shape, dtype)
        left.discard(name)
        array = np.asarray(state_dict[name], dtype)
        try:
            array = entry.to_ours(array, shape)
        except ValueError:
            pass
        if array.shape != tuple(shape):
            wrong.append(f"{name} {np.shape(state_dict[name])}")
            return np.zeros(shape, dtype)
        return array

    for entry in _table(config):
        variable = flat[entry.ours]
        shape = variable.shape
        if "{i}" in entry.published:
            value = np.stack([take(entry.published.format(i=i), entry, shape[1:]) for i in range(config.depth)])
        else:
            value = take(entry.published, entry, shape)
        flat[entry.ours] = variable.replace(jnp.asarray(value))
    for what, names in (("lacks", missing), ("has misshapen", wrong), ("has unknown", sorted(left))):
        if names:
            raise UserError(
                f"{source} does not fit the model: it {what} {', '.join(names[:8])}{' …' if len(names) > 8 else ''} ({len(names)} in all)"
            )
    return nnx.from_flat_state(flat)


def save(params: nnx.State, config: DiTConfig) -> dict[str, np.ndarray]:
    """The published state dict of our parameters (the new embeddings are left out), without `rope.freqs`."""
    flat, out = dict(nnx.to_flat_state(params)), {}
    for entry in _table(config):
        value = np.asarray(flat[entry.ours][...])
        if "{i}" in entry.published:
            out |= {entry.published.format(i=i): entry.to_published(value[i]) for i in range(config.depth)}
        else:
            out[entry.published] = entry.to_published(value)
    return out


@functools.cache
def _abstract(config: DiTConfig):
    with nnx.use_eager_sharding(False):
        return jax.eval_shape(lambda: nnx.split(DiT(config, rngs=nnx.Rngs(0))))


def abstract_model(config: DiTConfig):
    """(graphdef, parameter shapes) of a `DiT` without allocating anything."""
    graphdef, shapes = _abstract(config)
    return graphdef, jax.tree.map(lambda x: x, shapes)  # a tree of its own: states can be changed in place


def abstract_parameters(config: DiTConfig) -> nnx.State:
    """The parameter tree of a `DiT` with shapes in place of values."""
    return abstract_model(config)[1]


def create(config: DiTConfig, seed: int = 0):
    """A `DiT` split into (graphdef, params); unsharded, for one device and tests."""
    with nnx.use_eager_sharding(False):
        return nnx.split(DiT(config, rngs=nnx.Rngs(seed)))
