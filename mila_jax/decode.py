"""From latents to pictures, a few at a time, so that a long video never lies in memory as pixels."""

import dataclasses
import json

import numpy as np
import tqdm

from mila_jax.errors import UserError

OVERLAP = 0.25  # share of a tile that it has in common with the next


def deciding(generate) -> dict:
    """The settings of the config's section `generate` that decide what pictures come out, as plain values: what kept results are named by, with
    `choose_model.signature`."""
    found = {k: v for k, v in generate.to_dict().items() if k not in ("weights", "guide", "guidance_model", "decode_frames", "decode_views")}
    # Whole images, and anchors as trained, are what results were named by before there were tiles and inner anchors.
    return {k: v for k, v in found.items() if not (k == "decode_tile" and not v or k == "inner_anchors" and v is None)}


def deciding_window(window) -> dict:
    """The same of the section `window`."""
    return {k: v for k, v in json.loads(window.to_json()).items() if k != "inner_anchors" or v}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A codec with the number of pictures that go through it together.

    frames, views: so many frames of so many views (0 = all) in one call; every call has this size, so it compiles once. tile: latents
    along each side of a tile, 0 = whole images; tiles overlap and are blended (norms and attention of the autoencoder then see a tile
    only, so pictures differ a little from those decoded whole).
    """

    codec: object
    frames: int = 4
    views: int = 0
    tile: int = 0

    def __post_init__(self):
        for name, least in (("frames", 1), ("views", 0), ("tile", 0)):
            if getattr(self, name) < least:
                raise UserError(f"generate.decode_{name}={getattr(self, name)} must be at least {least}")
        if self.tile in (1, 2, 3):
            raise UserError(f"generate.decode_tile={self.tile} must be 0 (whole images) or at least 4 latents")

    def __call__(self, latents):
        """Yields frames uint8 [v, H, W, 3] of latents [v, t, h, w, c] (normalised)."""
        latents = np.asarray(latents, np.float32).swapaxes(0, 1)  # [t, v, …]
        t, v = latents.shape[:2]
        views = min(self.views or v, v)
        codec = dataclasses.replace(self.codec, chunk=self.frames * views)
        for first in range(0, t, self.frames):
            part = latents[first : first + self.frames]
            groups = []
            for view in range(0, v, views):
                group = part[:, view : view + views]
                pictures = self._decode(codec, group.reshape((-1,) + group.shape[2:]))
                groups.append(pictures.reshape(group.shape[:2] + pictures.shape[1:]))
            yield from np.concatenate(groups, axis=1)

    def _decode(self, codec, latents):
        """latents [n, h, w, c] → uint8 [n, H, W, 3]."""
        rows, columns = (tiles(size, self.tile) for size in latents.shape[1:3])
        if len(rows) == len(columns) == 1:
            return codec.decode(latents)
        total = weight = None
        for top, height in rows:
            for left, width in columns:
                pictures = codec.decode(latents[:, top : top + height, left : left + width])
                factor = pictures.shape[1] // height
                if total is None:
                    size = [n * factor for n in latents.shape[1:3]]
                    total, weight = np.zeros((len(latents), *size, 3), np.float32), np.zeros((*size, 1), np.float32)
                share = np.outer(ramp(height * factor), ramp(width * factor))[..., None].astype(np.float32)
                place = (slice(top * factor, (top + height) * factor), slice(left * factor, (left + width) * factor))
                total[:, *place] += share * pictures
                weight[place] += share
        return np.clip(np.round(total / weight), 0, 255).astype(np.uint8)


class VideoDecoder:
    """Temporal latents to pictures, window after window; what is no whole chunk yet waits for the next window."""

    def __init__(self, decoder: Decoder, video, given):
        """video: a `VideoCodec`; given [v, g, h, w, c]: the latents that come before, from the first one of a chunk on. Their frames are not shown."""
        chunks = video.chunks
        self.decoder, self.video = decoder, video
        self.waiting = np.asarray(given, np.float32)[:, np.shape(given)[1] // chunks.latents * chunks.latents :]
        self.hidden = chunks.frame_count(self.waiting.shape[1]) if self.waiting.shape[1] else 0

    def __call__(self, latents):
        """Yields frames uint8 [v, H, W, 3] of the chunks that latents [v, t, h, w, c] (normalised) complete."""
        latents = np.concatenate([self.waiting, np.asarray(latents, np.float32)], 1)
        whole = latents.shape[1] // self.video.chunks.latents * self.video.chunks.latents
        self.waiting, hidden = latents[:, whole:], self.hidden
        if whole:
            self.hidden = 0
            yield from self.decoder(self.video.decode(latents[:, :whole])[:, hidden:])


def tiles(size: int, tile: int) -> list[tuple[int, int]]:
    """(first, length) of equally long, overlapping tiles that cover `size` latents; one of all where `tile` is 0 or larger."""
    if not 0 < tile < size:
        return [(0, size)]
    step = max(1, round(tile * (1 - OVERLAP)))
    count = -(-(size - tile) // step) + 1
    return [(round(number * (size - tile) / (count - 1)), tile) for number in range(count)]


def ramp(length: int) -> np.ndarray:
    """Weights of a tile's pixels: rising from its edges over the overlap, 1 inside."""
    edge = max(1, round(length * OVERLAP))
    place = np.arange(length)
    return np.minimum(1.0, (np.minimum(place, length - 1 - place) + 0.5) / edge)


def open_decoder(codec, config) -> Decoder:
    """The decoder of the config's `generate` section."""
    g = config.generate
    return Decoder(codec, g.decode_frames, g.decode_views, g.decode_tile)


def decode_frames(codec, latents, *, progress: bool = False):
    """Yields frames uint8 [v, H, W, 3] of latents [v, t, h, w, c] (normalised), `codec.chunk` pictures at a time."""
    v, t = np.shape(latents)[:2]
    yield from tqdm.tqdm(Decoder(codec, max(1, codec.chunk // v))(latents), desc="decode", unit="frame", total=t, disable=not progress)
