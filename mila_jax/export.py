"""The command `mila export`: generated videos for other people's tools.

`nuscenes`: a nuScenes v1.0 data set, so that detectors and planners (BEVFormer, VAD: the paper's table 7) run on generated video, with the boxes of
the recorded scene where a video follows it (mila_jax/export_nuscenes.py, export_source.py). What was done with each video is in export.json.

`act-bench`: the flat folder that turingmotors/ACT-Bench scores (act_bench/compute_score.py): one mp4 of the front camera for each sample, its
name ending in _ and the number of the sample, 44 frames at 10 Hz after the given ones.
"""

import pathlib
import re
import sys

import numpy as np

from data_pipeline.nuscenes.reader import open_nuscenes
from data_pipeline.simulator import tables
from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate.video import write_view
from mila_jax.export_nuscenes import resized, write_scene
from mila_jax.export_source import NotFollowed, Source, find_source
from mila_jax.generate_command import check_latents, check_single_pictures, read_generated, writable_folder
from mila_jax.prepare import open_codec
from mila_jax.start import FRAME_RATE
from mila_jax.views import view_index

FORMATS = ("nuscenes", "act-bench")
VERSION = "v1.0-mila"
ACT_FRAMES, ACT_RATE = 44, 10.0
FRONT = view_index("CAM_FRONT")


def export_command(config, folders, out, *, format_: str, size: tuple[int, int] | None = None) -> pathlib.Path:
    """`mila export`: folders that `mila generate` made → a data set in `out`; returns its folder.

    size: (height, width) in pixels to which pictures are brought, None: as generated. With `data.nuscenes` set, videos that follow a recorded drive of
    it get that scene's boxes. Raises `UserError` for a folder without a finished video, one made before cameras were stored with it, one of temporal
    latents, a data set without a video's scene, and for ACT-Bench one whose name has no sample number or whose video is too short.
    """
    if format_ not in FORMATS:
        raise UserError(f"--format={format_} is unknown; use one of {', '.join(FORMATS)}")
    videos = [_read(pathlib.Path(folder)) for folder in folders]
    if format_ == "act-bench":
        for video in videos:
            _check_act(video)
        # The scorer reads every .mp4 of its folder and tells them by the number at the end.
        names = [video["folder"].resolve().name for video in videos]
        numbers = [int(re.search(r"\d+$", name)[0]) for name in names]
        twice = sorted({name for name, number in zip(names, numbers) if numbers.count(number) > 1})
        if twice:
            raise UserError(f"{' and '.join(twice)} are of one ACT-Bench sample, by the number at the end; give one of them, or rename a folder")
        for path in sorted(pathlib.Path(out).glob("*.mp4")):
            found = re.search(r"_(\d+)$", path.stem)
            if not found or int(found[1]) in numbers:
                why = "is of a sample to be exported" if found else "ends in no number, at which ACT-Bench's scorer stops"
                raise UserError(f"{path} {why}; choose another --out, or remove it")
    if format_ == "nuscenes" and (pathlib.Path(out) / VERSION / "splits.json").exists():  # written last
        raise UserError(f"{out} holds an exported data set already; choose another --out")
    nusc = None if format_ == "act-bench" or config.data.nuscenes is None else open_nuscenes(config.data.nuscenes, config.data.version)
    sources = [_source(nusc, video) for video in videos] if format_ == "nuscenes" else []
    codec = open_codec(config)
    for video in videos:
        check_latents(video["folder"], video["about"], video, codec)
    out = writable_folder(out)
    decoder = open_decoder(codec, config)
    if format_ == "act-bench":
        for video in videos:
            _act(video, decoder, out, size)
        return out
    partials, told, names = [], [], set()
    for number, (video, source) in enumerate(zip(videos, sources), 1):
        followed = isinstance(source, Source)
        name = source.name if followed and source.name not in names else f"scene-{number:04d}"
        while name in names:  # a scene of that number was followed by another video
            name += "a"
        names.add(name)
        partials.append(write_scene(number, name, video, source if followed else None, decoder, out, size))
        boxes = len(partials[-1]["sample_annotation"])
        told.append({"scene": name, "video": video["folder"].resolve().name, "boxes": boxes, "follows": source.name if followed else None})
        if not followed:
            told[-1]["why_no_boxes"] = source
        print(f"{name}: {video['folder']}, " + (f"{boxes} boxes of {source.name}" if followed else f"no boxes: {source}"), file=sys.stderr)
    tables.write_json(out / "export.json", told)
    tables.assemble(out, VERSION, partials)
    tables.write_json(out / VERSION / "splits.json", {"train": [], "val": [row["name"] for partial in partials for row in partial["scene"]]})
    return out


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of an option such as 900x1600. Raises `UserError`."""
    match = re.fullmatch(r"(\d{2,5})[x×](\d{2,5})", text)
    if not match or min(int(match[1]), int(match[2])) < 16 or max(int(match[1]), int(match[2])) > 65500:
        raise UserError(f"--size={text} must be HEIGHTxWIDTH in pixels, such as 900x1600, of 16 to 65500")
    return int(match[1]), int(match[2])


def _read(folder: pathlib.Path) -> dict:
    """What is known of a video: folder, about (generate.json), latents [v, t, h, w, c], poses [t, 3], intrinsics [v, 4], extrinsics [v, 7]."""
    about, arrays = read_generated(folder)
    missing = {"latents", "poses", "intrinsics", "extrinsics"} - set(arrays)
    if missing:
        raise UserError(f"{folder}/latents.npz lacks {', '.join(sorted(missing))}; generate the video again with this version")
    check_single_pictures(folder, about, "export")
    return {"folder": folder, "about": about, **arrays}


def _source(nusc, video) -> Source | str:
    """The recorded scene that the video follows, or why it has no boxes."""
    if nusc is None:
        return "--config.data.nuscenes names no recorded data set to take them from"
    try:
        return find_source(nusc, video["about"], video["poses"])
    except NotFollowed as reason:
        return str(reason)


def _check_act(video) -> None:
    if not re.search(r"_(\d+)$", video["folder"].resolve().name):
        raise UserError(f"{video['folder']}: its name must end in _ and the number of the ACT-Bench sample, as in left_0123")
    needed = _act_frames()[-1] + 1
    if video["latents"].shape[1] < needed:
        raise UserError(
            f"{video['folder']} holds {video['latents'].shape[1]} frames; ACT-Bench scores {ACT_FRAMES} at 10 Hz, {needed} at 12 Hz: --seconds=4.4"
        )


def _act_frames() -> np.ndarray:
    """The generated frames (0 = the first) nearest to ACT-Bench's times, which are counted from the first."""
    return np.rint(np.arange(ACT_FRAMES) * FRAME_RATE / ACT_RATE).astype(int)


def _act(video, decoder, out, size) -> None:
    chosen = video["latents"][:, _act_frames()]
    frames = (resized(frame[FRONT], size) for frame in decoder(chosen))
    write_view(out / f"{video['folder'].resolve().name}.mp4", frames, ACT_RATE)
