"""What is on disk of a nuScenes version: scenes, frames, gaps, missing files, and which clips it allows (`mila prepare --check`)."""

import collections
from collections.abc import Iterable

import numpy as np

from data_pipeline import presets
from data_pipeline.nuscenes.reader import NuScenes
from data_pipeline.nuscenes.splits import VERSION_SPLITS, official_scenes
from data_pipeline.storage import is_remote, join, list_names
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

LONG_GAP_US = 1.5e6 / 12  # half a frame more than one: a frame is missing between


def check_data(nusc: NuScenes) -> dict:
    """The report as plain values.

    scenes, keyframes: by split. frames, long_gaps: by split and camera (a long gap: more than 1.5 frames to the next record).
    keyframe_gaps: CAM_FRONT frames from a keyframe to the next → how often. incomplete: CAM_FRONT frames at which another camera has
    none. missing_scenes: scenes of the official splits that the tables do not have. missing_files: by camera the number and the first
    few. presets: clips and dropped starts of each.
    """
    report: dict = {"root": str(nusc.root), "version": nusc.version, "scenes": {}, "keyframes": {}, "frames": {}, "long_gaps": {}, "incomplete": {}}
    gaps: collections.Counter[int] = collections.Counter()
    known = presets.scenes_of_tables(nusc)
    for scene, frames in zip(nusc.scenes, known):
        split = scene.split
        report["scenes"][split] = report["scenes"].get(split, 0) + 1
        report["keyframes"][split] = report["keyframes"].get(split, 0) + int(frames.key.sum())
        report["incomplete"][split] = report["incomplete"].get(split, 0) + int((~frames.complete).sum())
        gaps.update(np.diff(np.flatnonzero(frames.key)).tolist())
        for name in VIEWS:
            times = scene.tracks[name].timestamps_us
            for table, count in (("frames", len(times)), ("long_gaps", int((np.diff(times) > LONG_GAP_US).sum()))):
                by_camera = report[table].setdefault(split, dict.fromkeys(VIEWS, 0))
                by_camera[name] += count
    report["keyframe_gaps"] = {str(gap): gaps[gap] for gap in sorted(gaps)}
    report["missing_scenes"] = missing_scenes(nusc)
    report["missing_files"] = missing_files(nusc)
    report["presets"] = {}
    for name, preset in presets.PRESETS.items():
        clips, dropped = presets.list_clips(preset, known)
        report["presets"][name] = {
            "rule": preset.rule, "clips": len(clips), "published": preset.published, "dropped": dropped, "sha256": presets.clip_list_hash(clips),
        }  # fmt: skip
    return report


def missing_scenes(nusc: NuScenes) -> list[str]:
    """Scenes of the version's official splits that are not in the tables."""
    wanted = [name for official in VERSION_SPLITS.get(nusc.version, {}) for name in official_scenes(official)]
    return sorted(set(wanted) - {scene.name for scene in nusc.scenes})


def missing_files(nusc: NuScenes) -> dict[str, dict]:
    """By camera the images that the tables name and the disk does not have."""
    out = {}
    for view in VIEWS:
        lost = absent(nusc.root, (name for scene in nusc.scenes for name in scene.tracks[view].files))
        if lost:
            out[view] = {"count": len(lost), "first": lost[:5]}
    return out


def absent(root, names: Iterable[str]) -> list[str]:
    """Those of the files `names` below `root` that are not there; folders are listed once instead of asked a million times."""
    listed: dict[str, set[str]] = {}

    def exists(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in listed:
            listed[folder] = set(list_names(join(root, folder)))
        return file in listed[folder]

    return [name for name in names if not exists(name)]


def check_files(root, names: Iterable[str], what: str) -> None:
    """Raises `UserError` that names the first of `what`'s images that is not there. Those in a bucket are not looked for: listing takes minutes."""
    lost = [] if is_remote(root) else absent(root, dict.fromkeys(names))
    if lost:
        raise UserError(
            f"{join(root, lost[0])} is missing, the first of {len(lost)} images of {what} that are; mila prepare --check counts them by camera"
        )


def is_whole(report: dict) -> bool:
    """Whether nothing that the tables or the official splits name is missing."""
    return not report["missing_files"] and not report["missing_scenes"]


def format_report(report: dict) -> str:
    """The report as text."""
    lines = [f"{report['root']} {report['version']}"]
    for split, scenes in report["scenes"].items():
        frames = ", ".join(f"{camera.removeprefix('CAM_')} {n}" for camera, n in report["frames"][split].items())
        holes = ", ".join(f"{camera.removeprefix('CAM_')} {n}" for camera, n in report["long_gaps"][split].items() if n) or "none"
        lines += [
            f"{split}: {scenes} scenes, {report['keyframes'][split]} keyframes",
            f"  frames            {frames}",
            f"  gaps > 1.5 frames {holes}",
            f"  CAM_FRONT frames at which another camera has none: {report['incomplete'][split]}",
        ]
    lines.append("frames from keyframe to keyframe: " + (", ".join(f"{gap}: {n}" for gap, n in report["keyframe_gaps"].items()) or "none"))
    lost = report["missing_scenes"]
    lines.append(f"scenes of the official splits that are missing: {len(lost) or 'none'}" + (f" ({', '.join(lost[:4])} …)" if lost else ""))
    if report["missing_files"]:
        for camera, found in report["missing_files"].items():
            lines.append(f"missing images of {camera}: {found['count']}, the first {found['first'][0]}")
    else:
        lines.append("missing images: none")
    lines.append("clips:")
    for name, found in report["presets"].items():
        published = f" (published: {found['published']})" if found["published"] and report["version"] == "v1.0-trainval" else ""
        lines.append(f"  {name:18} {found['clips']:6}{published}  {found['rule']}")
        lines += [f"  {'':18} dropped {count}: {reason}" for reason, count in found["dropped"].items()]
    return "\n".join(lines)
