"""The commands about data that compile nothing: `mila prepare --check`, `mila clips`."""

import json
import pathlib
import sys

from mila_jax.errors import UserError


def add_clips_arguments(parser) -> None:
    """Options of `mila clips`."""
    parser.add_argument("--preset", metavar="NAME", help="list its clips; without it the presets and their rules are listed")
    parser.add_argument("--data", metavar="DIR", help="encoded data set; else the tables of config.data.nuscenes")
    parser.add_argument("--out", metavar="FILE", help="write the list there as JSON instead")


def open_config_nuscenes(config):
    """The nuScenes data set that the config names. `UserError` when none is set."""
    from data_pipeline.nuscenes.reader import open_nuscenes

    if config.data.nuscenes is None:
        raise UserError("data.nuscenes is not set; give --config.data.nuscenes=FOLDER (and --config.data.version=v1.0-trainval)")
    return open_nuscenes(config.data.nuscenes, config.data.version)


def check_command(config, *, out=None) -> int:
    """`mila prepare --check`: prints the report, writes it as JSON to `out`; exit code 1 when files or scenes are missing."""
    from data_pipeline.nuscenes.check import check_data, format_report, is_whole

    report = check_data(open_config_nuscenes(config))
    print(format_report(report))
    if out:
        write_json(out, report)
    return 0 if is_whole(report) else 1


def clips_command(config, options) -> int:
    """`mila clips`: the presets, or the clips of one. Text to the terminal, JSON to `--out`.

    Exit code 1 when the tables name images for the clips that are not on the disk, where others are: the list is that of the tables all the same.
    """
    from data_pipeline import presets

    if not options.preset:
        for name, preset in presets.PRESETS.items():
            print(f"{name:18} {preset.rule}\n{'':18} {preset.source}")
        return 0
    preset = presets.get_preset(options.preset)
    nusc = None if options.data else open_config_nuscenes(config)
    scenes = presets.scenes_of_encoded(options.data) if nusc is None else presets.scenes_of_tables(nusc, preset.split)
    clips, dropped = presets.list_clips(preset, scenes)
    if not clips:
        why = "; ".join(f"{count}: {reason}" for reason, count in dropped.items()) or f"no scene of split {preset.split!r}"
        raise UserError(f"{options.data or config.data.nuscenes} has no clip of preset {preset.name} ({why}); mila prepare --check says more")
    summary = {"preset": preset.name, "rule": preset.rule, "source": preset.source, "clips": len(clips), "dropped": dropped}
    summary["sha256"] = presets.clip_list_hash(clips)
    if options.out:
        rows = [
            {"scene": c.scene, "sample": c.sample, "sample_token": c.sample_token, "timestamp_us": c.timestamp_us, "frames": list(c.frames)}
            for c in clips
        ]
        write_json(options.out, summary | {"list": rows})
        print(options.out)
        return tell_missing(nusc, preset, clips)
    print(f"# {preset.name}: {preset.rule}\n# {len(clips)} clips, sha256 {summary['sha256'][:16]}…; dropped {dropped or 'none'}")
    print("# scene, sample, first frame, last frame, time of the first (µs), its sample token")
    for clip in clips:
        print(clip.scene, clip.sample, clip.frames[0], clip.frames[-1], clip.timestamp_us, clip.sample_token or "-")
    return tell_missing(nusc, preset, clips)


def tell_missing(nusc, preset, clips) -> int:
    """Says on stderr which images of the clips are missing, where there are any images at all; exit code."""
    from data_pipeline.nuscenes.check import absent
    from data_pipeline.nuscenes.reader import REFERENCE, complete_moments
    from data_pipeline.storage import is_remote, join
    from mila_jax.views import VIEWS

    if nusc is None or is_remote(nusc.root):
        return 0
    scenes, wanted = {scene.name: scene for scene in nusc.scenes}, set()
    for name in {clip.scene for clip in clips}:
        chosen, _ = complete_moments(scenes[name])
        frames = sorted({frame for clip in clips if clip.scene == name for frame in clip.frames})
        for column, view in enumerate(VIEWS):
            if preset.views == "six" or view == REFERENCE:
                files = scenes[name].tracks[view].files
                wanted |= {files[n] for n in chosen[frames, column]}
    lost = absent(nusc.root, sorted(wanted))
    if not lost or len(lost) == len(wanted):  # tables alone are enough for a list
        return 0
    first = join(nusc.root, lost[0])
    print(f"error: {len(lost)} of the clips' {len(wanted)} images are missing, the first is {first}; mila prepare --check says more", file=sys.stderr)
    return 1


def write_json(path, value) -> None:
    """Writes a JSON file, all of it or nothing. `UserError` when the folder cannot be written."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another file") from None
