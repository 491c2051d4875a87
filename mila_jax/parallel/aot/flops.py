"""What the model asks for: floating-point operations of every matmul, from sizes alone, without recomputation, padding or layout.

`matmuls` lists them one by one; a test holds the list against a count over the traced program (`count_jaxpr`), so it cannot go
stale unnoticed. Utilisation is always these operations over time × peak: recomputing does not make a program look better.
"""

import dataclasses
import math

from mila_jax.model.detail import BLOCKS
from mila_jax.model.dit import DiTConfig
from mila_jax.parallel.aot.sizes import Sizes
from mila_jax.views import VIEWS


@dataclasses.dataclass(frozen=True)
class Matmul:
    """count × (rows × depth) @ (depth × columns). backward: matmuls of the same size in the backward pass (2: both sides need a gradient,
    1: the input needs none, 0: constant)."""

    name: str
    rows: int
    depth: int
    columns: int
    count: int = 1
    backward: int = 2

    @property
    def forward_flops(self) -> int:
        """A multiply and an add for each term."""
        return 2 * self.count * self.rows * self.depth * self.columns

    @property
    def train_flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops * (1 + self.backward)


def _mlp(name, rows, inputs, hidden, outputs, count=1, first=2):
    return [Matmul(f"{name}.fc1", rows, inputs, hidden, count, first), Matmul(f"{name}.fc2", rows, hidden, outputs, count)]


def _attention(name, sequences, queries, keys, dit: DiTConfig):
    """Scores and values; a softmax in between is no matmul."""
    head = dit.width // dit.heads
    count = sequences * dit.heads * dit.depth
    return [Matmul(f"{name}.scores", queries, head, keys, count), Matmul(f"{name}.values", queries, keys, head, count)]


def matmuls(dit: DiTConfig, sizes: Sizes) -> list[Matmul]:
    """Every matmul of one evaluation of the network on the whole batch (all devices)."""
    b, v, d = sizes.batch * sizes.passes, len(VIEWS), dit.width
    height, width, channels = sizes.data["latent_shape"]
    frames = -(-sizes.frames // dit.patch[0])
    tokens, places = sizes.tokens, b * v * frames
    rows, text = places * tokens, b * dit.text_length
    patch = math.prod(dit.patch)
    outputs = dit.out_channels * (2 if dit.pred_sigma else 1) + dit.mixture
    features = 2 * dit.fourier_bands + 1
    out = [Matmul("patch", rows, dit.in_channels * patch, d, 1, 1)]
    out += _mlp("time", places, 256, d, d, first=1) + _mlp("fps", b, 256, d, d, first=1) + [Matmul("modulation", places, d, 6 * d)]
    out += _mlp("text", text, dit.text_width, d, d, first=2)  # the input holds a learned null text
    if dit.new_embeddings:
        everywhere = b * sizes.frames
        out += _mlp("camera", v * everywhere, 16 * features, d, d, first=1) + _mlp("waypoint", everywhere, 4 * features, d, d, first=1)
        out += _mlp("frame_time", everywhere, features, d, d, first=1)
    for kind in ("spatial", "temporal"):
        out += [Matmul(f"{kind}.qkv", rows, d, 3 * d, dit.depth)]
        out += _attention(f"{kind}.attention", b * frames, v * tokens, v * tokens, dit) if kind == "spatial" else []
        out += _attention(f"{kind}.attention", b * v * tokens, frames, frames, dit) if kind == "temporal" else []
        out += [Matmul(f"{kind}.proj", rows, d, d, dit.depth), Matmul(f"{kind}.cross.q", rows, d, d, dit.depth)]
        out += [Matmul(f"{kind}.cross.kv", text, d, 2 * d, dit.depth)] + _attention(f"{kind}.cross", b, rows // b, dit.text_length, dit)
        out += [Matmul(f"{kind}.cross.proj", rows, d, d, dit.depth)]
        out += _mlp(f"{kind}.mlp", rows, d, int(d * dit.mlp_ratio), d, dit.depth)
    out += [Matmul("final", rows, d, patch * outputs)]
    if dit.detail:  # at every place of the padded latents
        wide, taps = rows * patch, 9 * dit.detail
        out += [Matmul("detail.seen", wide, dit.in_channels, dit.detail, 1, 1), Matmul("detail.enter", rows, patch * dit.detail, d)]
        out += [Matmul("detail.convolutions", wide, taps, dit.detail, 2 * (1 + BLOCKS)), Matmul("detail.tokens", rows, d, patch * dit.detail)]
        out += [Matmul("detail.leave", wide, dit.detail, outputs)]
    if dit.in_channels != dit.out_channels:  # preconditioned: means of x, of v and of each corridor from all frames, and two changes of basis
        means = 2 + dit.sweep
        everything = b * v * sizes.frames * height * width
        out += [Matmul("precondition.means", means * everything, sizes.frames, channels, 1, 0)]
        out += [
            Matmul("precondition.components", everything, channels, channels, 1, 0),
            Matmul("precondition.latents", everything, channels, channels, 1, 1),
        ]
    return out


def model_flops(sizes: Sizes) -> float:
    """Operations of one step over all devices: forward and backward for training, one guided evaluation for sampling.

    The backward pass is a whole one, also where `train.trainable` freezes parameters and a step makes less of it."""
    table = matmuls(sizes.dit, sizes) + ([] if sizes.guide is None else matmuls(sizes.guide, sizes.of_guide))
    return float(sum(m.train_flops if sizes.step == "train" else m.forward_flops for m in table))


def _dot(eqn) -> int:
    (left, _), (left_batch, _) = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    depth = math.prod(shape[k] for k in left)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * depth


def _inner(eqn):
    """(jaxpr, times) of everything that an equation runs inside."""
    for name, value in eqn.params.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns") and not name.endswith("cond_jaxpr"):
                yield inner


def count_jaxpr(jaxpr) -> int:
    """Matmul operations of a traced program (`jax.make_jaxpr(f)(…)`), loops times their length; of branches the costliest.

    A kernel counts its body times its grid, a `shard_map` its body times the devices. Raises `ValueError` at a `while` that does
    matmuls: its length cannot be known.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
            continue
        inside = [count_jaxpr(inner) for inner in _inner(eqn)]
        if name == "while" and any(inside):
            raise ValueError("a while loop with matmuls: its number of iterations is not known")
        if name == "cond":
            total += max(inside, default=0)
            continue
        times = 1
        if name == "scan":
            times = eqn.params["length"]
        elif name == "pallas_call":
            times = math.prod(int(n) for n in eqn.params["grid_mapping"].grid)
        elif name == "shard_map":
            times = eqn.params["mesh"].size
        total += times * sum(inside)
    return total
