"""The feature networks of Fréchet distances behind one interface, with what a protocol card must say of each.

`inception` gives FID and `i3d` gives FVD, from the published weights only; `effnet` (EfficientNet-Lite0) is what is there without any
download, and its distance is never called FID.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate import efficientnet, i3d, inception, resize

NETWORKS = ("effnet", "inception", "i3d")


@dataclasses.dataclass(frozen=True)
class Network:
    """`network(frames)` gives features float32 [n, d] of uint8 pictures [n, H, W, 3], or of clips [n, t, H, W, 3] where `clips` is True.

    score: what a Fréchet distance of its features is called; name, sha256 (of the weight file), preprocessing: for the card.
    """

    score: str
    name: str
    sha256: str
    preprocessing: str
    clips: bool
    function: Callable  # of a full chunk, jitted
    chunk: int

    def __call__(self, frames) -> np.ndarray:
        """Raises ValueError for an input of another kind, `UserError` for clips that are too short for the network."""
        frames = np.asarray(frames)
        rank = 5 if self.clips else 4
        if frames.dtype != np.uint8 or frames.ndim != rank or frames.shape[-1] != 3 or not len(frames):
            raise ValueError(f"expected uint8 [n{', t' * self.clips}, H, W, 3], n > 0; got {frames.dtype} {frames.shape}")
        if self.clips and frames.shape[1] < i3d.LEAST_FRAMES:
            raise UserError(f"{self.score} needs clips of at least {i3d.LEAST_FRAMES} frames, these have {frames.shape[1]}; score longer ones")
        return in_chunks(self.function, self.chunk, frames)


def in_chunks(function: Callable, chunk: int, *arrays) -> np.ndarray:
    """`function` of arrays [n, …], n > 0, so many rows at a time, rows split over this host's devices; the last chunk is filled up."""
    devices = jax.local_devices()
    chunk = -(-chunk // len(devices)) * len(devices)
    mesh = jax.make_mesh((len(devices),), ("images",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    split = jax.sharding.NamedSharding(mesh, jax.P("images"))
    found = []
    for start in range(0, len(arrays[0]), chunk):
        parts = [array[start : start + chunk] for array in arrays]
        count = len(parts[0])
        filled = (np.concatenate([part, np.repeat(part[-1:], chunk - count, 0)]) for part in parts)
        found.append(np.asarray(function(*(jax.device_put(part, split) for part in filled)))[:count])
    return np.concatenate(found)


def open_network(name: str, path=None, *, method: str = "tf1", size: int = 224, chunk: int | None = None) -> Network:
    """The network `name` of `NETWORKS` with the weights in `path` (None: those of an installed package, where there is one).

    method: of `resize.METHODS`, how pictures come to the size of inception and i3d. For inception it also says how they are scaled: with `tf1`
    as in the original FID and torch-fidelity, (x − 128) / 128, with the others as in pytorch-fid, x / 127.5 − 1; the two give different
    values. size: side of effnet's input in pixels. chunk: pictures or clips at a time. Raises `UserError` for an unknown name or
    method, for weights that are missing, and naming the tensor for a file of another network.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown feature network {name!r}; use one of {', '.join(NETWORKS)}")
    resized = resize.method(method)
    if name == "effnet":
        file = pathlib.Path(path or efficientnet.find_weights())
        function = functools.partial(efficientnet.features, efficientnet.load_params(path), size=size)
        return Network("FD-EffNetLite0", "EfficientNet-Lite0, ImageNet, 1280 features", _sha256(file), f"{size}, bilinear, anti-aliased, (x - 127) / 128",
                       False, function, chunk or 16)  # fmt: skip
    if name == "inception":
        if path is None:
            raise UserError("FID needs the file pt_inception-2015-12-05-6726825d.pth; give its path (inception=FILE), it is part of no package")
        params = inception.load_params(path)
        function = jax.jit(functools.partial(inception_features, params, method=method))
        scaling = "(x - 128) / 128" if method == "tf1" else "x / 127.5 - 1"
        return Network("FID", "Inception-v3 of 2015-12-05, 2048 features", _sha256(path), f"{inception.SIZE}, {method}, {scaling}", False, function,
                       chunk or 16)  # fmt: skip
    file = pathlib.Path(path or i3d.find_weights())
    params = i3d.load_params(path)

    def videos(x):
        flat = resized(x.astype(jnp.float32).reshape((-1,) + x.shape[2:]), i3d.SIZE)
        return i3d.forward(params, (flat * (2 / 255) - 1).reshape(x.shape[:2] + flat.shape[1:]))

    return Network("FVD", "I3D, Kinetics-400, 400 logits", _sha256(file), f"{i3d.SIZE}, {method}, 2 x / 255 - 1", True, jax.jit(videos), chunk or 2)


def inception_features(params, x, method: str):
    """Features [n, 2048] of pictures [n, H, W, 3] in 0..255, resized and scaled as `open_network` says of `method`."""
    x = resize.method(method)(x.astype(jnp.float32), inception.SIZE)
    return inception.forward(params, (x - 128) / 128 if method == "tf1" else x / 127.5 - 1)


def _sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
