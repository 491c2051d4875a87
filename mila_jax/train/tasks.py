"""The kinds of windows that a run trains on, from the config's `train` section (the paper's training stages)."""

from data_pipeline.clips import CONDITIONING_FPS, ClipSpec
from mila_jax.errors import UserError


FOUR = 4  # frames of the paper's longer start


def clip_specs(config) -> tuple[list[ClipSpec], list[float]]:
    """The kinds of training windows that there are any of, and their shares.

    For each rate of `train.fps`, below the data's: windows whose conditioning frames lie at the data's rate (`train.conditioning_fps` =
    "video"), at the generated frames' (= "same": the first stage, and later windows of a recurrent coarse stage), or half of each ("both").
    A share `train.single_frame` of the 12 Hz windows has one conditioning frame instead of `window.conditioning`; with
    `train.single_frame_anchors`, of the others as well. A share `train.four_frames` of the windows of every rate has four (the paper
    conditions on one frame or on four). Raises `UserError` naming the key.
    """
    window, train = config.window, config.train
    if len(train.fps) != len(train.fps_weights):
        raise UserError(f"train.fps={tuple(train.fps)} and train.fps_weights={tuple(train.fps_weights)} must have equally many entries")
    for key in ("fps", "fps_weights"):
        if not all(isinstance(x, (int, float)) for x in train[key]):
            raise UserError(f"train.{key}={tuple(train[key])} must be numbers")
    which = train.get("conditioning_fps", "both")
    if which not in ("video", "same", "both"):
        raise UserError(f"train.conditioning_fps={which!r} is unknown; use video, same or both")
    single, four = train.get("single_frame", 0.1), train.get("four_frames", 0.0)
    if not 0 <= single <= 1:
        raise UserError(f"train.single_frame={single} must lie between 0 and 1")
    if not 0 <= four <= 1 - single:
        raise UserError(f"train.four_frames={four} must lie between 0 and 1 - train.single_frame={1 - single:g}")
    if four and not window.conditioning < FOUR < window.frames:
        raise UserError(
            f"train.four_frames={four} needs windows of more than {FOUR} frames with fewer first frames; "
            f"set it to 0 for window.frames={window.frames}, window.conditioning={window.conditioning}"
        )
    specs, shares = [], []
    for fps, share in zip(train.fps, train.fps_weights):
        rates = [CONDITIONING_FPS] if fps >= CONDITIONING_FPS or which == "video" else [fps] if which == "same" else [CONDITIONING_FPS, fps]
        alone = single if window.conditioning > 1 and (fps >= CONDITIONING_FPS or train.get("single_frame_anchors", False)) else 0.0
        for rate in rates:
            specs.append(ClipSpec(window.frames, window.conditioning, fps, rate))
            shares.append((1 - alone - four) * share / len(rates))
            if four:
                specs.append(ClipSpec(window.frames, FOUR, fps, rate))
                shares.append(four * share / len(rates))
        if alone:
            specs.append(ClipSpec(window.frames, 1, fps))
            shares.append(alone * share)
    kept = [i for i, share in enumerate(shares) if share] or range(len(shares))  # what is never trained is not measured either
    return [specs[i] for i in kept], [shares[i] for i in kept]


def task_name(spec: ClipSpec) -> str:
    """A short name of a kind of window, for metrics: `12Hz_from_2`, `2Hz_from_2_at_2Hz`."""
    apart = "" if spec.conditioning == 1 or spec.conditioning_fps == CONDITIONING_FPS else f"_at_{spec.conditioning_fps:g}Hz"
    return f"{spec.fps:g}Hz_from_{spec.conditioning}{apart}"
