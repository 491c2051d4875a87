"""The command `mila evaluate --preset`: published protocols of FVD and FID on an encoded data set, clip by clip.

Of each finished clip only features are kept, one file each, so memory is of one clip and an interrupted evaluation goes on where it
stopped. Every score stands beside its protocol card and its sanity values. Other scores than Fréchet distances: `preset_measures.py`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tqdm

from data_pipeline.clips import read_scene
from data_pipeline.presets import Clip, clip_list_hash, get_preset, list_clips, scenes_of_encoded
from data_pipeline.records import read_index, write_atomically
from mila_jax.choose_model import load_chosen, signature
from mila_jax.decode import deciding, deciding_window, open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate import i3d, protocol
from mila_jax.evaluate.efficientnet import SMALLEST
from mila_jax.evaluate.networks import Network, open_network
from mila_jax.evaluate.video import write_six_views
from mila_jax.geometry import relative_waypoints
from mila_jax.generate import Generator, check_fits, window_settings
from mila_jax.generate_command import writable_folder
from mila_jax.prepare import open_codec
from mila_jax.preset_measures import FRONT, ClipVideo, Measure, open_measures
from mila_jax.preset_report import write_report
from mila_jax.start import FRAME_RATE, from_scene
from mila_jax.views import VIEWS

SHOWN = 3  # clips whose videos are in the report


def parse_networks(texts, preset=None) -> list[Network]:
    """Networks of options such as `effnet`, `effnet@112`, `i3d`, `i3d:crop=FILE`, `inception=FILE`; all that need no file for None.

    What follows a colon is one of `resize.METHODS` for inception and i3d; without it i3d's is the preset's and inception's the original one.
    """
    found = []
    for text in texts or ("effnet",):
        name, _, path = text.partition("=")
        name, _, size = name.partition("@")
        name, _, method = name.partition(":")
        if size and not (size.isdigit() and int(size) >= SMALLEST):
            raise UserError(f"--network={text}: the input size {size!r} must be a number of pixels, at least {SMALLEST}")
        if size and name != "effnet" or method and name == "effnet":
            raise UserError(f"--network={text}: effnet alone takes an input size (effnet@112), inception and i3d alone a resize (i3d:crop)")
        settings = {"size": int(size)} if size else {}
        if method or name == "i3d" and preset is not None:
            settings["method"] = method or preset.fvd_resize
        found.append(open_network(name, path or None, **settings))
    return found


class RealFrames:
    """Recorded frames uint8 [6, t, H, W, 3]: the images themselves where `data.nuscenes` is set, else what the autoencoder makes of them."""

    def __init__(self, config, decoder):
        self.config, self.decoder, self.scenes = config, decoder, None
        self.described = "decoded from their latents" if config.data.nuscenes is None else "images"
        if config.data.nuscenes is not None:
            from data_pipeline.nuscenes.reader import open_nuscenes

            nusc = open_nuscenes(config.data.nuscenes, config.data.version)
            self.root, self.scenes = nusc.root, {scene.name: scene for scene in nusc.scenes}

    def files(self, name: str, count: int, numbers) -> list[tuple[str, ...]]:
        """The six files of each of these instants of a scene that was encoded with `count` of them."""
        from data_pipeline.nuscenes.reader import instants

        if name not in self.scenes:
            raise UserError(f"data.nuscenes={self.config.data.nuscenes} has no scene {name!r}, which {self.config.data.dir} was encoded from")
        moments = instants(self.scenes[name])
        if len(moments) != count:
            raise UserError(f"data.nuscenes={self.config.data.nuscenes} has {len(moments)} instants of {name!r}, the encoded set {count}")
        return [moments[n].files for n in numbers]

    def check(self, wanted) -> None:
        """Raises `UserError` if an image of `wanted`, (scene's name, its encoded instants, numbers) of each clip, is not there."""
        from data_pipeline.nuscenes.check import check_files

        if self.scenes is not None:
            check_files(self.root, (file for clip in wanted for row in self.files(*clip) for file in row), "the clips")

    def __call__(self, scene: dict, numbers) -> np.ndarray:
        """Frames of these instants of a scene (of `read_scene`). Raises `UserError` where data.nuscenes has no such scene or instant."""
        if self.scenes is None:
            return np.stack(list(self.decoder(scene["latents"][numbers].swapaxes(0, 1))), 1)
        from data_pipeline.nuscenes.reader import load_image

        files = self.files(scene["name"], len(scene["times"]), numbers)
        return np.stack([np.stack([load_image(self.root / row[v], *self.config.data.image_size) for row in files]) for v in range(6)])


@dataclasses.dataclass(frozen=True)
class Span:
    """Frames of a clip that a score is of: `count` from number `first` on; window: seconds, as the option tells them, "" for the whole clip."""

    window: str
    first: int
    count: int


def spans_of(preset, network: Network, windows) -> list[Span]:
    """The whole clip as the preset scores it by this network, and each window of seconds (`protocol.parse_windows`).

    Raises `UserError` for a window that the clip does not hold, or that is too short for FVD's network.
    """
    first = preset.fvd_from if network.clips else preset.fid_from
    out = [Span("", first, preset.frames - first)]
    for start, stop in windows:
        where = protocol.window(preset.frames, preset.conditioning, preset.fps or FRAME_RATE, start, stop, first)
        out.append(Span(f"{start:g}-{stop:g}", *where))
        if network.clips and where[1] < i3d.LEAST_FRAMES:
            raise UserError(
                f"--windows: {out[-1].window} s holds {where[1]} frames of a clip, {network.score} needs {i3d.LEAST_FRAMES}; make it longer"
            )
    return out


class Cell(Mapping):
    """What is kept of one clip: arrays by name, read from the file when they are asked for."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with np.load(path, allow_pickle=False) as z:
            self.names = tuple(z.files)

    def __getitem__(self, key):
        with np.load(self.path, allow_pickle=False) as z:
            return z[key]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def shown_video(out: pathlib.Path, cell: pathlib.Path) -> pathlib.Path:
    """Where the video of a kept clip lies that the report shows: named as what is kept, which depends on everything that made it."""
    return out / f"clip-{cell.stem}.mp4"


class PresetBench:
    """Makes, or reads, what is kept of each clip of a preset. model: the one that `config` names, where it is loaded already."""

    def __init__(self, config, preset, networks: list[Network], folder: pathlib.Path, measures: list[Measure] = (), windows=(), model=None):
        self.preset, self.networks, self.folder, self.measures = preset, networks, folder, measures
        self.spans = [spans_of(preset, network, windows) for network in networks]
        self.views = list(range(len(VIEWS))) if preset.views == "six" else [FRONT]
        self.model = load_chosen(config) if model is None else model
        self.config = window_settings(self.model, config)
        codec = open_codec(config)
        check_fits(self.model, codec, config.data.dir)
        self.decoder = open_decoder(codec, self.config)
        self.config.data.image_size = self.model.data["image_size"]
        self.real, self.generator = RealFrames(self.config, self.decoder), Generator(self.model, self.config)
        self.stamps = {scene.name: np.asarray(scene.timestamps_us) for scene in read_index(config.data.dir).scenes}
        self.front = {scene.name: scene.times_us for scene in scenes_of_encoded(config.data.dir)}

    def seed(self, clip: Clip) -> int:
        """Of the clip and its sample, so that another selection of clips gives the same videos."""
        return int(hashlib.sha256(f"{clip.scene} {clip.timestamp_us} {clip.sample}".encode()).hexdigest()[:6], 16) + self.config.seed

    def instants(self, clip: Clip) -> np.ndarray:
        """Numbers of the clip's frames among the encoded instants of its scene. Raises `UserError` for one that is not there."""
        wanted = self.front[clip.scene][list(clip.frames)]
        found = np.searchsorted(self.stamps[clip.scene], wanted)
        if (found >= len(self.stamps[clip.scene])).any() or (
            self.stamps[clip.scene][np.minimum(found, len(self.stamps[clip.scene]) - 1)] != wanted
        ).any():
            raise UserError(
                f"a frame of the clip at {clip.timestamp_us} of {clip.scene!r} is not in {self.config.data.dir}; prepare the data set again"
            )
        return found

    def check(self, clips) -> None:
        """Raises `UserError` for a frame of a clip, or a recorded image of one, that is not there; nothing is generated."""
        self.real.check([(clip.scene, len(self.stamps[clip.scene]), self.instants(clip)) for clip in clips])

    def video(self, clip: Clip) -> ClipVideo:
        """The generated and the recorded clip; the given frames are the real ones in both."""
        scene, numbers, given = read_scene(self.config.data.dir, clip.scene), self.instants(clip), self.preset.conditioning
        real = self.real(scene, numbers)
        start, _ = from_scene(scene, float(scene["times"][numbers[given - 1]]), min(given, self.config.window.conditioning))
        if self.preset.fps is None:  # the next records, one after the other
            at = np.arange(1, len(numbers) - given + 1)
        else:  # the generated frames nearest to the preset's times
            at = np.rint((np.arange(given, len(numbers)) - given + 1) * FRAME_RATE / self.preset.fps).astype(int)
        latents = self.generator([start], int(at[-1]), self.seed(clip))[0].latents[0]
        made = np.stack(list(self.decoder(latents[:, at - 1])), 1)
        later = numbers[given - 1 :]
        driven = relative_waypoints(scene["ego_translation"][later, FRONT], scene["ego_rotation"][later, FRONT], 0)
        commanded = start.trajectory.at(np.concatenate([[0], at]) / FRAME_RATE)
        fake = np.concatenate([real[:, :given], made], 1)
        return ClipVideo(fake, real, given, commanded, driven, start.intrinsics, start.extrinsics, self.seed(clip))

    def cell(self, clip: Clip, shown: pathlib.Path | None = None) -> Cell:
        """Features and measures of one clip; names: see `_describe`. shown: folder that its video is put into, too (`shown_video`)."""
        label = [
            signature(self.model, self.config.generate), dataclasses.asdict(self.preset), dataclasses.asdict(clip), deciding(self.config.generate),
            deciding_window(self.config.window), self.config.seed,
            [(n.score, n.sha256, n.preprocessing, [dataclasses.asdict(span) for span in spans]) for n, spans in zip(self.networks, self.spans)],
            [(m.key, m.sha256, m.preprocessing, m.first, m.views) for m in self.measures], self.real.described, self.decoder.codec.sha256,
        ]  # fmt: skip
        path = self.folder / (hashlib.sha256(json.dumps(label, sort_keys=True).encode()).hexdigest()[:20] + ".npz")
        if not path.exists() or (shown is not None and not shown_video(shown, path).exists()):
            video = self.video(clip)
            if shown is not None:
                pair = np.concatenate([video.fake, video.real], 3).swapaxes(0, 1)
                write_six_views(shown_video(shown, path), pair, self.preset.fps or FRAME_RATE, scale=max(1.0, 224 / video.real.shape[3]))
            partial = path.with_suffix(".tmp")
            with partial.open("wb") as file:
                np.savez(file, **self._describe(video))
            partial.replace(path)
        return Cell(path)

    def _describe(self, video: ClipVideo) -> dict:
        """Features float32 [v, n, d] as `NUMBER.KIND` (of all frames that are scored) for networks of pictures, as `NUMBER.KIND.WINDOW` for those of
        clips, NUMBER being the network's, KIND fake, real, shuffled or frozen; arrays of measures as `KEY.NAME`."""
        out = {}
        for number, (network, spans) in enumerate(zip(self.networks, self.spans)):
            if not network.clips:
                for kind, frames in (("fake", video.fake), ("real", video.real)):
                    given = frames[self.views][:, spans[0].first :]
                    out[f"{number}.{kind}"] = network(given.reshape((-1,) + given.shape[2:])).reshape(*given.shape[:2], -1)
                continue
            for span in spans:
                fake, real = (frames[self.views][:, span.first : span.first + span.count] for frames in (video.fake, video.real))
                for kind, frames in ({"fake": fake, "real": real} | protocol.disturbed(real, video.seed)).items():
                    out[f"{number}.{kind}.{span.window}"] = network(frames)[:, None]
        for measure in self.measures:
            out |= {f"{measure.key}.{name}": values for name, values in measure.of(video).items()}
        return out

    def features(self, cells, number: int, span: Span, view: str) -> dict[str, protocol.Parts]:
        """By kind, the features [n, d] of each clip."""
        network = self.networks[number]
        rows = [self.views.index(FRONT)] if view == "front" else slice(None)

        def of(kind):
            def load(cell):
                if network.clips:
                    found = cell[f"{number}.{kind}.{span.window}"][rows]
                else:
                    first = span.first - self.spans[number][0].first
                    found = cell[f"{number}.{'real' if kind == 'frozen' else kind}"][rows, first : first + span.count]
                    found = np.repeat(found[:, :1], span.count, 1) if kind == "frozen" else found
                return found.reshape(-1, found.shape[-1])

            return protocol.Parts(load, cells)

        return {kind: of(kind) for kind in ("fake", "real", *(("shuffled",) if network.clips else ()), "frozen")}


def preset_command(
    config, name: str, out, *, networks=None, limit: int = 0, windows: str | None = None, motion: str | None = None, lpips: bool = False,
    dino=None, clip=None, amt=None, progress: bool = True,
) -> pathlib.Path:  # fmt: skip
    """`mila evaluate --preset=NAME`: writes scores.json and report.html to `out`; returns the path of the report.

    networks: see `parse_networks`. limit: so many clips, evenly out of the list, instead of all (the card tells). windows: seconds after the last
    given frame (`protocol.parse_windows`) that are scored by themselves, too. motion, lpips, dino, clip, amt: see `open_measures`. Raises `UserError`
    for a data set without clips of the preset, and before anything is generated for windows, networks and weight files that do not fit.
    """
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set")
    preset = get_preset(name)
    clips, dropped = list_clips(preset, scenes_of_encoded(config.data.dir))
    different = len(distinct(clips))  # recorded videos are scored once, however many samples are generated of each
    if different < 2:
        raise UserError(
            f"{config.data.dir} has {different} clips of {name} ({preset.rule}), two different ones at least are needed; dropped: {dropped or 'none'}"
        )
    if limit:
        if limit < 2:
            raise UserError(f"--clips={limit} must be at least 2 with --preset")
        clips = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(limit, len(clips))).astype(int))]
    seconds = protocol.parse_windows(windows) if windows else []
    model = load_chosen(config)
    measures, left_out = open_measures(preset, motion=motion, lpips=lpips, dino=dino, clip=clip, amt_s=amt, image_size=model.data["image_size"])
    out = writable_folder(out)
    (out / "clips").mkdir(exist_ok=True)
    bench = PresetBench(config, preset, parse_networks(networks, preset), out / "clips", measures, seconds, model)
    bench.check(clips)
    cells = []
    for number, clip_ in enumerate(tqdm.tqdm(clips, desc=name, unit="clip", disable=not progress)):
        cells.append(bench.cell(clip_, out if number < SHOWN else None))
    views = ("front",) if preset.views == "front" else ("multi", "front")
    rows = [
        protocol_row(bench, number, span, view, cells, clips)
        for number in range(len(bench.networks))
        for span in bench.spans[number]
        for view in views
    ]  # fmt: skip
    others = [row for measure in measures for view in views if view in measure.views for row in measure_rows(bench, measure, view, cells, clips)]
    record = {
        "preset": name, "rule": preset.rule, "weights_sha256": bench.model.sha256,
        "made_by": signature(bench.model, bench.config.generate), "dropped": dropped, "scores": rows, "measures": others, "left_out": left_out,
    }  # fmt: skip
    write_atomically(out / "scores.json", json.dumps(record, indent=1).encode())
    for row in rows + others:
        value = f"{row['distance']:.2f}" if "distance" in row else f"{row['generated']:.4f}"
        value += f", recorded {row['recorded']:.4f}" if "recorded" in row else ""
        window = f" {row['card']['window']} s" if row["card"]["window"] else ""
        print(f"{row['card']['score']} {row['card']['views']}{window}: {value}")
        print(protocol.Card(**row["card"]).text())
    for score, why in left_out.items():
        print(f"left out: {score}, {why}")
    return write_report(out, record, [shown_video(out, cell.path) for cell in cells[:SHOWN]])


def _card(bench: PresetBench, clips, view: str, **fields) -> dict:
    preset = bench.preset
    return dataclasses.asdict(
        protocol.Card(
            views=view, given=preset.conditioning, fps=preset.fps or FRAME_RATE, image_size=tuple(bench.config.data.image_size),
            real=bench.real.described, n_real=len(distinct(clips)), n_fake=len(clips), clips=preset.name, clips_sha256=clip_list_hash(clips), seed=bench.config.seed, **fields,
        )
    )  # fmt: skip


def protocol_row(bench: PresetBench, number: int, span: Span, view: str, cells, clips) -> dict:
    """One Fréchet distance with its sanity values and card."""
    network, features = bench.networks[number], bench.features(cells, number, span, view)
    card = _card(
        bench, clips, view, score=network.score, network=network.name, network_sha256=network.sha256, preprocessing=network.preprocessing,
        frames=span.count, first=span.first, window=span.window,
    )  # fmt: skip
    fake, numbers = features.pop("fake"), distinct(clips)
    broken = {name: protocol.chosen(parts, numbers) for name, parts in features.items()}
    return protocol.score(broken.pop("real"), fake, broken, [clips[i].scene for i in numbers]) | {"card": card}


def distinct(clips) -> list[int]:
    """Numbers of the clips whose frames are those of no clip before: a preset may have several samples generated of each."""
    seen = {}
    for number, clip in enumerate(clips):
        seen.setdefault((clip.scene, clip.frames), number)
    return list(seen.values())


def measure_rows(bench: PresetBench, measure: Measure, view: str, cells, clips) -> list[dict]:
    """Rows of a measure, each with its card."""
    prefix = f"{measure.key}."
    found = [{key.removeprefix(prefix): cell[key] for key in cell if key.startswith(prefix)} | {"scene": c.scene} for cell, c in zip(cells, clips)]
    card = functools.partial(
        _card, bench, clips, view, network=measure.network, network_sha256=measure.sha256, preprocessing=measure.preprocessing,
        frames=bench.preset.frames - measure.first, first=measure.first,
    )  # fmt: skip
    rows = measure.rows(found, view)
    return [{key: value for key, value in row.items() if key != "score"} | {"card": card(score=row["score"])} for row in rows]
