"""A training run in a process of its own, to be killed, interrupted, or started several times over as one run of several processes.

`python -m tests.train_probe CONFIG.json [key=value …] [THEN CONFIG.json …]`; keys of the section `train`, or HOOK=name for one of `HOOKS`. Exit
codes are those of `mila train`. Of runs one after the other, each ends with a line `ENDED code` on stderr. MILA_COORDINATOR and its companions make
it one of several processes.
"""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import ml_collections

from tests.host_devices import host_devices

ROOT = pathlib.Path(__file__).parents[1]
CACHE = os.environ.get("MILA_TEST_CACHE", pathlib.Path.home() / ".cache" / "mila_jax_tests")


def environment(devices: int = 1, **more) -> dict:
    """For a child: CPU with so many devices, compiled programs kept between tests, and machine code that is hardly optimised, which compiles in
    half the time."""
    return host_devices(devices) | {"MILA_CACHE": str(CACHE), "PYTHONUNBUFFERED": "1"} | more


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


def interrupt_at_three() -> None:
    """Ctrl-C comes while step 3 is prepared."""
    _at_step(3, signal.SIGINT)


def terminate_at_five() -> None:
    """A notice to leave comes while step 5 is prepared."""
    _at_step(5, signal.SIGTERM)


def kill_at_seven() -> None:
    """The process dies while step 7 is prepared."""
    _at_step(7, signal.SIGKILL)


def _at_step(step: int, number: int) -> None:
    from mila_jax.train.trainer import Trainer

    batches = Trainer.batches

    def hooked(self, source, first_step):
        for count, batch in enumerate(batches(self, source, first_step), first_step + 1):
            if count == step and first_step < step:
                os.kill(os.getpid(), number)
            yield batch

    Trainer.batches = hooked


HOOKS = {
    f.__name__: f
    for f in (small_files, full_disk, broken_batches, slow, early_notice, blind, own_disk, interrupt_at_three, terminate_at_five, kill_at_seven)
}


@contextlib.contextmanager
def hooks_undone():
    """What hooks replace comes back afterwards."""
    from mila_jax.train import checkpoint
    from mila_jax.train.trainer import Trainer

    places = (Trainer, "batches"), (Trainer, "checkpoints"), (checkpoint.Checkpoints, "restore"), (checkpoint.Checkpoints, "_restore")
    places += (checkpoint, "PAUSES"), (shutil, "disk_usage")
    before = [vars(owner)[name] for owner, name in places]
    try:
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def run(file, *arguments) -> int:
    """One run; its exit code."""
    from mila_jax.errors import UserError
    from mila_jax.train.loop import train

    config = ml_collections.ConfigDict(json.loads(pathlib.Path(file).read_text()))
    with hooks_undone():
        for argument in arguments:
            key, value = argument.split("=", 1)
            if key == "HOOK":
                HOOKS[value]()
            else:
                config.train[key] = json.loads(value)
        try:
            return train(config, progress=False).code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def main() -> int:
    import jax

    from mila_jax import runtime

    runtime.setup()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # children are many, and each needs the same small programs
    from mila_jax.parallel import distributed

    distributed.start(timeout=60)
    runs = [[]]
    for argument in sys.argv[1:]:
        if argument == "THEN":
            runs.append([])
        else:
            runs[-1].append(argument)
    for arguments in runs:
        code = run(*arguments)
        if len(runs) > 1:
            print(f"\nENDED {code}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
