"""Decoding a few pictures at a time, and in tiles."""

import dataclasses

import numpy as np
import pytest

from mila_jax.decode import Decoder, decode_frames, tiles
from mila_jax.errors import UserError
from mila_jax.model.autoencoder_weights import Codec


@dataclasses.dataclass(frozen=True)
class Enlarging:
    """Stands in for a codec: each latent is a block of 4×4 equal pixels; `calls` holds the sizes it was called with."""

    calls: list
    chunk: int = 24

    def decode(self, latents):
        self.calls.append((self.chunk, *latents.shape[:3]))
        return np.repeat(np.repeat(latents[..., :3], 4, 1), 4, 2).astype(np.uint8)


LATENTS = np.random.default_rng(0).integers(0, 255, (6, 5, 8, 14, 4)).astype(np.float32)
PICTURES = np.repeat(np.repeat(LATENTS[..., :3], 4, 2), 4, 3).swapaxes(0, 1)


@pytest.mark.parametrize("frames, views, tile, most", [(1, 0, 0, 6), (4, 0, 0, 24), (2, 1, 0, 2), (3, 4, 0, 12), (2, 0, 5, 12), (2, 3, 4, 6)])
def test_any_way_of_cutting_gives_the_same_pictures(frames, views, tile, most):
    calls = []
    out = np.stack(list(Decoder(Enlarging(calls), frames, views, tile)(LATENTS)))
    assert np.array_equal(out, PICTURES)
    assert all(n <= chunk == most for chunk, n, *_ in calls)
    assert not tile or {tuple(sizes) for _, _, *sizes in calls} == {(tile, tile)}


def test_tiles_cover_and_overlap():
    for size, tile in [(8, 5), (14, 4), (28, 8), (9, 8)]:
        cut = tiles(size, tile)
        assert cut[0][0] == 0 and sum(cut[-1]) == size and {length for _, length in cut} == {tile}
        assert all(0 < later - earlier < tile for (earlier, _), (later, _) in zip(cut, cut[1:]))
    assert tiles(8, 0) == tiles(8, 8) == [(0, 8)]


def test_wrong_settings_name_the_key():
    for wrong, key in [({"frames": 0}, "decode_frames"), ({"views": -1}, "decode_views"), ({"tile": 2}, "decode_tile")]:
        with pytest.raises(UserError, match=key):
            Decoder(Enlarging([]), **wrong)
    assert len(list(decode_frames(Enlarging([]), LATENTS))) == 5


@pytest.mark.parametrize("frames, views", [(1, 0), (4, 1), (4, 0)])
def test_what_goes_through_together_is_shared_by_all_devices(frames, views):
    """Few pictures at a time, as asked for, on four or five devices: each call is padded to a multiple of their number."""
    for devices in (4, 5):
        sizes = []

        def decode(params, latents):
            sizes.append(len(latents))
            return np.repeat(np.repeat(latents[..., :3], 4, 1), 4, 2).astype(np.uint8)

        codec = Codec(None, None, np.zeros(4), np.ones(4), "", 24, None, decode, devices)
        assert np.array_equal(np.stack(list(Decoder(codec, frames, views)(LATENTS))), PICTURES)
        assert {size % devices for size in sizes} == {0} and max(sizes) < frames * (views or 6) + devices
