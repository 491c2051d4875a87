"""Drift of a long video: what changes from second to second, beside the same numbers of recorded video.

Fréchet distance of each second's pictures to one fixed set of recorded ones, statistics that need no network, agreement of
neighbouring views, and, where an estimator is given, the motion read from the video against the commanded one. Fréchet distances of
one second are of few pictures: biased upwards, equally for all seconds, so the curve tells drift and its height means little.
"""

from collections.abc import Callable, Iterable

import numpy as np

from mila_jax.evaluate import frechet, resample
from mila_jax.evaluate.consistency import view_agreement
from mila_jax.evaluate.egomotion import GAP
from mila_jax.evaluate.quality import frame_change, frame_statistics

RATE = 12  # frames a second
STATISTICS = ("brightness", "contrast", "colour", "sharpness", "flicker")
MOTION = ("speed_error", "yaw_rate_error")


def colour(images):
    """Colourfulness of uint8 [..., H, W, 3]: mean distance of a pixel's largest from its smallest channel, 0..255."""
    images = np.asarray(images).astype(np.int16)
    return (images.max(-1) - images.min(-1)).mean((-2, -1))


def measure(frames: Iterable, *, extractor: Callable | None = None, strips=None, ego_motion: Callable | None = None, poses=None) -> dict:
    """Curves of one video, a number for each whole second (a last part of a second is left out).

    frames: iterable of uint8 [6, H, W, 3] at 12 Hz; no more than a second of it is held. extractor: uint8 [n, H, W, 3] → features
    [n, d], kept under "features". strips: of `consistency.overlaps`. ego_motion: uint8 [t, 6, H, W, 3] → movements [t−1, 3] from
    frame to frame (metres forward and left, radians); poses [t, 3]: the commanded ones at the
    frames (x, y metres, yaw radians, in one frame). Returns dict of float64 [seconds]: `STATISTICS` (grey levels), view_agreement
    (correlation), speed_error (m/s) and yaw_rate_error (rad/s), mean absolute ones; with ego_motion also movements, all of them joined.
    """
    found, chunk, last, count = {}, [], None, 0

    def keep(name, value):
        found.setdefault(name, []).append(value)

    for frame in frames:
        chunk.append(np.asarray(frame))
        if len(chunk) < RATE:
            continue
        second, before = np.stack(chunk), last
        chunk, last, count = [], second[-1], count + RATE
        for name, value in frame_statistics(second).items():
            keep(name, value.mean())
        keep("colour", colour(second).mean())
        joined = second if before is None else np.concatenate([before[None], second])
        keep("flicker", frame_change(joined).mean())
        if strips is not None:
            keep("view_agreement", view_agreement(second, strips)["correlation"].mean())
        if extractor is not None:
            keep("features", np.asarray(extractor(np.ascontiguousarray(second).reshape((-1,) + second.shape[2:]))))
        if ego_motion is not None:
            steps = np.asarray(ego_motion(joined), np.float64)
            commanded = movements(np.asarray(poses)[count - len(joined) : count])
            keep("movements", steps)
            for name, axis in (("speed_error", 0), ("yaw_rate_error", 2)):
                keep(name, _apart(steps[:, axis], commanded[:, axis]) * RATE)
    if not found:
        raise ValueError("drift needs at least one second of video")
    joined = {"movements": np.concatenate(found.pop("movements"))} if "movements" in found else {}
    return joined | {name: np.stack(values) if name == "features" else np.array(values) for name, values in found.items()}


def _apart(read, commanded) -> float:
    """Mean absolute difference of two courses [n], over groups of frames that the reader takes for equal: recorded frames are not evenly spaced,
    and what is read within a group cannot follow that."""
    sums = np.add.reduceat(read - commanded, range(0, len(read), GAP))
    return float(np.abs(sums).sum() / len(read))


def movements(poses):
    """poses [t, 3] in one frame → movements [t − 1, 3], each in the frame of the moment before."""
    d, yaw = np.diff(np.asarray(poses, np.float64), axis=0), poses[:-1, 2]
    c, s = np.cos(yaw), np.sin(yaw)
    turn = (d[:, 2] + np.pi) % (2 * np.pi) - np.pi
    return np.stack([c * d[:, 0] + s * d[:, 1], -s * d[:, 0] + c * d[:, 1], turn], -1)


def curves(videos: list[dict], recorded: list[dict], *, resamples: int = 200, seed: int = 0) -> dict:
    """Mean curves of several videos (of `measure`), with intervals where there are two or more.

    recorded: of `measure` for recorded video; all its pictures are the reference of the Fréchet distance, its means stand beside the
    statistics. Returns plain values: for each name "mean", and "low" and "high" (95 %, `resample.interval` over the videos), lists
    over seconds that all videos have; "second_half": its mean over the later half, of all videos and then of each draw; "recorded": its means; "videos": their number;
    "together": of how many recorded videos at a time the recorded Fréchet distance is.
    """
    seconds = min(len(v["contrast"]) for v in videos)
    # The first draw takes every video once.
    counts = np.ones((1, len(videos)), int)
    if len(videos) > 1:
        counts = np.concatenate([counts, resample.draws(len(videos), resamples, seed)])
    out = {"videos": len(videos), "seconds": seconds, "recorded": {}, "second_half": {}}

    def keep(name, values):  # [draws, seconds]
        out[name] = _interval(values, len(videos))
        out["second_half"][name] = [float(x) for x in values[:, seconds // 2 :].mean(1)]

    for name in (*STATISTICS, "view_agreement", *MOTION):
        if all(name in v for v in videos):
            keep(name, counts @ np.stack([v[name][:seconds] for v in videos]) / len(videos))
        if recorded and all(name in v for v in recorded):
            out["recorded"][name] = float(np.mean([v[name].mean() for v in recorded]))
    if recorded and all("features" in v for v in [*videos, *recorded]):
        pictures = np.concatenate([v["features"].reshape(-1, v["features"].shape[-1]) for v in recorded])
        mean, covariance = frechet.statistics(pictures)
        against = (resample.AgainstFixed(np.stack([v["features"][s] for v in videos]), mean, covariance) for s in range(seconds))
        keep(frechet.NAME, np.stack([[one.distance(draw) for draw in counts] for one in against], 1))
        # What no drift would show, and somewhat less, since these pictures are among those of the reference: the same second of as many recorded
        # videos, where there are as many, so that the pictures are as many, too.
        reference, together = frechet.Reference(pictures), min(len(videos), len(recorded))
        out["together"] = together
        turns = [[recorded[(first + i) % len(recorded)]["features"] for i in range(together)] for first in range(0, len(recorded), together)]
        parts = [reference.distance(np.concatenate(second)) for features in turns for second in zip(*features)]
        out["recorded"][frechet.NAME] = float(np.mean(parts))
    return out


def difference(a: dict, b: dict) -> dict:
    """How much more b has than a over the later half, for two `curves` whose videos pair in order: name → mean, low, high (paired draws)."""
    found = {}
    for name in a["second_half"].keys() & b["second_half"].keys():
        mean, *drawn = np.array(b["second_half"][name]) - a["second_half"][name]
        low, high = resample.interval(drawn, mean, a["videos"])
        found[name] = {"mean": float(mean), "low": float(low), "high": float(high)}
    return found


def _interval(values, videos: int) -> dict:
    """The first draw of values [draws, seconds], which is of all videos, and the interval of the others if there are any."""
    found = {"mean": [float(x) for x in values[0]]}
    if len(values) > 1:
        low, high = resample.interval(values[1:], values[0], videos)
        found |= {"low": [float(x) for x in low], "high": [float(x) for x in high]}
    return found


def anchor_frames(about: dict, count: int) -> list[int]:
    """Frame numbers of the `count` anchors of a video, from its generate.json; an older one tells only how far they are apart."""
    return about.get("anchor_frames") or [(number + 1) * about["anchor_stride"] for number in range(count)]


def anchor_residual(anchors, corrected, numbers) -> list[tuple[float, float]]:
    """(seconds, mean |x̂ − corrected|) of each anchor, in units of the normalised latents.

    anchors, corrected [v, A, h, w, c] as of `flow.rollout.Rollout`; numbers: their frames', 0 being the last given one.
    """
    difference = np.abs(np.asarray(anchors, np.float32) - np.asarray(corrected, np.float32)).mean((0, 2, 3, 4))
    return [(float(number / RATE), float(value)) for number, value in zip(numbers, difference, strict=True)]


TITLES = {
    frechet.NAME: "Fréchet distance of each second to the recorded pictures (few pictures: read the trend, not the height)",
    "brightness": "Brightness, grey levels", "contrast": "Contrast, grey levels", "colour": "Colour, grey levels",
    "sharpness": "Sharpness, grey levels a pixel", "flicker": "Change from frame to frame, grey levels",
    "view_agreement": "Agreement of neighbouring views where they overlap (correlation)",
    "speed_error": "Speed read from the video against the commanded one, mean absolute difference in m/s",
    "yaw_rate_error": "Yaw rate read from the video against the commanded one, mean absolute difference in rad/s",
}  # fmt: skip


def add_to_report(report, named: dict, residuals: dict | None = None) -> None:
    """Adds one figure for each number to a `Report`. named: name of a set of videos → its `curves`; residuals: → `anchor_residual`."""
    for key, title in TITLES.items():
        series = {}
        for name, found in named.items():
            if key in found:
                times = np.arange(1, found["seconds"] + 1)
                series |= {name + ("" if part == "mean" else f", {part}"): list(zip(times, values)) for part, values in found[key].items()}
                if key in found["recorded"]:
                    # Fréchet distances of fewer pictures are higher: each number of videos has a line of its own.
                    line = f"recorded, {found['together']} at a time" if key == frechet.NAME else "recorded"
                    longest = max(found["seconds"], *(x for x, _ in series.get(line, ())), 1)
                    series[line] = [(1, found["recorded"][key]), (longest, found["recorded"][key])]
        if series:
            report.add_curve(series, title)
    if residuals:
        report.add_curve(residuals, "Anchors: mean |predicted − corrected|, normalised latents")
