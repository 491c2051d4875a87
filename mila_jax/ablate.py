"""The command `mila ablate`: the paper's ablations (tables 1-6) on held-out clips, with bootstrap intervals.

Every video is made once and its features are kept in a file of its own, so an interrupted run goes on where it stopped. Half of the
val scenes serve to choose α, a and σ_a, the other half to report. Distances are FD-EffNetLite0, not FID or FVD; each direction that
the paper reports is judged by the paired bootstrap interval of the difference over clips.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib

import numpy as np
import tqdm

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index, write_atomically
from mila_jax.choose_model import load_chosen, signature
from mila_jax.decode import deciding, deciding_window, open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate import resample
from mila_jax.evaluate.efficientnet import FeatureExtractor
from mila_jax.evaluate.frechet import NAME
from mila_jax.evaluate.quality import temporal_flickering
from mila_jax.generate import Generator, check_fits, make_plan, window_settings
from mila_jax.generate_command import writable_folder
from mila_jax.prepare import open_codec
from mila_jax.scores import FEATURE_SIZE
from mila_jax.start import from_scene, instants_at
from mila_jax.train.tasks import clip_specs
from mila_jax.trajectory import coasting
from mila_jax.views import view_index

FRONT = view_index("CAM_FRONT")
PICTURES = 12  # instants of each clip that a distance is taken of; the shortest clips have no more
GRID = {"alpha": (0.0, 0.25, 0.5, 0.75), "jdc": ((0.05, 0.3), (0.15, 0.3), (0.15, 0.4), (0.15, 0.6), (0.25, 0.4))}  # jdc: (a, σ_a)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to make a clip. anchors: none, pseudo (of the coarse stage) or true (recorded); given 0: as trained."""

    frames: int = 12
    tpd: bool = True
    anchors: str = "none"
    jdc: bool = False
    waypoints: bool = True
    given: int = 0

    @property
    def strategy(self) -> str:
        """The strategy that it is."""
        return "recurrent" if self.anchors == "none" else "coarse_to_refine" if self.jdc else "divide_and_conquer"


BASE, TPD = Variant(tpd=False), Variant()
TRUE, PSEUDO, CORRECTED = Variant(anchors="true"), Variant(anchors="pseudo"), Variant(anchors="pseudo", jdc=True)


def longer(variant: Variant, frames: int = 24) -> Variant:
    """The same variant with more frames."""
    return dataclasses.replace(variant, frames=frames)


def tables(long: int) -> dict[str, list[tuple[list, Variant]]]:
    """Tables in the paper's layout: title → rows of (leading cells, variant). long: frames of the long videos."""

    def tick(flag):
        return "✓" if flag else ""

    c = CORRECTED
    return {
        "Table 1: conditioning frames (24 frames)": [([f"MiLA ({n}f cond)"], dataclasses.replace(longer(c), given=n)) for n in (1, 4)],
        "Table 2: long videos": [(["recurrent"], longer(TPD, long)), (["divide-and-conquer"], longer(PSEUDO, long)), (["coarse-to-(re)fine"], longer(c, long))],
        "Table 3: progressive denoising": [([tick(v.tpd), f"{f} frames"], longer(v, f)) for f in (12, 24, long) for v in (BASE, TPD)],
        "Table 4: modules": [
            ([tick(v.tpd), {"none": "", "true": "GT", "pseudo": "pseudo"}[v.anchors], tick(v.jdc)], v) for v in (BASE, TPD, TRUE, PSEUDO, CORRECTED)
        ],
        "Table 5: trajectory": [([tick(w), f], dataclasses.replace(TPD, waypoints=w, frames=f)) for f in (12, 24) for w in (False, True)],
        "Table 6: divide-and-conquer and coarse-to-(re)fine": [(["DC"], longer(PSEUDO)), (["CR"], longer(c))],
    }  # fmt: skip


HEADS = {
    "1": ["method"],
    "2": ["method"],
    "3": ["TPD", "generation mode"],
    "4": ["TPD", "anchor frame", "JDC"],
    "5": ["trajectory", "frames"],
    "6": ["strategy"],
}


def directions(long: int) -> list[tuple[str, str, Variant, Variant]]:
    """What the paper reports: (claim, number, variant that is better, variant that is worse)."""
    return [
        ("coarse-to-(re)fine beats recurrent on long videos (table 2)", "multi", longer(CORRECTED, long), longer(TPD, long)),
        ("TPD helps at 12 frames (tables 3, 4)", "multi", TPD, BASE),
        ("TPD helps at 24 frames (table 3)", "multi", longer(TPD), longer(BASE)),
        ("TPD helps on long videos (table 3)", "multi", longer(TPD, long), longer(BASE, long)),
        ("true anchors help (table 4)", "multi", TRUE, TPD),
        ("pseudo anchors without JDC hurt (table 4)", "multi", TPD, PSEUDO),
        ("JDC helps pseudo anchors (table 4)", "multi", CORRECTED, PSEUDO),
        ("pseudo anchors with JDC help (table 4)", "multi", CORRECTED, TPD),
        ("true anchors beat corrected ones (table 4)", "multi", TRUE, CORRECTED),
        ("waypoints help at 24 frames (table 5)", "front", longer(TPD), dataclasses.replace(TPD, waypoints=False, frames=24)),
        ("coarse-to-(re)fine flickers less than divide-and-conquer (table 6)", "flicker", longer(CORRECTED), longer(PSEUDO)),
        ("coarse-to-(re)fine moves more smoothly than divide-and-conquer (table 6)", "smoothness", longer(CORRECTED), longer(PSEUDO)),
        ("1 conditioning frame gives better pictures than 4 (table 1)", "multi", *(dataclasses.replace(longer(CORRECTED), given=n) for n in (1, 4))),
    ]  # fmt: skip


class Bench:
    """Makes and keeps the cells: features and statistics of one clip under one variant."""

    def __init__(self, config, folder: pathlib.Path, extractor):
        self.model, self.config, self.folder, self.extractor = load_chosen(config), config, folder, extractor
        self.decoder = open_decoder(open_codec(config), config)
        check_fits(self.model, self.decoder.codec, config.data.dir)
        self._generators = {}

    def settings(self, variant: Variant, alpha: float, a: float, sigma_a: float):
        """The config that a variant is made with."""
        config = self.config.copy_and_resolve_references()
        trained = self.model.config.window
        if variant.given:  # as many new frames as trained, so anchors keep their rate; 0 is as trained
            other = variant.given != trained.conditioning
            config.generate.conditioning = variant.given if other else 0
            config.generate.window = variant.given + trained.frames - trained.conditioning if other else 0
        config.generate.strategy, config.generate.jdc = variant.strategy, True
        config.window.update(tpd_strength=alpha if variant.tpd else 0.0, anchor_error=a, anchor_level=sigma_a)
        return window_settings(self.model, config)

    def cell(self, variant: Variant, clip: tuple[str, float], alpha: float, a: float, sigma_a: float) -> dict:
        """features [t, 6, d] and statistics of the variant's video of a clip (scene, seconds), made or read."""
        config = self.settings(variant, alpha, a, sigma_a)
        label = [signature(self.model, config.generate), dataclasses.asdict(variant), clip, deciding(config.generate), deciding_window(config.window)]
        path = self.folder / (hashlib.sha256(json.dumps([*label, config.seed], sort_keys=True).encode()).hexdigest()[:20] + ".npz")
        return _kept(path, lambda: self._describe(self._video(variant, clip, config)))

    def recorded(self, clip: tuple[str, float], frames: int) -> dict:
        """The same of the recorded frames, decoded from their latents."""
        tile = [self.config.generate.decode_tile] if self.config.generate.decode_tile else []
        path = self.folder / (hashlib.sha256(json.dumps([self.decoder.codec.sha256, clip, frames, *tile]).encode()).hexdigest()[:20] + ".npz")
        scene = read_scene(self.config.data.dir, clip[0])
        _, after = from_scene(scene, clip[1], 1)
        return _kept(path, lambda: self._describe(scene["latents"][after[:frames]].swapaxes(0, 1)))

    def _video(self, variant: Variant, clip, config) -> np.ndarray:
        scene = read_scene(config.data.dir, clip[0])
        start, after = from_scene(scene, clip[1], config.window.conditioning)
        if not variant.waypoints:
            start = dataclasses.replace(start, trajectory=coasting(start.trajectory), waypoints_known=False)
        anchors = None
        if variant.anchors == "true":
            plan = make_plan(config, variant.frames, config.window.conditioning)
            numbers = instants_at(scene, after, plan.anchor_frames)
            anchors = np.asarray(scene["latents"][numbers], np.float32).swapaxes(0, 1)[None]
        generator = self._generators.setdefault((config.window.frames, config.window.conditioning), Generator(self.model, config)).with_config(config)
        seed = int(hashlib.sha256(repr(clip).encode()).hexdigest()[:6], 16) + config.seed  # the clip's own, the same for all variants
        return generator([start], variant.frames, seed, anchors=anchors)[0].latents[0]

    def _describe(self, latents) -> dict:
        frames = np.stack(list(self.decoder(latents)))
        features = np.asarray(self.extractor(frames.reshape((-1,) + frames.shape[2:])), np.float32)
        features = features.reshape(frames.shape[:2] + (-1,))
        unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-9)
        between = frames[1:-1] - (frames[:-2].astype(np.float32) + frames[2:]) / 2
        return {
            "features": features, "flicker": temporal_flickering(frames), "smoothness": 1 - np.abs(between).mean() / 255,
            "consistency": np.maximum(0, [(unit[1:] * unit[:-1]).sum(-1), (unit[1:] * unit[:1]).sum(-1)]).mean(),
        }  # fmt: skip


def _kept(path: pathlib.Path, make) -> dict:
    if not path.exists():
        partial = path.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.savez(file, **make())
        partial.replace(path)
    with np.load(path, allow_pickle=False) as z:
        return {key: z[key] for key in z.files}


def scores(number: str, cells: list[dict], recorded: list[dict], counts) -> np.ndarray:
    """A number for each draw of clips, counts [draws, clips]: distance of six views (multi) or of the front view, or a mean, negated: lower is better.

    Distances are of `PICTURES` evenly spread instants of each clip, whatever its length: those of unequal counts cannot be compared.
    """
    if number not in ("multi", "front"):
        return -np.asarray(counts) @ np.array([float(c[number]) for c in cells]) / np.sum(counts, -1)
    views = slice(None) if number == "multi" else [FRONT]

    def pictures(clips):
        found = [c["features"][np.linspace(0, len(c["features"]) - 1, PICTURES).round().astype(int)][:, views] for c in clips]
        return np.stack(found).reshape(len(clips), -1, found[0].shape[-1])

    against = resample.AgainstPaired(pictures(cells), pictures(recorded))
    return np.array([against.distance(draw) for draw in counts])


def find_clips(config, clips: int, frames: int, given: int) -> tuple[list, list]:
    """Clips (scene, seconds) to tune on and to report on: val scenes in turn, starts spread over each. Raises `UserError` for too short ones."""
    names = [s.name for s in read_index(config.data.dir).scenes if s.split == "val"]
    if len(names) < 2:
        raise UserError(f"{config.data.dir} has {len(names)} val scenes; at least two are needed, one to tune on and one to report on")
    halves = []
    for scenes in (names[0::2], names[1::2]):
        rounds, found = -(-clips // len(scenes)), []
        for number in range(clips):
            times = read_scene(config.data.dir, scenes[number % len(scenes)])["times"]
            first, last = given, len(times) - 2 - frames
            if last < first:
                raise UserError(
                    f"scene {scenes[number % len(scenes)]!r} has {len(times)} instants, too few for --long ({frames / 12:g} s with its last anchor)"
                )
            found.append((scenes[number % len(scenes)], float(times[round(first + (last - first) * (number // len(scenes)) / max(rounds - 1, 1))])))
        halves.append(found)
    return halves[0], halves[1]


def overlapping(clips: list[tuple[str, float]], seconds: float) -> bool:
    """Whether two clips (scene, start in seconds) so long share frames."""
    ordered = sorted(clips)
    return any(a == b and later - start < seconds for (a, start), (b, later) in zip(ordered, ordered[1:]))


def ablate_command(
    config, out, *, clips: int = 8, long_seconds: float = 4.0, resamples: int = 200, extractor=None, progress: bool = True
) -> pathlib.Path:
    """`mila ablate`: tables.md and ablate.json in `out`; returns the path of the tables."""
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set")
    if clips < 2:
        raise UserError(f"--clips={clips} must be at least 2: intervals are over clips")
    if not 1 <= long_seconds < math.inf:
        raise UserError(f"--long={long_seconds:g} must be at least 1 s")
    long = round(long_seconds * 12)
    out = writable_folder(out)
    (out / "cells").mkdir(exist_ok=True)
    bench = Bench(config, out / "cells", extractor or FeatureExtractor(FEATURE_SIZE))
    new = bench.model.config.window.frames - bench.model.config.window.conditioning
    tuning, testing = find_clips(config, clips, max(long, 24) + new, 6)
    stride = window_settings(bench.model, config).window.anchor_stride
    if stride > TRUE.frames:
        raise UserError(
            f"{TRUE.frames} frames, which the paper's tables have, hold no anchor at generate.anchor_stride={stride}; set at most {TRUE.frames}"
        )
    w = config.window
    best = {"alpha": w.tpd_strength, "a": w.anchor_error, "sigma_a": w.anchor_level}

    def made(variant, where, settings):
        return [bench.cell(variant, clip, **settings) for clip in tqdm.tqdm(where, desc=str(variant.strategy), disable=not progress)]

    tuned = []
    for variant, candidates in ((TPD, [best | {"alpha": x} for x in GRID["alpha"]]), (CORRECTED, None)):
        candidates = candidates or [best | {"a": a, "sigma_a": s} for a, s in GRID["jdc"]]
        real = [bench.recorded(clip, variant.frames) for clip in tuning]
        found = [float(scores("multi", made(variant, tuning, c), real, np.ones((1, clips), int))[0]) for c in candidates]
        tuned += [c | {NAME: value, "strategy": variant.strategy} for c, value in zip(candidates, found)]
        best = candidates[int(np.argmin(found))]

    layout, claims = tables(long), directions(long)
    variants = {v for rows in layout.values() for _, v in rows} | {v for *_, better, worse in claims for v in (better, worse)}
    cells = {v: made(v, testing, best) for v in sorted(variants, key=repr)}
    real = {f: [bench.recorded(clip, f) for clip in testing] for f in {v.frames for v in variants}}
    # The first draw takes every clip once; all variants have the same draws, so differences are paired.
    counts = np.concatenate([np.ones((1, clips), int), resample.draws(clips, resamples, config.seed)])

    @functools.cache
    def measured(variant, number):
        return scores(number, cells[variant], real[variant.frames], counts)

    given = sorted({spec.conditioning for spec in clip_specs(bench.model.config)[0]})
    lines = [
        "# Ablations", "",
        f"{clips} clips of {len({name for name, _ in testing})} held-out scenes; α = {best['alpha']:g}, a = {best['a']:g}, σ_a = {best['sigma_a']:g} "
        f"chosen on {len({name for name, _ in tuning})} other scenes. {NAME} (lower is better; not FID, no FVD) of {PICTURES} instants a clip, 95 % "
        "intervals over clips (Student's t on bootstrap standard errors). "
        f"Conditioning frames that the model was trained with: {', '.join(map(str, given))}.",
    ]  # fmt: skip
    if overlapping(testing, max(long, 24) / 12):
        lines += ["", "Clips of one scene overlap, so that the intervals are too narrow: take fewer --clips, or more or longer val scenes."]
    record = {"made_by": signature(bench.model, config.generate), "settings": best, "tuned": tuned, "clips": testing, "tables": {}, "directions": []}
    for title, rows in layout.items():
        numbers = ["consistency", "smoothness", "flicker"] if title.startswith("Table 6") else ["front", "multi"]
        head = [*HEADS[title[6]], "clips", *(f"{NAME} {n}" if n in ("front", "multi") else n for n in numbers)]
        lines += ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for lead, v in rows:
            texts, kept = [], {}
            for n in numbers:
                sign = 1 if n in ("front", "multi") else -1
                value, *drawn = sign * measured(v, n)
                low, high = map(float, resample.interval(drawn, value, clips))
                texts.append(f"{value:.4g} ({low:.4g} … {high:.4g})")
                kept[n] = [float(value), low, high]
            lines.append("| " + " | ".join(map(str, [*lead, clips, *texts])) + " |")
            record["tables"].setdefault(title, []).append({"row": lead, "variant": dataclasses.asdict(v), **kept})
    lines += [
        "",
        "## Which of the paper's directions hold here",
        "",
        "| claim | measured on | gain (paired 95 % interval) | here |",
        "| --- | --- | --- | --- |",
    ]
    for claim, n, better, worse in claims:
        gain, *drawn = measured(worse, n) - measured(better, n)
        low, high = map(float, resample.interval(drawn, gain, clips))
        verdict = "holds" if low > 0 else "the other way round" if high < 0 else "undecided"
        lines.append(f"| {claim} | {n} | {gain:.4g} ({low:.4g} … {high:.4g}) | {verdict} |")
        record["directions"].append({"claim": claim, "number": n, "gain": float(gain), "low": low, "high": high, "verdict": verdict})
    lines += ["", "Feature consistency and smoothness stand in for the paper's, which need networks that are not here: cosine of features to the frame before "
              "and to the first; 1 − mean |frame − mean of its neighbours| / 255."]  # fmt: skip
    write_atomically(out / "ablate.json", json.dumps(record, indent=1).encode())
    write_atomically(out / "tables.md", ("\n".join(lines) + "\n").encode())
    return out / "tables.md"
