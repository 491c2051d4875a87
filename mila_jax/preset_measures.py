"""What `mila evaluate --preset` tells of clips beside Fréchet distances: how they follow their waypoints, whether neighbouring views agree, VBench's
dimensions, LPIPS.

A measure looks at one clip at a time and gives small arrays, which are kept on disk; its rows come from those of all clips. Each row has the
generated video's value beside the recorded video's, or beside that of a video that is known to be bad.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from mila_jax.errors import UserError
from mila_jax.evaluate import amt, egomotion
from mila_jax.evaluate.consistency import overlaps, view_agreement
from mila_jax.evaluate.drift import movements
from mila_jax.evaluate.lpips import Lpips
from mila_jax.evaluate.quality import temporal_flickering
from mila_jax.evaluate.vbench import consistency, motion_smoothness
from mila_jax.evaluate.vit import CLIP, DINO, open_vit
from mila_jax.views import VIEWS, view_index

FRONT = view_index("CAM_FRONT")
LOWER, RECORDED = "lower", "nearest to the recorded value"  # what is better
ESTIMATOR_HEIGHT = 64  # pixels: the size that the estimator of motion was checked at; larger pictures are reduced to about that


@dataclasses.dataclass(frozen=True)
class ClipVideo:
    """A generated and a recorded clip, uint8 [6, t, H, W, 3]; the first `given` frames are the recorded ones in both.

    commanded, driven [t − given + 1, 3]: poses (x, y metres, yaw radians, in one frame) at the last given and the later frames, those that the
    generated video should follow and those of the recorded one. intrinsics [6, 4], extrinsics [6, 7]: the rig (see `Start`). seed: of the clip.
    """

    fake: np.ndarray
    real: np.ndarray
    given: int
    commanded: np.ndarray
    driven: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Measure:
    """`of(video)` gives a clip's arrays by name; `rows(found, view)` rows of the table from those of all clips, for `front` or `multi`.

    A row has score, generated, better (`LOWER` or `RECORDED`) and what stands beside. first: of the frames that are looked at; network, sha256,
    preprocessing: for the protocol card; views: those it has rows for, of those that the preset shows.
    """

    key: str
    of: Callable[[ClipVideo], dict[str, np.ndarray]]
    rows: Callable[[Sequence[dict], str], list[dict]]
    first: int
    network: str = "no network"
    sha256: str = ""
    preprocessing: str = "pictures at their own size"
    views: tuple[str, ...] = ("multi", "front")


def open_measures(
    preset, *, motion: str | None = None, lpips: bool = False, dino=None, clip=None, amt_s=None, image_size=None,
) -> tuple[list[Measure], dict[str, str]]:  # fmt: skip
    """The measures of a preset, and those that are left out with the reason.

    motion: `front` or `all` cameras to read the car's motion from, None: not read; dino, clip, amt_s: weight files of VBench's networks;
    image_size: (height, width) of the pictures, where it is known. Raises `UserError` for an unknown `motion`, LPIPS weights that are not installed,
    wrong weight files, and pictures that are too small for AMT-S.
    """
    six, left_out = preset.views == "six", {}
    flicker = per_view("temporal flickering", temporal_flickering, preset.fvd_from, six)
    measures = [flicker]
    for score, spec, path, option in (("subject consistency", DINO, dino, "dino"), ("background consistency", CLIP, clip, "clip")):
        if path is None:
            left_out[score] = f"needs the weights of {spec.name} (--{option}=FILE)"
            continue
        network = open_vit(path, spec)
        function = functools.partial(lambda network, frames: consistency(network(frames)), network)
        measures.append(per_view(score, function, preset.fvd_from, six, network.name, network.sha256, network.preprocessing))
    if amt_s is None:
        left_out["motion smoothness"] = f"needs the weights of {amt.NAME} (--amt=FILE)"
    else:
        measures.append(smoothness(preset.fvd_from, six, amt_s, image_size))
    if six:
        measures.append(agreement(preset.conditioning))
    if motion is not None:
        measures.append(trajectory_following(preset, motion))
    else:
        left_out["trajectory following"] = "is asked for by --motion (seconds of CPU for each second of video)"
    if lpips:
        measures.append(perceptual_distance(preset.conditioning, six))
    else:
        left_out["LPIPS"] = "is asked for by --lpips"
    return measures, left_out


def _shown(six: bool) -> list[int]:
    return list(range(len(VIEWS))) if six else [FRONT]


def _of_view(values, view: str, six: bool):
    """values [clips, views, …] as `_shown` → those of `front` or `multi`."""
    return values if view == "multi" or not six else values[:, [FRONT]]


def _stack(found: Sequence[dict], key: str) -> np.ndarray:
    return np.stack([arrays[key] for arrays in found])


def per_view(
    score: str, function: Callable, first: int, six: bool, network="no network", sha256="", preprocessing="pictures at their own size", still=None,
) -> Measure:  # fmt: skip
    """One of VBench's dimensions: `function(frames uint8 [t, H, W, 3])` of each view is one video's score; the mean over videos is told.

    A still picture has 1 in all of these, or what `still(frame uint8 [H, W, 3])` says, so the recorded value is what to come near to.
    """

    def of(video):
        found = {kind: np.array([function(frames[v, first:]) for v in _shown(six)]) for kind, frames in (("fake", video.fake), ("real", video.real))}
        return found | ({"still": np.array([still(video.real[v, first]) for v in _shown(six)])} if still else {})

    def rows(found, view):
        mean = {kind: float(_of_view(_stack(found, kind), view, six).mean()) for kind in ("fake", "real", *(("still",) if still else ()))}
        return [{"score": score, "generated": mean["fake"], "recorded": mean["real"], "still": mean.get("still", 1.0), "better": RECORDED}]

    return Measure(score, of, rows, first, network, sha256, preprocessing)


def smoothness(first: int, six: bool, path, image_size=None) -> Measure:
    """VBench's motion smoothness. A still picture comes out of the network nearly, not wholly, as it went in: its score is computed, too."""
    if image_size is not None:
        amt.check_size(*image_size)
    network = amt.Interpolator(path)

    def score(frames):
        return motion_smoothness(frames, network)

    def still(frame):
        return score(np.stack([frame] * 3))

    return per_view("motion smoothness", score, first, six, network.name, network.sha256, network.preprocessing, still)


def agreement(first: int) -> Measure:
    """Correlation of neighbouring views in their shared strips (`evaluate.consistency`), and with the neighbour exchanged for a wrong camera."""

    def of(video):
        out = {}
        strips = overlaps(video.intrinsics, video.extrinsics[:, :3], video.extrinsics[:, 3:], *video.real.shape[2:4])
        for kind, frames in (("fake", video.fake), ("real", video.real)):
            for name, swap in ((kind, 0), (f"{kind} wrong", 2)):
                out[name] = view_agreement(frames[:, first:].swapaxes(0, 1), strips, swap)["correlation"].mean()
        return out

    def rows(found, view):
        mean = {key: float(_stack(found, key).mean()) for key in ("fake", "real", "fake wrong", "real wrong")}
        return [
            {
                "score": "view agreement (correlation)", "generated": mean["fake"], "recorded": mean["real"],
                "wrong pairing, generated": mean["fake wrong"], "wrong pairing, recorded": mean["real wrong"], "better": RECORDED,
            }
        ]  # fmt: skip

    return Measure("agreement", of, rows, first, preprocessing="luma, overlaps over a bowl of 30 m", views=("multi",))


def perceptual_distance(first: int, six: bool) -> Measure:
    """LPIPS between generated and recorded frames of equal time, beside that of a video in which the last given frame stands still."""
    network = Lpips()

    def of(video):
        shown = _shown(six)
        real = video.real[shown][:, first:]
        still = np.broadcast_to(video.real[shown][:, first - 1 : first], real.shape)

        def mean(frames):
            flat = (np.ascontiguousarray(x).reshape((-1,) + x.shape[2:]) for x in (real, frames))
            return network(*flat).reshape(real.shape[:2]).mean(1)

        return {"fake": mean(video.fake[shown][:, first:]), "still": mean(still)}

    def rows(found, view):
        fake, still = (float(_of_view(_stack(found, kind), view, six).mean()) for kind in ("fake", "still"))
        return [{"score": "LPIPS", "generated": fake, "last given frame standing still": still, "better": LOWER}]

    return Measure("LPIPS", of, rows, first, "LPIPS 0.1, AlexNet", network.sha256, "pictures at their own size")


def trajectory_following(preset, cameras: str) -> Measure:
    """The car's motion read from the videos (`evaluate.egomotion`) against the waypoints, from the last given frame on.

    The recorded row is the estimator's own error, against the recorded poses: what no video could do better than, and the only scale there is on
    data where the estimator was never checked. Beside it: a car that stands still, and the generated motion against another clip's waypoints.
    """
    if cameras not in ("front", "all"):
        raise UserError(f"--motion={cameras}: the car's motion is read from front or all cameras")
    six = cameras == "all" and preset.views == "six"
    first, rate = preset.conditioning - 1, preset.fps or 12.0

    def of(video):
        shown = _shown(six)
        estimator = egomotion.EgoMotion(video.intrinsics[shown], video.extrinsics[shown], rate)
        found = {}
        for kind, frames, poses in (("fake", video.fake, video.commanded), ("real", video.real, video.driven)):
            found[f"{kind} read"] = estimator(reduced(frames[shown][:, first:].swapaxes(0, 1)))
            found[f"{kind} true"] = movements(poses)
        return found

    def rows(found, view):
        errors: dict[str, list[dict]] = {"generated": [], "recorded": [], "standing still": [], "another clip's waypoints": []}
        for number, arrays in enumerate(found):
            later = [found[(number + i) % len(found)] for i in range(1, len(found) + 1)]
            # Of another scene, where there is one: clips of one scene share most of the way.
            other = next((clip for clip in later if clip["scene"] != arrays["scene"]), later[0])["fake true"]
            errors["generated"].append(egomotion.following(arrays["fake read"], arrays["fake true"]))
            errors["recorded"].append(egomotion.following(arrays["real read"], arrays["real true"]))
            errors["standing still"].append(egomotion.following(np.zeros_like(arrays["fake true"]), arrays["fake true"]))
            errors["another clip's waypoints"].append(egomotion.following(arrays["fake read"], other))
        fastest, sharpest = egomotion.FASTEST * 12 / rate, egomotion.SHARPEST * 12 / rate
        true = _stack(found, "fake true")
        outside = float(((true[..., 0] > fastest) | (true[..., 0] < -0.05) | (np.abs(true[..., 2]) > sharpest)).mean())
        path = float(np.mean([e["path_m"] for e in errors["generated"]]))
        return [
            {"score": name} | {key: float(np.mean([e[unit] for e in values])) for key, values in errors.items()}
            | {"path m": path, "share of motion that is not searched": outside, "better": LOWER}
            for name, unit in (("following, ADE m", "ade_m"), ("following, FDE m", "fde_m"), ("following, yaw degrees", "yaw_deg"))
        ]  # fmt: skip

    views = ("multi",) if six else ("front",)
    return Measure("following", of, rows, first, "photometric alignment", "", f"pictures of about {ESTIMATOR_HEIGHT} rows", views)


def reduced(frames) -> np.ndarray:
    """uint8 [t, v, H, W, 3] at `ESTIMATOR_HEIGHT` rows where it has twice as many or more, else as it is (mean over areas)."""
    height, width = frames.shape[2:4]
    if height < 2 * ESTIMATOR_HEIGHT:
        return np.ascontiguousarray(frames)
    size = round(width * ESTIMATOR_HEIGHT / height), ESTIMATOR_HEIGHT
    flat = frames.reshape((-1,) + frames.shape[2:])
    small = np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX)) for picture in flat])
    return small.reshape(frames.shape[:2] + small.shape[1:])
