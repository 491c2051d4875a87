"""Protocol cards, statistics that come in parts, and scores with their sanity values."""

import dataclasses
import json

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.evaluate import frechet, protocol

CARD = protocol.Card(
    score="FVD", network="I3D", network_sha256="ab" * 32, preprocessing="224, tf1", views="multi", frames=25, first=0, given=1, fps=12.0, image_size=(64, 112),
    real="images", n_real=600, n_fake=600, clips="mila-600", clips_sha256="cd" * 32, seed=0,
)  # fmt: skip


def test_card_tells_everything_and_finds_what_differs():
    text = CARD.text()
    for part in ("FVD multi", "abababababab", "frames 0 to 24", "64×112", "12 Hz", "1 given", "600 generated against 600 real", "mila-600", "seed 0"):
        assert part in text
    assert CARD.differences(dataclasses.replace(CARD, seed=1, image_size=[64, 112])) == []
    for field in dataclasses.fields(CARD):
        if field.name != "seed":
            assert CARD.differences(dataclasses.replace(CARD, **{field.name: "other"})) == [field.name]


def test_card_comes_back_from_json():
    assert "\n" not in CARD.json() and protocol.Card(**json.loads(CARD.json())) == CARD


def test_windows_of_seconds_leave_out_what_was_given():
    # t = 0 is the last given frame, the first generated one at 1/12 s: windows next to each other hold equally many, and together all.
    assert [protocol.window(148, 4, 12, start, start + 4) for start in (0, 4, 8)] == [(4, 48), (52, 48), (100, 48)]
    assert protocol.window(148, 4, 12, 0, 4, first=0) == (3, 49)  # where the last given frame is scored
    assert protocol.window(19, 3, 10, 0.1, 0.3) == (4, 2)
    for start, stop in ((8, 12.2), (3, 3), (0, 0.05)):
        with pytest.raises(UserError, match="seconds|window"):
            protocol.window(148, 4, 12, start, stop)


def test_statistics_of_several_hosts_merge_exactly():
    x = np.random.default_rng(5).normal(1e4, 1, (50, 4))
    merged = protocol.Statistics()
    for rows in np.split(x, [3, 30]):
        merged.merge(protocol.Statistics().add(rows))
    merged.merge(protocol.Statistics())
    mean, covariance = merged.gaussian()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-10)


def test_statistics_do_not_depend_on_the_parts():
    x = np.random.default_rng(0).normal(100, 1, (60, 5))
    for cuts in ([], [1], [7, 8, 30]):
        statistics = protocol.Statistics()
        for part in np.split(x, cuts):
            statistics.add(part)
        mean, covariance = statistics.gaussian()
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError):
        protocol.Statistics().add(x[:1]).gaussian()


@pytest.mark.parametrize("count", (4, 40))  # fewer and more than the 12 features
def test_distance_is_that_of_all_features_together(count):
    rng = np.random.default_rng(1)
    real, fake = (rng.normal(m, 1, (count, 12)).astype(np.float32) for m in (0, 0.5))
    want = frechet.frechet_distance(real, fake)
    assert protocol.distance(np.split(real, 2), np.split(fake, 2)) == pytest.approx(want, rel=1e-5)


def test_scores_rank_and_halves_are_small():
    rng = np.random.default_rng(2)
    real = [rng.normal(0, 1, (30, 6)) for _ in range(8)]
    near, far = ([r + shift for r in real] for shift in (0.1, 1.0))
    rows = [protocol.score(real, fake, {"frozen": far}) for fake in (near, far)]
    assert rows[0]["distance"] == pytest.approx(6 * 0.01, rel=1e-6) and rows[1]["distance"] == pytest.approx(6.0, rel=1e-6) == rows[0]["real frozen"]
    assert rows[0]["kernel distance"] < rows[1]["kernel distance"] and rows[0]["real halves"] < 0.5


def test_halves_share_no_scene_and_no_picture():
    assert protocol.halves(["a", "a", "b", "c", "c", "b"]) == ([0, 1, 3, 4], [2, 5]) == protocol.halves([*"aabaab"])
    assert protocol.halves(["a"] * 5) == ([0, 1], [2, 3, 4]) and protocol.halves([*"aaaaaaab"]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    rng = np.random.default_rng(3)
    pictures = rng.normal(0, 1, (2, 20, 6))
    real = [pictures[scene][i : i + 10] for scene in (0, 1) for i in range(8)]  # clips of a scene overlap
    found = protocol.score(real, real, scenes=["a"] * 8 + ["b"] * 8)["real halves"]
    assert found == pytest.approx(protocol.distance(real[:8], real[8:])) and found > 2 * protocol.distance(real[0::2], real[1::2])


def test_kernel_distance_takes_subsets_of_both():
    rng = np.random.default_rng(3)
    a, b = [rng.normal(0, 1, (50, 4)) for _ in range(4)], [rng.normal(0, 1, (50, 4)) for _ in range(4)]
    whole = frechet.kernel_distance(np.concatenate(a), np.concatenate(b))
    assert protocol.kernel_distance(a, b) == pytest.approx(whole)
    assert protocol.kernel_distance(a, b, subset=100, subsets=200) == pytest.approx(whole, abs=0.02)


def test_disturbed_clips_hold_the_same_pictures():
    clip = np.arange(2 * 6 * 4).reshape(2, 6, 2, 2, 1).astype(np.uint8)
    broken = protocol.disturbed(clip, 0)
    np.testing.assert_array_equal(np.sort(broken["shuffled"], 1), clip)
    assert (broken["shuffled"] != clip).any()
    np.testing.assert_array_equal(broken["frozen"], np.repeat(clip[:, :1], 6, 1))
