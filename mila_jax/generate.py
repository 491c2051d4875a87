"""Long six-view videos: from `Start`s to latents."""

import copy
import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from mila_jax.choose_model import unlike
from mila_jax.chunks import Chunks, chunks_of
from mila_jax.decode import decode_frames  # noqa: F401 (a part of this module's interface)
from mila_jax.errors import UserError
from mila_jax.flow.plan import RolloutPlan, Windows, fits, plan_rollout
from mila_jax.flow.rollout import Rollout, Rows, SamplerOptions, State, Tables, collect, make_rows, make_tables, pad_rows, start_state, unmerge
from mila_jax.flow.timeshift import shift_ratio
from mila_jax.model.conditions import Conditions
from mila_jax.model.weights import WorldModel
from mila_jax.prepare import describe_data
from mila_jax.rollout_program import Layout, Network, Parameters, RolloutProgram, evaluations, generation_mesh, generation_rules
from mila_jax.start import FRAME_RATE, Start
from mila_jax.views import VIEWS


def sampler_options(model: WorldModel, config) -> SamplerOptions:
    """How windows are denoised: the config's `window` and `generate` sections. generate.shift = 0 is Open-Sora's rule."""
    w, g = config.window, config.generate
    shift = g.shift if g.shift else float(shift_ratio(*model.data["image_size"], w.frames))
    return SamplerOptions(
        steps=g.steps,
        family=w.tpd_family,
        alpha=w.tpd_strength,
        a=w.anchor_error,
        sigma_a=w.anchor_level,
        shift=shift,
        temperature=g.temperature,
        context_level=g.get("context_level", 0.0),
    )


def make_plan(config, frames: int, given: int, chunks: Chunks | None = None) -> RolloutPlan:
    """The rollout of `frames` frames at 12 Hz (or latents in chunks) after `given` first ones."""
    w, g = config.window, config.generate
    strategy = "divide_and_conquer" if g.strategy == "coarse_to_refine" and not g.jdc else g.strategy
    return plan_rollout(
        frames, fps=FRAME_RATE, window=w.frames, conditioning=w.conditioning, anchor_stride=w.anchor_stride, strategy=strategy, given=given, chunks=chunks,
        inner_anchors=w.get("inner_anchors", False),
    )  # fmt: skip


class WindowConditions(NamedTuple):
    """What the network is told of each window: `waypoints [W, b, t, 3]`, `frame_times [W, b, t]`, `fps [W, b]` (see `Conditions`)."""

    waypoints: np.ndarray
    frame_times: np.ndarray
    fps: np.ndarray


def stage_conditions(start: list[Start], windows: Windows) -> WindowConditions:
    """Conditions of all windows of a stage for a batch of starts."""
    count, frames = windows.indices.shape
    b = len(start)
    waypoints = np.stack([s.trajectory.waypoints(windows.times, windows.reference_times) for s in start], 1)
    return WindowConditions(
        waypoints=waypoints,
        frame_times=np.broadcast_to(windows.frame_times[:, None], (count, b, frames)).astype(np.float32),
        fps=np.full((count, b), windows.fps, np.float32),
    )


def shared_conditions(start: list[Start], frames: int) -> Conditions:
    """What is the same in all windows of `frames` frames (text, cameras); the fields of `WindowConditions` are zeros of one window's shape."""
    b, v = len(start), len(VIEWS)
    return Conditions(
        text=np.stack([s.text for s in start]),
        text_mask=np.stack([s.text_mask for s in start]),
        waypoints=np.zeros((b, frames, 3), np.float32),
        intrinsics=np.stack([np.broadcast_to(s.intrinsics[:, None], (v, frames, 4)) for s in start]),
        extrinsics=np.stack([np.broadcast_to(s.extrinsics[:, None], (v, frames, 7)) for s in start]),
        frame_times=np.zeros((b, frames), np.float32),
        fps=np.zeros((b,), np.float32),
        drop_text=np.zeros((b,), bool),
        drop_waypoints=np.array([not s.waypoints_known for s in start]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Videos to be made together: their plan, and what goes into the program, as host arrays. `anchors [b, v, A, h, w, c]` if they are given,
    else None; `key`: the bits of a random key."""

    plan: RolloutPlan
    rows: Rows
    tables: Tables
    shared: Conditions
    first: np.ndarray
    anchors: np.ndarray | None
    key: np.ndarray

    @property
    def windows(self) -> int:
        """Number of windows to denoise."""
        return len(self.rows.kind)


def _network(model: WorldModel) -> Network:
    """A model with its guide, but for their parameters."""
    return Network(model.graphdef, model.dit, model.prior, None if model.guide is None else _network(model.guide))


class Generator:
    """A model with its sampler, on the mesh of the config. One program serves all lengths, strategies, schedules and anchor settings; another
    number of steps, frames of a window, samples or windows a call, or other guidance, is another program.

    videos: how many are to be made together, which the mesh is laid out for; devices: of the mesh, default all. `model` has the parameters as
    the mesh wants them. Raises `UserError` before anything is compiled for sizes that the mesh does not divide.
    """

    def __init__(self, model: WorldModel, config, *, videos: int = 1, devices=None):
        self.config, self.options = config, sampler_options(model, config)
        samples = evaluations(config.generate, videos)
        mesh = generation_mesh(config.mesh, samples, devices)
        guide = model.guide if config.generate.get("guidance_model", 1.0) != 1 else None
        layout = Layout(mesh, generation_rules(config, model.dit, mesh, samples, config.window.frames, tokens_of_view(model)), videos)
        if guide is not None:
            generation_rules(config, guide.dit, mesh, samples, config.window.frames, tokens_of_view(guide), whose="the guide's ")
        params = Parameters(model.params, None if guide is None else guide.params)
        shardings = layout.parameters(params)
        self.params = layout.put(params, shardings)
        if guide is not None:
            guide = dataclasses.replace(guide, params=self.params.guide)
        self.model = dataclasses.replace(model, params=self.params.model, guide=guide)
        self._program = RolloutProgram(_network(self.model), config.generate, layout, shardings)

    @property
    def layout(self) -> Layout:
        """The mesh, and what lies where."""
        return self._program.layout

    def with_config(self, config) -> "Generator":
        """The same model and programs with other settings, which must change neither guidance nor mesh."""
        keys = ("guidance_text", "guidance_waypoints", "guidance_batched", "guidance_model")
        if any(config.generate.get(key) != self.config.generate.get(key) for key in keys) or config.mesh != self.config.mesh:
            raise ValueError("other guidance, or another mesh, is another program: make a new Generator")
        other = copy.copy(self)
        other.config, other.options = config, sampler_options(self.model, config)
        return other

    def job(self, start: list[Start], frames: int, seed: int = 0, *, anchors=None) -> Job:
        """What makes `frames` frames after the given ones of each start; all must have equally many given frames.

        anchors [b, v, A, h, w, c]: in place of those of the coarse stage. Raises `UserError` for first frames of another size, and for a number
        of starts that the mesh does not divide.
        """
        check_first_frames(start, (len(VIEWS), *self.model.data["latent_shape"]))
        self.layout.check_videos(len(start))
        plan = make_plan(self.config, frames, start[0].first_latents.shape[1], chunks_of(self.model.data))
        conditions = {stage: stage_conditions(start, windows) for stage, windows in plan.stages.items()}
        rows = make_rows(plan, conditions, skip_coarse=anchors is not None)
        first = np.stack([s.first_latents for s in start])
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return Job(plan, rows, make_tables(plan, self.options), shared_conditions(start, plan.window), first, anchors, key)

    def state(self, job: Job) -> State:
        """The state before a job's first window; a new one each time, since the program takes it over."""
        return self.layout.put(start_state(job.first, job.plan, job.anchors), self.layout.state)

    def arguments(self, job: Job, first: int, count: int, capacity: int, state: State):
        """Arguments of the program for `count` windows from number `first` on, with room for `capacity`."""
        rows = pad_rows(jax.tree.map(lambda leaf: leaf[first : first + count], job.rows), capacity)
        return self.params, state, rows, job.tables, job.shared, job.key, np.int32(count)

    def lower(self, job: Job, windows: int | None = None):
        """The program that makes the first `windows` windows (None: all) in one call, lowered: for its compile time and memory."""
        windows = windows or job.windows
        return self._program.lower(*self.arguments(job, 0, windows, windows, self.state(job)))

    def __call__(self, start: list[Start], frames: int, seed: int = 0, *, anchors=None) -> tuple[Rollout, RolloutPlan]:
        """Latents [b, v, frames, h, w, c] (normalised) as NumPy, and the plan; see `job`. One call of one program.

        The same seed gives the same video. Room for windows is a power of two, so that other lengths can use the program.
        """
        job = self.job(start, frames, seed, anchors=anchors)
        capacity = 1 << (job.windows - 1).bit_length()
        _, windows = self._program(*self.arguments(job, 0, job.windows, capacity, self.state(job)))
        return collect(job.plan, self._fetch(windows, job.windows), anchors), job.plan

    def stream(self, job: Job, finished=()):
        """Yields the windows of a job one after the other as they are ready, NumPy [b, v, t, h, w, c]; together the bits of `__call__`.

        The device works on the next `generate.windows_per_call` windows while the caller has these. `finished`: first windows of an
        interrupted run, in order; they are passed on, and generation goes on behind them.
        """
        state, number, pending = self.state(job), 0, None
        for number, window in enumerate(finished, 1):
            state = self._program.after(state, jax.tree.map(lambda leaf: leaf[number - 1], job.rows), window)
            yield window
        size = self.config.generate.windows_per_call
        while number < job.windows or pending is not None:
            ready, pending = pending, None
            if number < job.windows:
                count = min(size, job.windows - number)
                state, windows = self._program(*self.arguments(job, number, count, size, state))
                number, pending = number + count, (windows, count)
            if ready is not None:
                yield from self._fetch(*ready)

    def _fetch(self, windows, count: int) -> np.ndarray:
        """The first `count` windows that the program made, [count, b, v, t, h, w, c]."""
        return unmerge(self.layout.fetch(windows)[:count], self.model.data["latent_shape"])


def tokens_of_view(model: WorldModel) -> int:
    """Patches of one view of one frame."""
    rows, columns, _ = model.data["latent_shape"]
    return -(-rows // model.dit.patch[1]) * -(-columns // model.dit.patch[2])


def check_first_frames(start: list[Start], shape) -> None:
    """Raises `UserError` where first latents are not of `shape` (views, rows, columns, channels)."""
    for s in start:
        found = s.first_latents.shape[:1] + s.first_latents.shape[2:]
        if found != shape:
            raise UserError(
                f"first_latents of {found} (views, rows, columns, channels) do not fit the model's {shape}; give first frames of its size"
            )


def check_fits(model: WorldModel, codec, data_dir=None, video=None) -> None:
    """Raises `UserError` if the autoencoder (`video`: the temporal one, or None), or the encoded data set in `data_dir`, is not of the kind that
    the model was trained on."""
    trained, kind = model.data.get("temporal", "none"), "none" if video is None else video.kind
    if video is None and trained != "none":
        raise UserError(
            f"the model was trained on temporal latents, autoencoder.temporal={trained}: mila prepare, train, generate and plan know them (set it, and "
            "autoencoder.temporal_path), other commands do not"
        )
    if trained != kind or video is not None and model.data["temporal_sha256"] != video.sha256:
        raise UserError(
            f"the model was trained on latents of autoencoder.temporal={trained}, not of these weights with {kind}; set autoencoder.temporal and "
            "autoencoder.temporal_path to it"
        )
    if model.data.get("autoencoder_sha256") != codec.sha256:
        raise UserError("the model was trained on latents of another autoencoder; set autoencoder.path to that one's file")
    if data_dir is not None:
        check_data(model, data_dir)


def check_data(model: WorldModel, data_dir) -> None:
    """Raises `UserError` if the encoded data set is not of the kind that the model was trained on."""
    data = describe_data(data_dir)
    remedies = {
        "autoencoder_sha256": "prepare it with that autoencoder (autoencoder.path)",
        "latent_shape": "prepare it at that size (data.image_size)",
        "temporal": "prepare it with that autoencoder.temporal",
        "temporal_sha256": "prepare it with that temporal autoencoder (autoencoder.temporal_path)",
        "text_encoder": "prepare it with that text encoder (text.encoder; mila doctor says how to install one)",
        "text_shape": "prepare it with that text.length",
        "text_sha256": "prepare it with those weights of the text encoder (text.path)",
    }
    if key := unlike(data, model.data):
        raise UserError(f"{data_dir} has {key} {data.get(key)}, the model was trained with {model.data.get(key)}; {remedies[key]}")


def window_settings(model: WorldModel, config):
    """The config with the sizes of the window that the model was trained on, and over them those that `generate` asks for.

    Raises `UserError` naming the key for a value of `generate` that cannot be.
    """
    config = config.copy_and_resolve_references()
    g, w = config.generate, config.window
    for key in ("frames", "conditioning", "anchor_stride"):
        w[key] = model.config.window[key]
    for key in ("window", "conditioning", "anchor_stride"):
        if g[key] < 0:
            raise UserError(f"generate.{key}={g[key]} must be positive, or 0 for what the model was trained with")
    if g.windows_per_call < 1:
        raise UserError(f"generate.windows_per_call={g.windows_per_call} must be at least 1")
    for key in ("guidance_text", "guidance_waypoints", "guidance_model"):
        if not 0 <= g.get(key, 1.0) < math.inf:
            raise UserError(f"generate.{key}={g[key]:g} must be a number from 0 on; 1 is none")
    w.frames, w.conditioning = g.window or w.frames, g.conditioning or w.conditioning
    new = w.frames - w.conditioning
    w.anchor_stride = g.anchor_stride or (w.anchor_stride if fits(w.anchor_stride, new, chunks_of(model.data)) else new)
    trained, wanted = model.config.window.get("inner_anchors", False), g.get("inner_anchors")  # older models' files do not say
    w.inner_anchors = trained if wanted is None else wanted
    if wanted and g.strategy != "recurrent" and (w.anchor_stride >= new or new % w.anchor_stride):
        raise UserError(
            f"generate.inner_anchors=True needs several coarse frames in the {new} new frames of a window, not one every {w.anchor_stride}; "
            f"set generate.anchor_stride to a smaller divisor of {new}, or generate.conditioning"
        )
    return config
