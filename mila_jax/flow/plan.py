"""The plan of a long video: which frames each window holds, in NumPy, before anything is computed (paper 3.2).

Frames are numbered at the video's rate, 0 = the last given frame; numbers ≤ 0 are given, 1 … F are generated. Stages:

- bootstrap (only if fewer first frames are given than a window conditions on): one window [given, noise …] at the video's rate;
  what it generates is the start of the video.
- coarse (strategies with anchors): windows [N conditioning frames, S = T − N anchors, M frames apart]. Later coarse windows
  condition on the last N frames of the one before, which are anchors: their times, M frames apart, are in the plan.
- refine: windows [last N frames of the video, T − N new frames]. Where M is a multiple of T − N, the last new frame of every
  M/(T − N)-th window is an anchor: noisy and corrected (coarse_to_refine) or kept as it is (divide_and_conquer). The other windows
  (all of them without anchors, recurrent) are plain continuation. Where T − N is a multiple of M, every window ends in an anchor, each
  (T − N)/M-th coarse frame; those between are anchors, too (`inner_anchors`, ours), or only carry the coarse stage on, at a rate that long
  windows are trained at.

Coarse-to-(re)fine thus is the recurrent strategy plus an anchor at the end of each window; a corrected anchor is part of the
video and the last conditioning frame of the next window.
"""

import dataclasses

import numpy as np

from mila_jax.chunks import Chunks, check_window
from mila_jax.errors import UserError

STRATEGIES = ("recurrent", "divide_and_conquer", "coarse_to_refine")


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """All windows of one stage, of one shape.

    `indices [W, T]`: frame numbers; `clean [T]` bool: frames not denoised (kept anchors included) in windows with an anchor, or in all
    if there are none; `conditioning`: clean first frames; `anchor`: position of the noisy tail anchor or None; `kept_anchor`: position
    of a tail anchor that stays as it is, or None; `fps`: rate of the generated frames (what the network's fps input is told);
    `video_fps`: rate that `indices` count in; `every`: each so-many-th window has the anchor; `stride`: each so-many-th coarse frame
    is that one; `inner`: positions of the coarse frames before it where these are anchors, too, noisy or kept as it is. `chunks`: frames are a
    temporal autoencoder's latents, of which `before` lie between the first of a chunk and frame 0.
    """

    indices: np.ndarray
    clean: np.ndarray
    conditioning: int
    anchor: int | None
    kept_anchor: int | None
    fps: float
    video_fps: float
    every: int = 1
    stride: int = 1
    chunks: Chunks | None = None
    before: int = 0
    inner: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of windows W."""
        return len(self.indices)

    @property
    def anchored(self) -> np.ndarray:
        """`[W]` bool: windows that end in an anchor."""
        has = self.anchor is not None or self.kept_anchor is not None
        return has & ((np.arange(self.count) + 1) % self.every == 0)

    @property
    def slots(self) -> np.ndarray:
        """`[W]`: which coarse frame each window ends in, 0 for windows without an anchor."""
        return np.where(self.anchored, np.cumsum(self.anchored) * self.stride - 1, 0)

    @property
    def places(self) -> tuple[int, ...]:
        """Positions of the anchors of a window that ends in one, noisy or kept."""
        tail = self.kept_anchor if self.anchor is None else self.anchor
        return () if tail is None else (*self.inner, tail)

    @property
    def noisy_places(self) -> tuple[int, ...]:
        """Those of anchors to be corrected."""
        return () if self.anchor is None else self.places

    @property
    def steps_back(self) -> np.ndarray:
        """How many coarse frames before the one in `slots` each of `places` is."""
        return np.arange(len(self.places))[::-1]

    @property
    def plain(self) -> "Windows":
        """The same windows without anchors."""
        clean = np.arange(len(self.clean)) < self.conditioning
        return dataclasses.replace(self, clean=clean, anchor=None, kept_anchor=None, every=1, inner=())

    @property
    def clean_mask(self) -> np.ndarray:
        """`[W, T]` bool: frames of each window that are not denoised."""
        return np.where(self.anchored[:, None], self.clean, self.plain.clean)

    @property
    def reference(self) -> np.ndarray:
        """`[W]`: number of each window's last conditioning frame; waypoints are relative to the ego pose there."""
        return self.indices[:, self.conditioning - 1]

    @property
    def times(self) -> np.ndarray:
        """`[W, T]` seconds after the last given frame (float64)."""
        return self._seconds(self.indices)

    @property
    def reference_times(self) -> np.ndarray:
        """`[W]` seconds of `reference` after the last given frame (float64)."""
        return self._seconds(self.reference)

    @property
    def frame_times(self) -> np.ndarray:
        """`[W, T]` seconds relative to each window's reference, as in training clips (float64)."""
        return self._seconds(self.indices, self.reference[:, None])

    def _seconds(self, number, reference=0):
        if self.chunks is None:
            return (number - reference) / self.video_fps
        return self.chunks.seconds(number + self.before, reference + self.before)


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutPlan:
    """What `rollout` will do. `frames` F, `window` T, `conditioning` N, `anchor_stride` M, `given` G; stages as `Windows` or None."""

    strategy: str
    frames: int
    fps: float
    window: int
    conditioning: int
    anchor_stride: int
    given: int
    bootstrap: Windows | None
    coarse: Windows | None
    refine: Windows | None

    @property
    def stages(self) -> dict[str, Windows]:
        """The stages that have windows, in order, by name: bootstrap, coarse, refine."""
        named = {"bootstrap": self.bootstrap, "coarse": self.coarse, "refine": self.refine}
        return {name: windows for name, windows in named.items() if windows is not None}

    @property
    def horizon(self) -> float:
        """Seconds after the last given frame of the last frame in any window: conditions (waypoints, cameras) must reach this far.

        It may exceed the video: windows have one shape, what is generated beyond frame F is cut.
        """
        return max(float(windows.times.max()) for windows in self.stages.values())

    @property
    def anchors(self) -> int:
        """Number of anchors used (0 without)."""
        return len(self.anchor_frames)

    @property
    def anchor_frames(self) -> np.ndarray:
        """`[A]` numbers of the frames that anchors are (those of the last window may lie beyond F)."""
        return np.zeros(0, int) if self.refine is None else self.refine.indices[self.refine.anchored][:, self.refine.places].reshape(-1)

    @property
    def anchor_slots(self) -> np.ndarray:
        """`[A]` which coarse frames those are."""
        w = self.refine
        return np.zeros(0, int) if w is None else (w.slots[w.anchored][:, None] - w.steps_back).reshape(-1)

    @property
    def windows(self) -> int:
        """Number of windows of all stages."""
        return sum(stage.count for stage in self.stages.values())


def plan_rollout(
    frames: int,
    *,
    fps: float = 12.0,
    window: int,
    conditioning: int,
    anchor_stride: int | None = None,
    strategy: str = "coarse_to_refine",
    given: int | None = None,
    chunks: Chunks | None = None,
    inner_anchors: bool = False,
) -> RolloutPlan:
    """Plans a video of `frames` generated frames at `fps` per view.

    `window` T frames; `conditioning` N clean ones at its head; `anchor_stride` M frames between coarse frames, a multiple of T − N (the
    default) or a divisor of it; `given` number of first frames there are (default N; more than N is fine, the last N are used). `frames` need not be a multiple
    of anything. `chunks`: frames are latents of a temporal autoencoder, 12 Hz video in chunks; the first given one begins a chunk. `inner_anchors`:
    of several coarse frames in a window all are anchors, not the last alone. Raises UserError, naming the key, for sizes that do not fit.
    """
    anchor_stride = window - conditioning if anchor_stride is None else anchor_stride
    given = conditioning if given is None else given
    _check(frames, fps, window, conditioning, anchor_stride, strategy, given, inner_anchors)
    if chunks is not None:
        _check_chunks(chunks, window, conditioning, given, None if strategy == "recurrent" else anchor_stride)
        sizes = dict(window=window, conditioning=conditioning, anchor_stride=anchor_stride, inner_anchors=inner_anchors)
        plain = plan_rollout(frames, fps=fps, strategy=strategy, given=given, **sizes)
        named = {name: _in_chunks(getattr(plain, name), chunks, given - 1) for name in ("bootstrap", "coarse", "refine")}
        return dataclasses.replace(plain, **named)
    bootstrap, start = None, 0  # start: number of the last frame that exists before the refine stage
    if given < conditioning:
        bootstrap = _consecutive(np.array([0]), window, given, fps)
        start = window - given
    step = window - conditioning
    count = max(0, -(-(frames - start) // step))
    if count == 0:
        return RolloutPlan(strategy, frames, fps, window, conditioning, anchor_stride, given, bootstrap, None, None)
    refine = _consecutive(start + step * np.arange(count), window, conditioning, fps)
    coarse, every, stride = None, max(anchor_stride // step, 1), max(step // max(anchor_stride, 1), 1)
    if strategy != "recurrent" and count >= every:
        tail = window - 1
        inner = tuple(range(tail - (stride - 1) * anchor_stride, tail, anchor_stride)) if inner_anchors else ()
        refine = dataclasses.replace(refine, every=every, stride=stride, inner=inner)
        if strategy == "coarse_to_refine":
            refine = dataclasses.replace(refine, anchor=tail)
        else:
            refine = dataclasses.replace(refine, kept_anchor=tail, clean=refine.clean | np.isin(np.arange(window), (*inner, tail)))
        coarse = _coarse(start, count // every * stride, window, conditioning, anchor_stride, fps)
    return RolloutPlan(strategy, frames, fps, window, conditioning, anchor_stride, given, bootstrap, coarse, refine)


def _consecutive(references, window: int, conditioning: int, fps: float) -> Windows:
    """Windows of consecutive frames whose last conditioning frames are `references [W]`."""
    offsets = np.arange(window) - (conditioning - 1)
    return Windows(np.asarray(references)[:, None] + offsets, np.arange(window) < conditioning, conditioning, None, None, fps, fps)


def _coarse(start: int, frames: int, window: int, conditioning: int, stride: int, fps: float) -> Windows:
    """Coarse windows that give at least so many `frames` after frame `start`, `stride` frames of the video apart."""
    step = window - conditioning
    count = -(-frames // step)
    row = [*range(start - conditioning + 1, start + 1), *(start + stride * (1 + np.arange(count * step)))]
    indices = np.stack([row[number * step : number * step + window] for number in range(count)])
    return Windows(indices, np.arange(window) < conditioning, conditioning, None, None, fps / stride, fps)


def _in_chunks(windows: Windows | None, chunks: Chunks, before: int) -> Windows | None:
    """The same windows of latents that lie in chunks."""
    if windows is None:
        return None
    stride = round(windows.video_fps / windows.fps)
    return dataclasses.replace(windows, chunks=chunks, before=before, fps=chunks.rate(stride))


def _check_chunks(chunks: Chunks, window: int, conditioning: int, given: int, anchor_stride: int | None) -> None:
    """Raises UserError unless every window begins with the first latent of a chunk, and coarse ones have one of each, as in training."""
    check_window(chunks, window, conditioning)
    if conditioning % chunks.latents or given != 1 and given % chunks.latents:
        raise UserError(
            f"windows of latents in chunks of {chunks.latents} go on from whole chunks: generate.conditioning={conditioning} must be a multiple of it, "
            f"the number of given latents ({given}) too, or 1"
        )
    if anchor_stride is not None and anchor_stride % chunks.latents:
        raise UserError(f"generate.anchor_stride={anchor_stride} must be a multiple of the {chunks.latents} latents of a chunk")


def fits(anchor_stride: int, new: int, chunks: Chunks | None = None) -> bool:
    """Whether windows of so many new frames can end in coarse frames so many frames apart: one is a multiple of the other. With latents in
    chunks, coarse ones are also whole chunks apart."""
    whole = chunks is None or anchor_stride % chunks.latents == 0
    return anchor_stride > 0 and new > 0 and whole and (anchor_stride % new == 0 or new % anchor_stride == 0)


def _check(frames, fps, window, conditioning, anchor_stride, strategy, given, inner_anchors) -> None:
    """Raises UserError for the first thing in a plan's sizes that cannot work."""
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if frames < 1:
        raise UserError(f"frames must be at least 1, got {frames}: ask for a longer video")
    if not fps > 0:
        raise UserError(f"fps must be positive, got {fps}")
    if conditioning < 1:
        raise UserError(f"conditioning must be at least 1 frame, got {conditioning}")
    if window <= conditioning:
        raise UserError(f"window ({window} frames) must be longer than its conditioning ({conditioning} frames)")
    if given < 1:
        raise UserError("at least one first frame per view must be given")
    if strategy == "recurrent":
        return
    new = window - conditioning
    if not fits(anchor_stride, new):
        raise UserError(
            f"anchor_stride ({anchor_stride}) must be a multiple or a divisor of the new frames of a window, window ({window}) - conditioning "
            f"({conditioning}), for strategy {strategy}: set generate.anchor_stride={new}, or generate.strategy=recurrent"
        )
    if strategy == "divide_and_conquer" and (new < 2 or inner_anchors and anchor_stride == 1):
        raise UserError(
            "divide_and_conquer keeps every anchor, so a window needs at least 2 new frames: with anchor_stride = 1 nothing is left to generate"
        )
