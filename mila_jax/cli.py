"""The command `mila`: `mila COMMAND [options] [--config=FILE] [--config.KEY=VALUE …]`.

Each command is a thin layer over a function of the package. Imports are inside the commands, so that `--help`, `doctor` and
errors in the arguments answer at once.
"""

import argparse
import os
import sys

from mila_jax.errors import UserError

DEFAULT = "configs/tiny.py"

EXAMPLES = """examples:
  mila demo                                            the whole job on simulated streets, ends with a report
  mila simulate --out=DIR                              a simulated data set in nuScenes' format
  mila prepare --config.data.nuscenes=DIR --config.data.dir=DIR     images and texts to latents and tokens
  mila train --config.data.dir=DIR --config.train.dir=DIR
  mila generate --data=DIR --scene=scene-0008 --seconds=8 --out=DIR
  mila generate --frames=FOLDER --waypoints=left --text="Rain, turn left" --seconds=8 --out=DIR
  mila evaluate --config.data.dir=DIR --out=FILE
  mila drift VIDEO_DIR … --config.data.dir=DIR --out=DIR
  mila plan --config=configs/default.py --topology=v5p:4x4x4        memory and modelled speed on a TPU slice, without one
  mila doctor                                          what is installed, what is missing and how to get it

Every setting of the config can be changed: --config.train.steps=100 (configs/default.py lists them all).
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of the command."""

    def error(self, message):
        """Prints the mistake and leaves with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mila", description="MiLA, a six-view driving-video world model in JAX.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, help_, config=DEFAULT):
        sub = commands.add_parser(name, help=help_, description=help_, allow_abbrev=False)
        sub.add_argument("--config", default=config, metavar="FILE", help=f"settings (default {config})")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    demo = command("demo", "the main job on the embedded default: simulate, encode, (train,) generate, report", "configs/demo.py")
    demo.add_argument("--out", default="runs/demo", metavar="DIR")
    demo.add_argument("--fresh", action="store_true", help="start over instead of reusing what is finished")
    demo.add_argument("--train", action="store_true", help="train a model from random weights first, instead of using the shipped one")
    demo.add_argument("--seconds", type=float, default=60.0, help="length of the generated video")
    simulate = command("simulate", "write a simulated data set in nuScenes' format")
    simulate.add_argument("--out", required=True, metavar="DIR")
    prepare = command("prepare", "encode a nuScenes data set (config.data.nuscenes) into latents and tokens (config.data.dir)")
    prepare.add_argument("--check", action="store_true", help="encode nothing: report frames, gaps, missing files and clips of each preset")
    prepare.add_argument("--out", metavar="FILE", help="with --check: write the report as JSON, too")
    prepare.add_argument("--part", metavar="I/N", help="encode part I of N; whoever ends last writes the index")
    prepare.add_argument("--beam", metavar="OPTIONS", help="run as an Apache Beam pipeline with these options")
    from mila_jax.data_commands import add_clips_arguments

    add_clips_arguments(command("clips", "the clips that published scores are computed on, by preset"))
    command("train", "train on an encoded data set; goes on where an earlier run in config.train.dir stopped")
    generate = command("generate", "generate a six-view video")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR", help="encoded data set; first frames, cameras and text come from --scene")
    source.add_argument("--frames", metavar="DIR", help="folder of first frames of the reference rig: CAM_FRONT/*.jpg or CAM_FRONT*.jpg, and so on")
    generate.add_argument("--scene", metavar="NAME")
    generate.add_argument("--start", type=float, help="seconds into the scene of the last given frame (default 1)")
    generate.add_argument("--waypoints", default=None, metavar="W", help="scene, a .csv or .json file, straight, left, right, stop, or none")
    generate.add_argument("--speed", type=float, default=None, help="m/s at the start of a named manoeuvre (default: as recorded, 8 with --frames)")
    generate.add_argument("--text", default=None, help="scene description")
    generate.add_argument("--seconds", type=float, default=8.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--out", required=True, metavar="DIR")
    generate.add_argument("--explain", action="store_true", help="print and draw (DIR/schedule.png) the windows and noise levels, generate nothing")
    generate.add_argument("--per-view", action="store_true", help="one mp4 for each camera as well")
    evaluate = command("evaluate", "FD-EffNetLite0 of generated against recorded video, and with data.nuscenes the autoencoder's PSNR")
    evaluate.add_argument(
        "--out", default=None, metavar="PATH", help="write the scores to this JSON file; with --preset a folder, which gets a report"
    )
    evaluate.add_argument(
        "--clips", type=int, default=None, help="held-out clips to generate (4; with --preset all of its list, or so many evenly out of it)"
    )
    evaluate.add_argument("--seconds", type=float, default=2.0, help="length of each")
    evaluate.add_argument("--preset", metavar="NAME", help="clips and frames of a published protocol (mila clips lists them)")
    evaluate.add_argument(
        "--network", action="append", metavar="N", help="with --preset, again for more: effnet, i3d (FVD), i3d=FILE, inception=FILE (FID)"
    )
    evaluate.add_argument("--windows", metavar="W", help="with --preset: score these seconds by themselves, too: 0-4,4-8,8-12")
    evaluate.add_argument(
        "--motion",
        nargs="?",
        const="all",
        metavar="CAMERAS",
        help="with --preset: read the car's motion from the videos (front or all cameras; slow)",
    )
    evaluate.add_argument("--lpips", action="store_true", help="LPIPS of generated against recorded frames; without --preset, of the autoencoder")
    evaluate.add_argument("--dino", metavar="FILE", help="with --preset: DINO ViT-B/16's weights, for VBench's subject consistency")
    evaluate.add_argument("--clip", metavar="FILE", help="with --preset: CLIP ViT-B/32's weights, for VBench's background consistency")
    evaluate.add_argument("--amt", metavar="FILE", help="with --preset: AMT-S's weights (amt-s.pth), for VBench's motion smoothness")
    export = command("export", "generated videos as a nuScenes data set, or as the folder that ACT-Bench scores")
    export.add_argument("videos", nargs="+", metavar="DIR", help="folders that mila generate made")
    export.add_argument("--format", required=True, metavar="F", help="nuscenes or act-bench")
    export.add_argument("--size", metavar="HxW", help="enlarge pictures, 900x1600 is nuScenes' own size")
    export.add_argument("--out", required=True, metavar="DIR")
    report = command("report", "compare two folders of mila evaluate --preset, score by score")
    report.add_argument("folders", nargs=2, metavar="DIR")
    report.add_argument("--out", metavar="FILE", help="write an HTML page, too")
    drift = command("drift", "curves of how generated videos change from second to second, beside recorded ones (config.data.dir)")
    drift.add_argument("videos", nargs="+", metavar="DIR", help="folders that mila generate made; videos of one strategy are one curve")
    drift.add_argument("--out", required=True, metavar="DIR")
    drift.add_argument("--motion", action="store_true", help="read the car's motion from the videos, too, and compare it with the waypoints (slow)")
    ablate = command("ablate", "the paper's ablations on the val scenes of config.data.dir, with bootstrap intervals; goes on where it stopped")
    ablate.add_argument("--out", required=True, metavar="DIR")
    ablate.add_argument("--clips", type=int, default=8, help="held-out clips of each of the two halves, to tune and to report on")
    ablate.add_argument("--long", type=float, default=4.0, help="seconds of the long videos")
    from mila_jax.parallel.aot.options import add_arguments

    add_arguments(command("plan", "compile the real step for a TPU slice ahead of time: memory, FLOPs, collectives, modelled utilisation"))
    command("doctor", "versions, devices, memory, what is missing and how to get it")
    return parser


def _run(options, config) -> int:
    from mila_jax.runtime import setup

    setup()
    progress = not options.quiet
    if options.command == "demo":
        from mila_jax.demo import demo

        print(demo(config, options.out, fresh=options.fresh, train_first=options.train, seconds=options.seconds, progress=progress))
    elif options.command == "simulate":
        from mila_jax.prepare import simulate_from_config

        simulate_from_config(config, options.out, progress=progress)
        print(options.out)
    elif options.command == "prepare" and options.check:
        from mila_jax.data_commands import check_command

        return check_command(config, out=options.out)
    elif options.command == "clips":
        from mila_jax.data_commands import clips_command

        return clips_command(config, options)
    elif options.command == "prepare":
        from mila_jax.parallel.distributed import start
        from mila_jax.prepare import prepare

        if options.part is None and options.beam is None:  # each machine of a slice then has a part of its own
            start(config.distributed.initialize, shutdown=86_400)  # whose part is small waits for the others before it may end
        missing = prepare(config, progress=progress, part=options.part, beam=options.beam)
        print(f"{len(missing)} scenes are left to other parts, from {missing[0]} on" if missing else config.data.dir)
    elif options.command == "train":
        from mila_jax.parallel.distributed import first, start
        from mila_jax.train.loop import train

        start(config.distributed.initialize)
        outcome = train(config, progress=progress)
        if outcome.code:
            return outcome.code
        if first():
            print(f"{outcome.step} steps; {'finished' if outcome.finished else 'stopped by train.minutes; run again to go on'}")
            print(outcome.model)
    elif options.command == "generate":
        from mila_jax.generate_command import generate_command

        print(generate_command(config, options, progress=progress))
    elif options.command == "drift":
        from mila_jax.drift_command import drift_command

        print(drift_command(config, options.videos, options.out, motion=options.motion))
    elif options.command == "ablate":
        from mila_jax.ablate import ablate_command

        print(ablate_command(config, options.out, clips=options.clips, long_seconds=options.long, progress=progress))
    elif options.command == "export":
        from mila_jax.export import export_command, parse_size

        size = parse_size(options.size) if options.size else None
        print(export_command(config, options.videos, options.out, format_=options.format, size=size))
    elif options.command == "report":
        from mila_jax.preset_report import report_command

        print(report_command(*options.folders, options.out))
    elif options.command == "evaluate" and options.preset:
        from mila_jax.preset_scores import preset_command

        if not options.out:
            raise UserError("--out is not set; mila evaluate --preset wants a folder for scores and report")
        if options.clips == 0:
            raise UserError("--clips=0 must be at least 2 with --preset; without it all clips are scored")
        chosen = {key: getattr(options, key) for key in ("windows", "motion", "lpips", "dino", "clip", "amt")}
        print(preset_command(config, options.preset, options.out, networks=options.network, limit=options.clips or 0, progress=progress, **chosen))
    elif options.command == "evaluate":
        from mila_jax.scores import evaluate_command

        for key in ("network", "windows", "motion", "dino", "clip", "amt"):
            if getattr(options, key):
                raise UserError(f"--{key} goes with --preset=NAME (mila clips lists them)")
        clips = 4 if options.clips is None else options.clips
        evaluate_command(config, clips=clips, seconds=options.seconds, out=options.out, lpips=options.lpips, progress=progress)
    return 0


def main(argv=None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake that the user can put right, 75 when a training run was told to leave and has
    saved (start it again), 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    unknown = [argument for argument in rest if not (argument.startswith("--config.") and "=" in argument)]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; settings are written --config.KEY=VALUE")
    try:
        if options.command == "doctor":  # before anything that may be missing is imported
            from mila_jax import doctor

            return doctor.main()
        if options.command == "plan":  # the step is compiled in a process of its own: no accelerator is touched here
            from mila_jax.parallel.aot.command import plan_command

            return plan_command(options, rest)
        from mila_jax.config import load_config

        return _run(options, load_config(options.config, rest))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush has somewhere to go
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished work is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
