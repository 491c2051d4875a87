"""The command `mila evaluate --preset`: published protocols of FVD and FID on an encoded data set, clip by clip; and `mila report`.

Of each finished clip only features are kept, one file each, so memory is of one clip and an interrupted evaluation goes on where it
stopped. Every score stands beside its protocol card and its sanity values.
"""

import dataclasses
import hashlib
import json
import math
import pathlib

import numpy as np
import tqdm

from data_pipeline.clips import read_scene
from data_pipeline.presets import Clip, clip_list_hash, get_preset, list_clips, scenes_of_encoded
from data_pipeline.records import read_index, write_atomically
from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate import protocol
from mila_jax.evaluate.networks import Network, open_network
from mila_jax.evaluate.quality import temporal_flickering
from mila_jax.evaluate.report import Report
from mila_jax.evaluate.video import write_six_views
from mila_jax.generate import Generator, check_fits, find_weights, window_settings
from mila_jax.generate_command import writable_folder
from mila_jax.model.weights import load_model
from mila_jax.prepare import open_codec
from mila_jax.start import FRAME_RATE, from_scene
from mila_jax.views import view_index

FRONT = view_index("CAM_FRONT")
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
        if size and not size.isdigit():
            raise UserError(f"--network={text}: the input size {size!r} is no number")
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

    def __call__(self, scene: dict, numbers) -> np.ndarray:
        """Frames of these instants of a scene (of `read_scene`). Raises `UserError` where data.nuscenes has no such scene or instant."""
        if self.scenes is None:
            return np.stack(list(self.decoder(scene["latents"][numbers].swapaxes(0, 1))), 1)
        from data_pipeline.nuscenes.reader import instants, load_image

        if scene["name"] not in self.scenes:
            raise UserError(f"data.nuscenes={self.config.data.nuscenes} has no scene {scene['name']!r}, which {self.config.data.dir} was encoded from")
        moments = instants(self.scenes[scene["name"]])
        if len(moments) != len(scene["times"]):
            raise UserError(f"data.nuscenes={self.config.data.nuscenes} has {len(moments)} instants of {scene['name']!r}, the encoded set {len(scene['times'])}")
        files = [moments[n].files for n in numbers]
        return np.stack([np.stack([load_image(self.root / row[v], *self.config.data.image_size) for row in files]) for v in range(6)])


class PresetBench:
    """Makes, or reads, what is kept of each clip of a preset."""

    def __init__(self, config, preset, networks: list[Network], folder: pathlib.Path):
        self.preset, self.networks, self.folder = preset, networks, folder
        self.model = load_model(find_weights(config))
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
        if (found >= len(self.stamps[clip.scene])).any() or (self.stamps[clip.scene][np.minimum(found, len(self.stamps[clip.scene]) - 1)] != wanted).any():
            raise UserError(f"a frame of the clip at {clip.timestamp_us} of {clip.scene!r} is not in {self.config.data.dir}; prepare the data set again")
        return found

    def video(self, clip: Clip):
        """(generated, real) frames uint8 [6, t, H, W, 3] of a clip; the given frames are the real ones in both."""
        scene, numbers, given = read_scene(self.config.data.dir, clip.scene), self.instants(clip), self.preset.conditioning
        real = self.real(scene, numbers)
        start, _ = from_scene(scene, float(scene["times"][numbers[given - 1]]), min(given, self.config.window.conditioning))
        if self.preset.fps is None:  # the next records, one after the other
            at = np.arange(1, len(numbers) - given + 1)
        else:  # the generated frames nearest to the preset's times
            at = np.rint((np.arange(given, len(numbers)) - given + 1) * FRAME_RATE / self.preset.fps).astype(int)
        latents = self.generator([start], int(at[-1]), self.seed(clip))[0].latents[0]
        made = np.stack(list(self.decoder(latents[:, at - 1])), 1)
        return np.concatenate([real[:, :given], made], 1), real

    def cell(self, clip: Clip, shown: pathlib.Path | None = None) -> dict:
        """Features and flicker of one clip; a name for each network, kind (fake, real, shuffled, frozen): float32 [6, n, d]."""
        g = self.config.generate
        how = {k: v for k, v in g.to_dict().items() if k != "weights" and not k.startswith("decode_")}
        label = [
            self.model.sha256, dataclasses.asdict(self.preset), dataclasses.asdict(clip), how, json.loads(self.config.window.to_json()), self.config.seed,
            [(n.score, n.sha256, n.preprocessing) for n in self.networks], self.real.described, self.decoder.codec.sha256,
        ]  # fmt: skip
        path = self.folder / (hashlib.sha256(json.dumps(label, sort_keys=True).encode()).hexdigest()[:20] + ".npz")
        if not path.exists() or (shown is not None and not shown.exists()):
            fake, real = self.video(clip)
            if shown is not None:
                write_six_views(shown, np.concatenate([fake, real], 3).swapaxes(0, 1), self.preset.fps or FRAME_RATE, scale=max(1.0, 224 / real.shape[3]))
            partial = path.with_suffix(".tmp")
            with partial.open("wb") as file:
                np.savez(file, **self._describe(fake, real, self.seed(clip)))
            partial.replace(path)
        with np.load(path, allow_pickle=False) as z:
            return {key: z[key] for key in z.files}

    def _describe(self, fake, real, seed: int) -> dict:
        out = {}
        for network in self.networks:
            first = self.preset.fvd_from if network.clips else self.preset.fid_from
            kinds = {"fake": fake[:, first:], "real": real[:, first:]}
            if network.clips:
                kinds |= protocol.disturbed(real[:, first:], seed)
            else:
                kinds["frozen"] = np.repeat(real[:, first : first + 1], real.shape[1] - first, 1)
            for kind, frames in kinds.items():
                given = frames if network.clips else frames.reshape((-1,) + frames.shape[2:])
                features = network(given)
                out[f"{network.score}.{kind}"] = features.reshape(6, -1, features.shape[-1])
        for kind, frames in (("fake", fake), ("real", real)):
            out[f"flickering.{kind}"] = np.asarray(temporal_flickering(frames.swapaxes(0, 1)))
        return out


def preset_command(config, name: str, out, *, networks=None, limit: int = 0, progress: bool = True) -> pathlib.Path:
    """`mila evaluate --preset=NAME`: writes scores.json and report.html to `out`; returns the path of the report.

    networks: see `parse_networks`. limit: so many clips, evenly out of the list, instead of all (the card tells). Raises `UserError` for a
    data set without clips of the preset.
    """
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set")
    preset = get_preset(name)
    clips, dropped = list_clips(preset, scenes_of_encoded(config.data.dir))
    if len(clips) < 2:
        raise UserError(f"{config.data.dir} has {len(clips)} clips of {name} ({preset.rule}), two at least are needed; dropped: {dropped or 'none'}")
    if limit:
        if limit < 2:
            raise UserError(f"--clips={limit} must be at least 2 with --preset")
        clips = [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, min(limit, len(clips))).astype(int))]
    out = writable_folder(out)
    (out / "clips").mkdir(exist_ok=True)
    bench = PresetBench(config, preset, parse_networks(networks, preset), out / "clips")
    cells = []
    for number, clip in enumerate(tqdm.tqdm(clips, desc=name, unit="clip", disable=not progress)):
        cells.append(bench.cell(clip, out / f"clip{number}.mp4" if number < SHOWN else None))
    views = ("front",) if preset.views == "front" else ("multi", "front")
    rows = [_row(bench, network, view, cells, clips) for network in bench.networks for view in views]
    flickering = {kind: float(np.mean([c[f"flickering.{kind}"] for c in cells])) for kind in ("fake", "real")}
    record = {"preset": name, "rule": preset.rule, "weights_sha256": bench.model.sha256, "dropped": dropped, "scores": rows, "temporal_flickering": flickering}
    write_atomically(out / "scores.json", json.dumps(record, indent=1).encode())
    for row in rows:
        print(f"{row['card']['score']} {row['card']['views']}: {row['distance']:.2f}")
        print(protocol.Card(**row["card"]).text())
    return _write_report(out, record, min(SHOWN, len(clips)))


def _row(bench: PresetBench, network: Network, view: str, cells, clips) -> dict:
    preset, rows = bench.preset, slice(None) if view == "multi" else slice(FRONT, FRONT + 1)

    def features(kind):
        return [cell[f"{network.score}.{kind}"][rows].reshape(-1, cell[f"{network.score}.{kind}"].shape[-1]) for cell in cells]

    broken = {kind: features(kind) for kind in ("shuffled", "frozen") if f"{network.score}.{kind}" in cells[0]}
    first = preset.fvd_from if network.clips else preset.fid_from
    card = protocol.Card(
        score=network.score, network=network.name, network_sha256=network.sha256, preprocessing=network.preprocessing, views=view,
        frames=preset.frames - first, first=first, given=preset.conditioning, fps=preset.fps or FRAME_RATE, image_size=tuple(bench.config.data.image_size),
        real=bench.real.described, n_real=len(cells), n_fake=len(cells), clips=preset.name, clips_sha256=clip_list_hash(clips), seed=bench.config.seed,
    )  # fmt: skip
    return protocol.score(features("real"), features("fake"), broken) | {"card": dataclasses.asdict(card)}


def _write_report(out: pathlib.Path, record: dict, shown: int) -> pathlib.Path:
    report = Report(f"Scores, {record['preset']}")
    report.add_text(f"{record['rule']}. Weights {record['weights_sha256'][:12]}. Clips that could not be had: {record['dropped'] or 'none'}.")
    columns = list(dict.fromkeys(key for row in record["scores"] for key in row if key != "card"))
    table = [{"score": r["card"]["score"], "views": r["card"]["views"], **{key: r.get(key, "") for key in columns}} for r in record["scores"]]
    report.add_table(table, caption="Distances, lower is better; beside them what halves of the real clips and broken real clips have")
    report.add_text("Temporal flickering as in VBench (higher is calmer; a still picture has 1): " + ", ".join(f"{k} {v:.4f}" for k, v in record["temporal_flickering"].items()))
    for row in record["scores"]:
        report.add_code(protocol.Card(**row["card"]).text(), "Protocol")
    for number in range(shown):
        report.add_video(out / f"clip{number}.mp4", "Generated (left half of each picture) and recorded (right half).")
    return report.write(out / "report.html")


def report_command(first, second, out=None) -> str:
    """`mila report A B`: two folders of `mila evaluate --preset`, score by score; returns the text, and writes it to `out` as a page.

    Scores whose protocol cards differ are shown apart, with what differs: they cannot be compared. Raises `UserError` for a folder without scores.
    """
    records = []
    for folder in (first, second):
        path = pathlib.Path(folder) / "scores.json"
        try:
            records.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not there or not readable ({error}); mila evaluate --preset=NAME --out={folder} writes it") from None
    lines, table = [], []
    a, b = ({(r["card"]["score"], r["card"]["views"]): r for r in record["scores"]} for record in records)
    for key in sorted(a.keys() | b.keys()):
        if key not in a or key not in b:
            lines.append(f"{key[0]} {key[1]}: only in {first if key in a else second}")
            continue
        different = protocol.Card(**a[key]["card"]).differences(protocol.Card(**b[key]["card"]))
        values = a[key]["distance"], b[key]["distance"]
        text = f"{key[0]} {key[1]}: {values[0]:.2f} and {values[1]:.2f}"
        if different:
            text += f"; NOT comparable, the protocols differ in {', '.join(different)}"
        else:
            text += f", {'first' if values[0] < values[1] else 'second'} is better by {abs(values[0] - values[1]):.2f}" if not math.isclose(*values) else ", equal"
            text += f" (halves of the real clips: {a[key].get('real halves', math.nan):.2f})"
        lines.append(text)
        table.append({"score": key[0], "views": key[1], str(first): values[0], str(second): values[1], "comparable": "no: " + ", ".join(different) if different else "yes"})
    if out:
        report = Report("Two evaluations")
        report.add_table(table, caption="Distances, lower is better")
        for line in lines:
            report.add_text(line)
        report.write(pathlib.Path(out))
    return "\n".join(lines)
