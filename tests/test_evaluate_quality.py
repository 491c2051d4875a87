"""PSNR and the per-frame numbers, on pictures whose values are known."""

import numpy as np
import pytest

from mila_jax.evaluate.quality import frame_change, frame_statistics, psnr, temporal_flickering


def test_psnr_of_known_errors():
    a = np.full((3, 8, 9, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    b[2, ::2] = 0
    got = psnr(a, b)
    assert got[0] == np.inf
    assert got[1] == pytest.approx(20 * np.log10(25.5))
    assert got[2] == pytest.approx(10 * np.log10(255**2 / 5000))
    with pytest.raises(ValueError, match="one shape"):
        psnr(a, b[:2])


def test_statistics_of_flat_and_striped_pictures():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0] = 50
    images[1, :, ::2] = 200
    got = frame_statistics(images)
    np.testing.assert_allclose(got["brightness"], [50, 100])
    np.testing.assert_allclose(got["contrast"], [0, 100], atol=1e-9)
    np.testing.assert_allclose(got["sharpness"], [0, 200], atol=1e-9)


def test_blur_lowers_and_noise_raises_sharpness():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    soft = image.astype(float)
    for axis in (0, 1):
        soft = (soft + np.roll(soft, 1, axis) + np.roll(soft, -1, axis)) / 3
    noisy = np.clip(image + rng.normal(0, 30, image.shape), 0, 255)
    sharpness = [frame_statistics(x.astype(np.uint8))["sharpness"] for x in (soft, image, noisy)]
    assert sharpness[0] < sharpness[1] < sharpness[2]


def test_flicker_of_a_known_alternation():
    frames = np.zeros((5, 6, 4, 4, 3), np.uint8)
    frames[1::2] = 51
    np.testing.assert_allclose(frame_change(frames), np.full((4, 6), 51.0))
    assert temporal_flickering(frames) == pytest.approx(0.8)
    assert temporal_flickering(frames[::2]) == 1.0
