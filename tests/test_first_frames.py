"""`scripts/first_frames.py`: which windows it takes, and errors apart under vehicles and elsewhere."""

import importlib.util
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.clips import ClipSpec

FRAMES, GIVEN, PLACES = 6, 4, (3, 4)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("first_frames", pathlib.Path(__file__).parents[1] / "scripts" / "first_frames.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Windows:
    """Windows of two views, the second without vehicles; `covered[i]` of the first new frame's first view is under vehicles."""

    def __init__(self, covered):
        self.covered, self.specs = covered, [ClipSpec(FRAMES, GIVEN, 12.0)]
        self.clips = [(np.arange(len(covered)) // 20, None)]

    def __getitem__(self, item):
        foreground = np.zeros((2, FRAMES, *PLACES), np.uint8)
        foreground[0, GIVEN].reshape(-1)[: round(12 * self.covered[item])] = 255
        return {"foreground": foreground}

    def batch(self, items):
        b = len(items)
        latents = np.random.default_rng(0).standard_normal((b, 2, FRAMES, *PLACES, 3)).astype(np.float32)
        zeros = {name: np.zeros((b, FRAMES), np.float32) for name in ("text", "text_mask", "waypoints", "intrinsics", "extrinsics", "frame_times")}
        return {"latents": latents, "fps": np.full(b, 12.0), "foreground": np.stack([self[i]["foreground"] for i in items])} | zeros


def test_the_windows_with_the_most_vehicles(script):
    covered = np.zeros(40)
    covered[[3, 5, 12, 30]] = 0.9, 1.0, 0.5, 0.7
    assert script.most_covered(Windows(covered), 3) == [5, 30, 12]  # 3 is less than half a second before 5
    covered[:] = 0.1  # none of it close
    covered[7] = 0.3
    assert script.most_covered(Windows(covered), 1) == [7]


@pytest.mark.parametrize("count", (1, 5))
def test_errors_apart(script, count):
    """A network that is wrong by 2 under what it takes for vehicles and by 1 elsewhere; the given frames reach it clean."""
    windows = Windows(np.full(8, 0.5))
    clip = windows.batch(range(4))
    wrong = np.where(clip["foreground"][..., None] > 0, 2.0, 1.0)

    def velocity(latents, levels, conditions):
        seen = np.arange(FRAMES) < GIVEN
        clean = jnp.array_equal(latents[:, :, :GIVEN], clip["latents"][:, :, :GIVEN]) & jnp.array_equal(levels, jnp.broadcast_to(~seen, levels.shape))
        return jnp.where(clean, clip["latents"] + wrong - latents, jnp.nan)

    errors = script.errors(types.SimpleNamespace(velocity=velocity), windows, list(range(count)))
    assert errors.shape == (2, 2)
    np.testing.assert_allclose(errors, [[4, 1], [np.nan, 1]], rtol=1e-5)  # no vehicles in the second new frame
