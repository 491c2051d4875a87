"""AMT-S, the network that makes the frame between two others in VBench's motion smoothness, from the user's file `amt-s.pth`.

Source: Li et al., "AMT: All-Pairs Multi-Field Transforms for Efficient Frame Interpolation", CVPR 2023, and MCG-NKU/AMT (networks/AMT-S.py and
its blocks), of which Vchitect/VBench keeps a copy (vbench/third_party/amt). Code and weights there are CC BY-NC 4.0; nothing of them is in here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate import resize
from mila_jax.evaluate.convolutions import Tensors
from mila_jax.evaluate.networks import in_chunks
from mila_jax.model.weight_files import read_tensors

NAME = "AMT-S"
PREPROCESSING = "at their own size, edges repeated to multiples of 16; interpolated frames rounded down to integers"
MULTIPLE = 16
SMALLEST = 49  # pixels a side: these become 64, an eighth of which can be halved three times
CHANNELS = (20, 32, 44, 56)  # of the pyramid, at 1/2 … 1/16 of the size
SIDE = 20  # channels that go through convolutions of their own in a residual block
FEATURES = 84  # channels that are correlated
RADIUS, LEVELS, FLOWS = 3, 4, 3
MEMORY = 2**30  # bytes that correlations of the pairs of a chunk may take: 4 pairs of 256×448 take 0.13 GiB, one of 900×1600 5.1


def _convolve(get, name, x, out, kernel=3, stride=1):
    weight = get(f"{name}.weight", (out, x.shape[-1], kernel, kernel))
    x = jax.lax.conv_general_dilated(x, weight, (stride,) * 2, [(kernel // 2,) * 2] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return x + get(f"{name}.bias", (out,))


def _double(get, name, x, out):
    """PyTorch's ConvTranspose2d of kernel 4, stride 2 and padding 1: twice the size."""
    weight = jnp.flip(get(f"{name}.weight", (x.shape[-1], out, 4, 4)), (2, 3))
    x = jax.lax.conv_general_dilated(x, weight, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=("NHWC", "IOHW", "NHWC"))
    return x + get(f"{name}.bias", (out,))


def _prelu(get, name, x):
    return jnp.where(x >= 0, x, x * get(f"{name}.weight", x.shape[-1:]))


def _unit(get, name, x, out, stride=1):
    return _prelu(get, f"{name}.1", _convolve(get, f"{name}.0", x, out, 3, stride))


def _scaled(x, factor):
    return resize.bilinear(x, round(x.shape[1] * factor), round(x.shape[2] * factor))


def _normalised(x):
    """Instance norm without scale and shift."""
    x = x - x.mean((1, 2), keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean((1, 2), keepdims=True) + 1e-5)


def _features(get, x):
    """[n, H, W, 3] → [n, H/8, W/8, FEATURES], to be correlated."""
    name = "feat_encoder"
    x = jax.nn.relu(_normalised(_convolve(get, f"{name}.conv1", x, 32, 7, 2)))
    for layer, out in ((1, 32), (2, 64), (3, 96)):
        for number in (0, 1):
            block, stride = f"{name}.layer{layer}.{number}", 2 if layer > 1 and number == 0 else 1
            y = x
            for part, width, kernel, step in (("conv1", out // 4, 1, 1), ("conv2", out // 4, 3, stride), ("conv3", out, 1, 1)):
                y = jax.nn.relu(_normalised(_convolve(get, f"{block}.{part}", y, width, kernel, step)))
            if stride == 2:
                x = _normalised(_convolve(get, f"{block}.downsample.0", x, out, 1, 2))
            x = jax.nn.relu(x + y)
    return _convolve(get, f"{name}.conv2", x, FEATURES, 1)


def _pyramid(get, x):
    """[n, H, W, 3] → maps at 1/2, 1/4, 1/8 and 1/16 of the size, with `CHANNELS`."""
    maps = []
    for number, out in enumerate(CHANNELS, 1):
        x = _unit(get, f"encoder.pyramid{number}.0", x, out, 2)
        x = _unit(get, f"encoder.pyramid{number}.1", x, out)
        maps.append(x)
    return maps


def _decode(get, name, x, width, out):
    """A unit of `width` channels, a residual block, and twice the size with `out` channels."""
    name = f"{name}.convblock"

    def side(y, part):
        return jnp.concatenate([y[..., :-SIDE], _unit(get, f"{name}.1.{part}", y[..., -SIDE:], SIDE)], -1)

    x = _unit(get, f"{name}.0", x, width)
    y = side(_unit(get, f"{name}.1.conv1", x, width), "conv2")
    y = side(_unit(get, f"{name}.1.conv3", y, width), "conv4")
    x = _prelu(get, f"{name}.1.prelu", x + _convolve(get, f"{name}.1.conv5", y, width))
    return _double(get, f"{name}.2", x, out)


def _warp(x, flow):
    """x [n, h, w, c] read at each place plus flow [n, h, w, 2] (x, y in pixels), bilinear, at the nearest edge beyond them."""
    n, height, width, _ = x.shape
    across = jnp.clip(jnp.arange(width) + flow[..., 0], 0, width - 1)
    down = jnp.clip(jnp.arange(height)[:, None] + flow[..., 1], 0, height - 1)
    left, top = (jnp.minimum(jnp.floor(place), length - 2) for place, length in ((across, width), (down, height)))
    across, down = (across - left)[..., None], (down - top)[..., None]
    left, top, which = left.astype(jnp.int32), top.astype(jnp.int32), jnp.arange(n)[:, None, None]
    upper = x[which, top, left] * (1 - across) + x[which, top, left + 1] * across
    lower = x[which, top + 1, left] * (1 - across) + x[which, top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


def _correlations(first, second):
    """Correlations of every place of one map [n, h, w, c] with all of the other, for both directions: lists over levels of [n, h w, h', w'], each
    level the last one's means over 2×2 places."""
    n, height, width, channels = first.shape
    whole = jnp.einsum("nabc,nijc->nabij", first, second) / np.sqrt(channels)
    found = []
    for level in (whole.reshape(n, height * width, height, width), whole.transpose(0, 3, 4, 1, 2).reshape(n, height * width, height, width)):
        levels = [level]
        for _ in range(LEVELS - 1):
            h, w = (length // 2 for length in level.shape[2:])
            level = level[:, :, : 2 * h, : 2 * w].reshape(n, -1, h, 2, w, 2).mean((3, 5))
            levels.append(level)
        found.append(levels)
    return found


def _look_up(levels, place):
    """Correlations in a window of (2 RADIUS + 1)² places around `place` [n, h, w, 2] (x, y) on each level → [n, h, w, all of them].

    A window is two small matrix products with bilinear weights, which are zero outside; no gathering. Its order is x first, as in RAFT.
    """
    n, height, width, _ = place.shape
    place = place.reshape(n, height * width, 2)
    window, out = jnp.arange(-RADIUS, RADIUS + 1), []
    for number, level in enumerate(levels):
        rows, columns = level.shape[2:]
        x, y = (
            jnp.maximum(0, 1 - jnp.abs((place[..., axis] / 2**number)[..., None, None] + window[:, None] - jnp.arange(length)))
            for axis, length in ((0, columns), (1, rows))
        )
        found = jnp.einsum("npyi,npjy->npij", jnp.einsum("npyx,npix->npyi", level, x), y)
        # The original divides by the side less one: a side of one place has no coordinates there, and on GPUs reads as outside.
        found = found if min(rows, columns) > 1 else jnp.zeros_like(found)
        out.append(found.reshape(n, height, width, -1))
    return jnp.concatenate(out, -1)


def _update(get, name, net, flow, correlation, factor):
    """Changes of net [n, h, w, c] and of both flows, from flows [n, h/factor, w/factor, 4] and correlations of that size."""

    def active(x):
        return jax.nn.leaky_relu(x, 0.1)

    def head(part, x, middle, out):
        return _convolve(get, f"{name}.{part}.2", active(_convolve(get, f"{name}.{part}.0", x, middle)), out)

    channels = net.shape[-1]
    net = _scaled(net, 1 / factor) if factor > 1 else net
    x = active(_convolve(get, f"{name}.convc1", correlation, 64, 1))
    y = active(_convolve(get, f"{name}.convf2", active(_convolve(get, f"{name}.convf1", flow, 40, 7)), 20))
    x = active(_convolve(get, f"{name}.conv", jnp.concatenate([x, y], -1), 68))
    x = head("gru", jnp.concatenate([x, flow, net], -1), 76, 76)
    net, flow = head("feat_head", x, 76, channels), head("flow_head", x, 76, 4)
    return (_scaled(net, factor), factor * _scaled(flow, factor)) if factor > 1 else (net, flow)


def build(get, first, second):
    """The frame halfway between two, all [n, H, W, 3] in 0..1 with sides that are multiples of 16; `get(name, shape)` gives a weight."""
    n = len(first)
    mean = ((first.mean((1, 2, 3)) + second.mean((1, 2, 3))) / 2).reshape(n, 1, 1, 1)
    both = jnp.concatenate([first - mean, second - mean])
    levels = _correlations(*jnp.split(_features(get, both), 2))
    maps = [jnp.split(x, 2) for x in _pyramid(get, both)]

    height, width = (length // 8 for length in first.shape[1:3])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(width), jnp.arange(height)), -1).astype(jnp.float32)
    a, b = maps[3]
    x = _decode(get, "decoder4", jnp.concatenate([a, b, jnp.full((*a.shape[:3], 1), 0.5)], -1), 2 * CHANNELS[3], CHANNELS[2] + 4)
    flow = x[..., :4]  # to the first frame, then to the second one
    for number in (3, 2, 1):
        factor, net = 2 ** (3 - number), x[..., 4:]
        coarse = _scaled(flow, 1 / factor) / factor if factor > 1 else flow
        # Halfway, motion between the frames is twice that to either of them.
        seen = jnp.concatenate([_look_up(levels[0], grid + 2 * coarse[..., 2:]), _look_up(levels[1], grid + 2 * coarse[..., :2])], -1)
        changes = _update(get, f"update{number + 1}", net, coarse, seen, factor)
        net, flow = net + changes[0], flow + changes[1]
        a, b = maps[number - 1]
        parts = [net, _warp(a, flow[..., :2]), _warp(b, flow[..., 2:]), flow]
        out = CHANNELS[number - 2] + 4 if number > 1 else 8 * FLOWS
        x = _decode(get, f"decoder{number}", jnp.concatenate(parts, -1), 3 * CHANNELS[number - 1], out)
        if number > 1:
            flow = x[..., :4] + 2 * _scaled(flow, 2)

    # Several flows, a mask and a residual for each, and a last look at all of their pictures.
    flow, ends = 2 * _scaled(flow, 2), np.cumsum([2 * FLOWS, 2 * FLOWS, FLOWS])
    to_first, to_second, mask, rest = jnp.split(x, ends, -1)
    mask, pictures = jax.nn.sigmoid(mask), []
    a, b = jnp.split(both, 2)
    for k in range(FLOWS):
        one, two = _warp(a, to_first[..., 2 * k : 2 * k + 2] + flow[..., :2]), _warp(b, to_second[..., 2 * k : 2 * k + 2] + flow[..., 2:])
        share = mask[..., k : k + 1]
        pictures.append(share * one + (1 - share) * two + mean + rest[..., 3 * k : 3 * k + 3])
    x = _prelu(get, "comb_block.1", _convolve(get, "comb_block.0", jnp.concatenate(pictures, -1), 6 * FLOWS))
    return jnp.clip(sum(pictures) / FLOWS + _convolve(get, "comb_block.2", x, 3), 0, 1)


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Published name → shape of every tensor, in PyTorch's layout."""
    found = {}

    def get(name, shape):
        found[name] = tuple(shape)
        return jnp.zeros(shape)

    picture = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    jax.eval_shape(functools.partial(build, get), picture, picture)
    return found


def load_params(path) -> dict[str, np.ndarray]:
    """Weights by published name from a PyTorch file or safetensors; no pickle is executed.

    Raises `UserError` naming the file, and the tensor that is missing, of another shape, or none of this network's.
    """
    return _params(path, read_tensors(path)[0])


def _params(path, flat) -> dict[str, np.ndarray]:
    tensors = Tensors(path, {re.sub(r"^(module\.)+", "", name): value for name, value in flat.items()})
    params = {name: tensors.take(name, shape) for name, shape in shapes().items()}
    unknown = [name for name in tensors.flat if name not in params]
    if unknown:
        raise UserError(f"{path}: tensor {unknown[0]} is none of {NAME}'s ({len(unknown)} such); give amt-s.pth")
    return params


@jax.jit
def forward(params, first, second):
    """float32 [n, H, W, 3] in 0..1 halfway between frames uint8 [n, H, W, 3], in full float32."""
    height, width = first.shape[1:3]
    sides = [((-length % MULTIPLE) // 2, -length % MULTIPLE - (-length % MULTIPLE) // 2) for length in (height, width)]
    first, second = (jnp.pad(x.astype(jnp.float32) / 255, ((0, 0), *sides, (0, 0)), mode="edge") for x in (first, second))
    with jax.default_matmul_precision("highest"):
        x = build(lambda name, _: params[name], first, second)
    (top, _), (left, _) = sides
    return x[:, top : top + height, left : left + width]


@jax.jit
def _rounded(x):
    """0..1 → uint8, rounded down as in the original."""
    return (x * 255).astype(jnp.uint8)


def correlation_bytes(height: int, width: int) -> int:
    """Bytes of a pair's correlations of all places with all, in both directions and on all levels."""
    places = -(-height // MULTIPLE) * -(-width // MULTIPLE) * 4
    return int(places**2 * 4 * 2 * sum(4.0**-level for level in range(LEVELS)))


def check_size(height: int, width: int) -> None:
    """Raises `UserError` for pictures that are too small for the network's correlations."""
    if min(height, width) < SMALLEST:
        raise UserError(f"motion smoothness needs pictures of at least {SMALLEST} pixels a side, these have {height}×{width}; leave --amt out")


class Interpolator:
    """`interpolator(first, second)` gives the frames halfway between frames, all uint8 [n, H, W, 3], `chunk` pairs at a time, fewer
    where their correlations would take more than `MEMORY`.

    name, sha256, preprocessing: for the card. Raises `UserError` as `load_params` and `check_size`, ValueError for other arrays.
    """

    name, preprocessing = NAME, PREPROCESSING

    def __init__(self, path, chunk: int = 4):
        flat, _, self.sha256 = read_tensors(path)
        self.chunk, self._params = chunk, _params(path, flat)

    def __call__(self, first, second) -> np.ndarray:
        first, second = np.asarray(first), np.asarray(second)
        fits = first.shape == second.shape and first.ndim == 4 and first.shape[-1] == 3 and len(first) > 0
        if not fits or {first.dtype, second.dtype} != {np.dtype(np.uint8)}:
            got = f"{first.dtype} {first.shape} and {second.dtype} {second.shape}"
            raise ValueError(f"expected two uint8 arrays [n, H, W, 3] of one shape, n > 0; got {got}")
        check_size(*first.shape[1:3])
        chunk = max(1, min(self.chunk, MEMORY // correlation_bytes(*first.shape[1:3])))
        return in_chunks(lambda a, b: _rounded(forward(self._params, a, b)), chunk, first, second)
