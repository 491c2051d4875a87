"""The drift meter, on videos whose drift is known."""

import html.parser
import json

import numpy as np
import pytest

from mila_jax.evaluate import drift, resample
from mila_jax.evaluate.frechet import NAME
from mila_jax.evaluate.report import Report


def _video(seconds, fade=0.0, seed=0):
    """Noise pictures whose contrast falls by the share `fade` a second, the same picture for the two halves of a second."""
    rng = np.random.default_rng(seed)
    for second in range(seconds):
        for _ in range(2):
            frame = 128 + (rng.standard_normal((6, 8, 8, 3)) * 30) * (1 - fade) ** second
            for _ in range(6):
                yield np.clip(frame, 0, 255).astype(np.uint8)


def _features(images):
    flat = images.reshape(len(images), -1, 3).astype(float)
    return np.concatenate([flat.mean(1), flat.std(1)], -1)


def test_curves_show_the_fading_and_its_interval():
    recorded = [drift.measure(_video(4, seed=s), extractor=_features) for s in (10, 11)]
    steady, fading = ([drift.measure(_video(5, fade, s), extractor=_features) for s in range(3)] for fade in (0.0, 0.3))
    fading[0]["contrast"] = np.append(fading[0]["contrast"], 0.0)  # one video is longer: curves end with the shortest
    steady, fading = drift.curves(steady, recorded, resamples=8), drift.curves(fading, recorded, resamples=8)
    assert fading["seconds"] == 5 and fading["videos"] == 3
    contrast = np.array(fading["contrast"]["mean"])
    np.testing.assert_allclose(contrast[1:] / contrast[:-1], 0.7, atol=0.03)
    assert abs(steady["contrast"]["mean"][4] - steady["recorded"]["contrast"]) < 1
    assert (np.diff(fading[NAME]["mean"]) > 0).all() and fading[NAME]["low"][4] > steady[NAME]["high"][4]
    assert all(low <= mean + 1e-9 for low, mean in zip(fading["contrast"]["low"], fading["contrast"]["mean"]))
    json.dumps(fading)
    assert drift.curves([drift.measure(_video(2))], [])["contrast"].keys() == {"mean"}


def test_paired_differences_leave_out_what_videos_share():
    shared = [drift.measure(_video(4, 0.1 * s, s), extractor=_features) for s in range(4)]
    worse = [{k: v + 1 if k == "contrast" else v for k, v in x.items()} for x in shared]
    recorded = [drift.measure(_video(4, seed=9), extractor=_features)]
    a, b = drift.curves(shared, recorded, resamples=8), drift.curves(worse, recorded, resamples=8)
    assert a["contrast"]["high"][3] - a["contrast"]["low"][3] > 1  # wider than the difference
    found = drift.difference(a, b)
    assert found["contrast"] == pytest.approx({"mean": 1, "low": 1, "high": 1}) and found[NAME] == pytest.approx({"mean": 0, "low": 0, "high": 0})
    assert a["second_half"]["contrast"][0] == pytest.approx(np.mean(a["contrast"]["mean"][2:]))


def test_intervals_of_a_distance_hold_its_value():
    """Draws repeat videos, so that their distances are all too large."""
    rng = np.random.default_rng(0)
    fake, real = rng.standard_normal((2, 8, 6, 30)) + rng.standard_normal((2, 8, 1, 30))
    against = resample.AgainstPaired(fake, real)
    value, drawn = against.distance(np.ones(8, int)), [against.distance(draw) for draw in resample.draws(8, 100)]
    assert np.percentile(drawn, 2.5) > value
    low, high = resample.interval(drawn, value, 8)
    assert low < value < high and value - low == pytest.approx(high - value)


@pytest.mark.parametrize("videos", [3, 8])
def test_intervals_of_means_are_right_as_often_as_they_say(videos):
    rng = np.random.default_rng(videos)
    values = rng.standard_normal((4000, videos))
    drawn = resample.draws(videos, 2000) @ values.T / videos  # [draws, sets of videos]
    low, high = resample.interval(drawn, values.mean(1), videos)
    assert ((low < 0) & (0 < high)).mean() == pytest.approx(0.95, abs=0.015)
    assert np.isnan(resample.interval(drawn[:, 0], 0.0, 1)).all()


def test_each_number_of_videos_has_its_own_recorded_line(tmp_path):
    """Fréchet distances of fewer pictures are higher."""
    rng = np.random.default_rng(0)
    videos = [{"contrast": np.zeros(3), "features": rng.standard_normal((3, 4, 20))} for _ in range(8)]
    named = {"one": drift.curves(videos[:1], videos[4:]), "three": drift.curves(videos[1:4], videos[4:], resamples=2)}
    report = Report("Drift")
    drift.add_to_report(report, named)
    text = report.write(tmp_path / "drift.html").read_text()
    assert "recorded, 1 at a time" in text and "recorded, 3 at a time" in text and text.count(">recorded<") == 1


def test_recorded_seconds_are_of_as_many_pictures_as_generated_ones():
    """Videos of the law that the recorded ones have show no drift, however few pictures a second has."""
    rng = np.random.default_rng(0)
    videos = [{"contrast": np.zeros(3), "features": rng.standard_normal((3, 4, 20))} for _ in range(24)]
    found = drift.curves(videos[:4], videos[4:], resamples=2)
    assert np.mean(found[NAME]["mean"]) == pytest.approx(found["recorded"][NAME], rel=0.15)
    assert drift.curves(videos[:1], videos[4:])["recorded"][NAME] > 1.5 * found["recorded"][NAME]


def test_flicker_counts_the_step_between_seconds():
    still = np.zeros((12, 6, 4, 4, 3), np.uint8)
    found = drift.measure([*still, *(still + 120)])
    np.testing.assert_allclose(found["flicker"], [0, 10])
    with pytest.raises(ValueError, match="second"):
        drift.measure(still[:11])


def test_motion_is_compared_in_the_frame_of_each_moment():
    angle = np.arange(1, 37) / 12 * 0.5
    circle = np.stack([10 * np.sin(angle), 10 * (1 - np.cos(angle)), angle], -1)  # 5 m/s, 0.5 rad/s
    right = drift.movements(circle)
    np.testing.assert_allclose(right[:, 2] * 12, 0.5)
    lengths = []

    def estimator(frames):
        lengths.append(len(frames))
        return np.broadcast_to(right[0] + [0.1, 0, 0.05], (len(frames) - 1, 3))

    found = drift.measure(_video(3), ego_motion=estimator, poses=circle)
    np.testing.assert_allclose(found["speed_error"], 1.2, atol=1e-6)
    np.testing.assert_allclose(found["yaw_rate_error"], 0.6, atol=1e-6)
    assert lengths == [12, 13, 13]


def test_recorded_frames_that_are_not_evenly_spaced_are_no_error_of_the_reader():
    times = np.cumsum(np.tile([0.1, 0.05, 0.1], 12))  # as cameras fire that are told apart by twentieths of a second
    for name, rate in (("speed_error", [8, 0, 0]), ("yaw_rate_error", [0, 0, 0.3])):
        steps = np.array(rate) / 12
        found = drift.measure(_video(3), ego_motion=lambda frames: np.tile(steps, (len(frames) - 1, 1)), poses=times[:, None] * rate)[name]
        assert found[1:] == pytest.approx(0, abs=1e-6) and found[0] < 0.1 * max(rate)  # in the first second the last group is cut


def test_anchor_residual_and_report(tmp_path):
    anchors = np.zeros((6, 3, 2, 2, 4), np.float16)
    frames = drift.anchor_frames({"anchor_stride": 6}, 3)
    assert frames == [6, 12, 18] and drift.anchor_frames({"anchor_frames": [15, 21], "anchor_stride": 6}, 2) == [15, 21]
    residual = drift.anchor_residual(anchors, anchors + np.arange(3)[None, :, None, None, None], frames)
    assert residual == [(0.5, 0.0), (1.0, 1.0), (1.5, 2.0)]
    found = drift.curves([drift.measure(_video(3, seed=s)) for s in (0, 1)], [drift.measure(_video(2))], resamples=10)
    report = Report("drift")
    drift.add_to_report(report, {"recurrent": found}, {"a": residual})
    text = report.write(tmp_path / "r.html").read_text()
    html.parser.HTMLParser().feed(text)
    assert text.count("<svg") == len(drift.STATISTICS) + 1 and "recurrent, low" in text and "recorded" in text
