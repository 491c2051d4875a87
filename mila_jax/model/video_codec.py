"""The autoencoder in time on top of that of pictures: drives in pictures' latents <-> what the world model works on.

`autoencoder.temporal`: "frame" is one temporal latent for each frame, which any rate can be made of; "chunk17" is Open-Sora's own use, 5
latents for 17 frames (mila_jax/chunks.py says where they lie in time).
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from mila_jax.chunks import CHUNKS, Chunks
from mila_jax.errors import UserError
from mila_jax.model.autoencoder_weights import Codec
from mila_jax.model.temporal_autoencoder import TemporalCodec, load_temporal

ONE = Chunks(1, 1)
TOGETHER = 17  # frames of each view that go through together, at least; one size, so that it compiles once


@dataclasses.dataclass(frozen=True)
class VideoCodec:
    """Normalised latents of pictures <-> normalised temporal latents, in whole chunks.

    kind: "frame" or "chunk17"; pictures: the pictures' autoencoder; channels: of a temporal latent; sha256: of the temporal weights.
    """

    kind: str
    pictures: Codec
    channels: int
    sha256: str
    _encode: Callable  # [n, frames, h, w, c] → [n, latents, h, w, c']
    _decode: Callable  # and back

    @property
    def chunks(self) -> Chunks:
        """A chunk: its frames and latents, (1, 1) for one latent a frame."""
        return CHUNKS[self.kind] or ONE

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c') for pictures of this size; UserError when it does not divide."""
        return (*self.pictures.latent_shape(height, width)[:2], self.channels)

    def encode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures' latents [n, k·frames, h, w, c] of k whole chunks → [n, k·latents, h, w, c'], float32."""
        return self._by_chunks(self._encode, latents, self.chunks.frames)

    def encode_one(self, latents: np.ndarray) -> np.ndarray:
        """The latent [n, 1, h, w, c'] of a picture [n, 1, h, w, c] by itself, as the first of a chunk that is yet to come."""
        return np.asarray(self._encode(np.asarray(latents[:, :1], np.float32)))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The inverse of `encode`."""
        return self._by_chunks(self._decode, latents, self.chunks.latents)

    def _by_chunks(self, function, items, size: int) -> np.ndarray:
        if items.shape[1] % size:
            raise ValueError(f"{items.shape[1]} are not whole chunks of {size}")
        step, out = size * -(-TOGETHER // self.chunks.frames), []
        for start in range(0, items.shape[1], step):
            part = np.asarray(items[:, start : start + step], np.float32)
            padded = np.pad(part, [(0, 0), (0, step - part.shape[1])] + [(0, 0)] * 3)
            result = np.asarray(function(padded))
            out.append(result[:, : result.shape[1] * part.shape[1] // step])
        return np.concatenate(out, 1)


def make_video_codec(kind: str, pictures: Codec, path) -> VideoCodec:
    """The codec of temporal weights at `path` (see `load_temporal`). UserError for an unknown kind and for other channels than the pictures'."""
    if kind not in CHUNKS or kind == "none":
        raise UserError(f"autoencoder.temporal={kind!r} is unknown; use {', '.join(CHUNKS)}")
    temporal, digest = load_temporal(path, chunk=(CHUNKS[kind] or ONE).frames)
    if temporal.config.channels != pictures.config.latent_channels:
        raise UserError(
            f"{path} is for pictures' latents of {temporal.config.channels} channels, autoencoder.path gives {pictures.config.latent_channels}; "
            "use weights that belong together"
        )
    return wrap(kind, pictures, temporal, digest)


def wrap(kind: str, pictures: Codec, temporal: TemporalCodec, digest: str) -> VideoCodec:
    """A `VideoCodec` of its parts."""
    count = (CHUNKS[kind] or ONE).frames * -(-TOGETHER // (CHUNKS[kind] or ONE).frames)
    with_params = lambda params: dataclasses.replace(temporal, params=params)  # noqa: E731
    encode = jax.jit(lambda params, x: with_params(params).encode(x))
    decode = jax.jit(lambda params, z: with_params(params).decode(z, count))
    return VideoCodec(
        kind, pictures, temporal.config.latent_channels, digest, lambda x: encode(temporal.params, x), lambda z: decode(temporal.params, z)
    )
