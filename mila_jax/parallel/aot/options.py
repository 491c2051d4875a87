"""Options of `mila plan`. Apart from the command itself, so that `mila --help` imports nothing large."""

import argparse

from mila_jax.parallel.aot.chips import CHIPS

STEPS = ("train", "sample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mila plan`."""
    parser.add_argument(
        "--topology",
        action="append",
        required=True,
        metavar="T",
        help=f"slice to plan for, such as v5p:4x4x4, or 2xv5p:4x4x4 for two; again for more ({', '.join(CHIPS)})",
    )
    parser.add_argument("--step", choices=STEPS, default="train", help="the training step, or one denoising step of the sampler")
    parser.add_argument("--sweep", metavar="S", help="settings to cross: 'mesh.context=1,4;model.remat=none,block'")
    parser.add_argument(
        "--full", action="store_true", help="wait for the whole compilation (minutes): the compiler's cycle estimates and exact peak memory"
    )
    parser.add_argument("--table", action="store_true", help="print how every parameter is split, and compile nothing")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the results as a page")
    parser.add_argument("--no-cache", action="store_true", help="compile again even if nothing has changed")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="give a compilation up after so long")
