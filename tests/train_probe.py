"""A training run in a process of its own, to be killed, interrupted, or started several times over as one run of several processes.

`python -m tests.train_probe CONFIG.json [key=value …]`; keys of the section `train`, or HOOK=name for one of `HOOKS`. Exit codes are those of
`mila train`. MILA_COORDINATOR and its companions make it one of several processes.
"""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import ml_collections

from tests.host_devices import host_devices

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("MILA_TEST_CACHE", pathlib.Path.home() / ".cache" / "mila_jax_tests")


def environment(devices: int = 1, **more) -> dict:
    """For a child: CPU with so many devices, compiled programs kept between tests. Of several processes only the first keeps them, so that
    unoptimised machine code, which compiles in half the time, is what is used with several devices."""
    return host_devices(devices, optimized=devices == 1) | {"MILA_CACHE": str(CACHE), "PYTHONUNBUFFERED": "1"} | more


def start(config_file, *arguments, devices: int = 1, **env) -> subprocess.Popen:
    """The run as a child process whose two outputs come as text."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train_probe", str(config_file), *arguments], cwd=ROOT, env=environment(devices, **env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def small_files() -> None:
    """No file may grow beyond 30 kB: every write of a checkpoint fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


def full_disk() -> None:
    """The disk says that it has a kilobyte left."""
    import shutil

    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1000)


def broken_batches() -> None:
    """Latents of batches 4 to 6 are no numbers."""
    import jax
    import numpy as np

    from mila_jax.train.trainer import Trainer

    batches = Trainer.batches

    def with_holes(self, source, first_step):
        for number, batch in enumerate(batches(self, source, first_step), first_step + 1):
            if 4 <= number <= 6:
                with jax.transfer_guard("allow"):
                    batch |= {"latents": batch["latents"] * np.nan}
            yield batch

    Trainer.batches = with_holes


def slow() -> None:
    """A second a step, so that a test can act between two of them."""
    import time

    from mila_jax.train.trainer import Trainer

    batches = Trainer.batches

    def waiting(self, source, first_step):
        for batch in batches(self, source, first_step):
            time.sleep(1.0)
            yield batch

    Trainer.batches = waiting


def early_notice() -> None:
    """The second process is told to leave while it restores, before it has asked for the first time."""
    import time

    from mila_jax.train.checkpoint import Checkpoints

    restore = Checkpoints.restore

    def hooked(self, *args):
        if os.environ["MILA_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)
        return restore(self, *args)

    Checkpoints.restore = hooked


def blind() -> None:
    """The second process can read no checkpoint."""
    from mila_jax.train import checkpoint

    def no_answer(*args):
        raise OSError("no answer")

    checkpoint.PAUSES = (0, 0)
    if os.environ["MILA_PROCESS_ID"] == "1":
        checkpoint.Checkpoints._restore = no_answer


def own_disk() -> None:
    """The folder of checkpoints is another one in each process, under one name."""
    from mila_jax.train.trainer import Trainer

    shared = Trainer.checkpoints.fget
    Trainer.checkpoints = property(lambda self: shared(self) / os.environ["MILA_PROCESS_ID"])


def terminate_at_five() -> None:
    """A notice to leave comes while step 5 is prepared."""
    _at_step_five(signal.SIGTERM)


def interrupt_at_five() -> None:
    """Ctrl-C comes while step 5 is prepared."""
    _at_step_five(signal.SIGINT)


def kill_at_five() -> None:
    """The process dies while step 5 is prepared."""
    _at_step_five(signal.SIGKILL)


def _at_step_five(number: int) -> None:
    from mila_jax.train.trainer import Trainer

    batches = Trainer.batches

    def hooked(self, source, first_step):
        for count, batch in enumerate(batches(self, source, first_step), first_step + 1):
            if count == 5 and first_step < 5:
                os.kill(os.getpid(), number)
            yield batch

    Trainer.batches = hooked


HOOKS = {
    f.__name__: f
    for f in (small_files, full_disk, broken_batches, slow, early_notice, blind, own_disk, terminate_at_five, interrupt_at_five, kill_at_five)
}


def main() -> int:
    from mila_jax import runtime
    from mila_jax.errors import UserError

    runtime.setup()
    config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    for argument in sys.argv[2:]:
        key, value = argument.split("=", 1)
        if key == "HOOK":
            HOOKS[value]()
        else:
            config.train[key] = json.loads(value)
    from mila_jax.parallel import distributed
    from mila_jax.train.loop import train

    try:
        distributed.start(timeout=60)
        return train(config, progress=False).code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
