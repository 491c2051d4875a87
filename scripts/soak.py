#!/usr/bin/env python3
"""A training run of two processes that is killed and told to leave at random moments, also while it saves, against an undisturbed one.

    .venv/bin/python scripts/soak.py                       about a quarter of an hour on two cores; ends with a summary
    .venv/bin/python scripts/soak.py --events=40 --seed=3  other moments
    .venv/bin/python scripts/soak.py --data=DIR            on an encoded data set of your own

Both runs are `mila train` on CPU devices. Whatever happens to the second, parameters, average and moments of its last checkpoint must be those
of the first bit for bit; otherwise the exit code is 1. Nothing is asserted about time.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KINDS = ("terminate one", "kill one", "kill both", "kill one while saving", "kill both while saving", "terminate one while saving")
PREEMPTED = 75


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--events", type=int, default=24, help="kills and notices before the run is left alone")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="gives up after so long")
    parser.add_argument("--kinds", default="", help="only events whose kind contains this, such as terminate")
    parser.add_argument("--reuse", action="store_true", help="take the undisturbed run that an earlier call with the same settings left")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "soak")
    parser.add_argument("--data", type=pathlib.Path, default=None)
    return parser.parse_args()


def prepare(out: pathlib.Path) -> pathlib.Path:
    """A small simulated and encoded data set; kept."""
    data = out / "encoded"
    common = ["--config.simulate.scenes=3", "--config.simulate.seconds=6.0", "--config.simulate.seed=5", f"--config.data.nuscenes={out / 'nuscenes'}"]
    for command in (["simulate", f"--out={out / 'nuscenes'}"], ["prepare", f"--config.data.dir={data}"]):
        subprocess.run(
            [sys.executable, "-m", "mila_jax", *command, *common, "--quiet"], check=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
    return data


class Run:
    """Two processes of `mila train` in one folder, started again and again."""

    def __init__(self, folder: pathlib.Path, options, data: pathlib.Path):
        self.folder, self.options, self.data = folder, options, data
        self.processes, self.starts, self.began = [], 0, 0.0
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = (folder.parent / f"{folder.name}.log").open("w")

    def start(self) -> None:
        """Both processes."""
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        settings = [
            f"data.dir={self.data}", f"train.dir={self.folder}", f"train.steps={self.options.steps}", "train.batch=8", "train.checkpoint_every=20",
            "train.log_every=5", "train.eval_every=0", "train.keep=3", "model.width=32", "model.depth=1", "model.heads=2", "model.precondition=none",
            "model.ray_rotary=False", f"mesh.data={2 * self.options.devices}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "mila_jax", "train", "--quiet", *(f"--config.{s}" for s in settings)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.options.devices}"}
        env |= {"MILA_COORDINATOR": f"localhost:{port}", "MILA_PROCESS_COUNT": "2", "PYTHONFAULTHANDLER": "1"}
        self.processes = [
            subprocess.Popen(command, cwd=ROOT, env=env | {"MILA_PROCESS_ID": str(i)}, stdout=self.log, stderr=subprocess.STDOUT) for i in range(2)
        ]
        self.starts, self.began = self.starts + 1, time.time()

    def alive(self) -> bool:
        """Whether both still run."""
        return all(p.poll() is None for p in self.processes)

    def step(self) -> int:
        """The last step in the metrics."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return json.loads(line)["step"]
            except ValueError:
                continue
        return 0

    def saving(self) -> bool:
        """Whether an unfinished checkpoint lies there that is younger than this start."""
        for path in self.folder.glob("checkpoints/*.orbax-checkpoint-tmp"):
            try:
                if path.stat().st_mtime > self.began:  # older ones are what an earlier kill left
                    return True
            except OSError:  # finished in the meantime
                continue
        return False

    def saved(self) -> int:
        """Step of the newest finished checkpoint."""
        return max((int(p.name) for p in self.folder.glob("checkpoints/*") if p.name.isdigit()), default=0)

    def wait(self, seconds: float, told: bool = False) -> list[int]:
        """Exit codes; what is left after `seconds` (a process whose partner was killed) is killed, as whoever runs a pod would. told: both
        were told to leave, so that one that is left has to say where it stands."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        for p in self.processes:
            if told and p.poll() is None:
                p.send_signal(signal.SIGABRT)
                time.sleep(3)
            if p.poll() is None:
                p.kill()
        return [p.wait() for p in self.processes]


def disturb(run: Run, kind: str, chance: random.Random, deadline: float) -> bool | None:
    """Waits for a moment and does `kind` to the run; True if a save was under way, None if the run ended by itself before."""
    before, patience = run.step(), time.monotonic() + chance.uniform(5, 60)
    early = chance.random() < 0.15  # now and then during start-up
    while run.alive() and time.monotonic() < deadline and not early and run.step() <= before and time.monotonic() < patience + 60:
        time.sleep(0.02)
    pause = time.monotonic() + chance.uniform(0, 4)
    while run.alive() and time.monotonic() < pause:
        time.sleep(0.01)
    if "saving" in kind:
        limit = time.monotonic() + 60
        while run.alive() and time.monotonic() < limit and not run.saving():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
    if not run.alive():
        return None
    victims = run.processes if "both" in kind else [chance.choice(run.processes)]
    saving = run.saving()
    for victim in victims:
        victim.send_signal(signal.SIGTERM if kind.startswith("terminate") else signal.SIGKILL)
    return saving


def leaves(folder: pathlib.Path) -> dict:
    """Name → array of everything in the newest checkpoint."""
    from mila_jax.train.checkpoint import ITEMS, read_arrays

    step = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    newest = (folder / "checkpoints" / str(step)).absolute()
    return {"step": step} | {f"{item}.{name}": array for item in ITEMS for name, array in read_arrays(newest, item).items()}


def main() -> int:
    """Exit code 0 when the two runs ended with the same bits."""
    options, began = arguments(), time.monotonic()
    os.environ["JAX_PLATFORMS"] = "cpu"
    deadline, chance = began + 60 * options.minutes, random.Random(options.seed)
    data = options.data or prepare(options.out)
    for name in ("disturbed",) if options.reuse else ("undisturbed", "disturbed"):
        shutil.rmtree(options.out / name, ignore_errors=True)
    quiet = Run(options.out / "undisturbed", options, data)
    quiet.start()
    codes = quiet.wait(deadline - time.monotonic())
    if codes != [0, 0]:
        print(f"error: the undisturbed run ended with {codes}; see {quiet.log.name}", file=sys.stderr)
        return 1
    print(f"undisturbed: {options.steps} steps in {time.monotonic() - began:.0f} s (data included)", flush=True)

    run, done, during, ends, lost = Run(options.out / "disturbed", options, data), collections.Counter(), 0, collections.Counter(), []
    while time.monotonic() < deadline:
        run.start()
        left_alone = sum(done.values()) >= options.events
        kind = chance.choice([k for k in KINDS if options.kinds in k])
        saving = None if left_alone else disturb(run, kind, chance, deadline)
        told = saving is not None and kind.startswith("terminate")
        codes = run.wait(deadline - time.monotonic() if saving is None else 60 if told else 5, told)
        ends.update(map(str, codes))
        if saving is not None:
            done[kind] += 1
            during += saving
            lost.append(max(0, run.step() - run.saved()))
            print(
                f"{sum(done.values()):3} {kind}{', while saving' if saving and 'saving' not in kind else ''}: codes {codes}, step {run.step()}, saved {run.saved()}",
                flush=True,
            )
            if told and codes != [PREEMPTED] * 2 and -signal.SIGTERM not in codes:  # the latter: still starting up
                print(f"error: told to leave, the processes ended with {codes}; see {run.log.name}", file=sys.stderr)
                return 1
        elif codes == [0, 0]:
            break
        elif 2 in codes or 1 in codes:
            print(f"error: a start ended with {codes}; see {run.log.name}", file=sys.stderr)
            return 1
    else:
        print("error: out of time", file=sys.stderr)
        return 1

    import numpy as np

    expected, found = leaves(options.out / "undisturbed"), leaves(options.out / "disturbed")
    different = [k for k in expected if k not in found or not np.array_equal(expected[k], found[k])] + [k for k in found if k not in expected]
    print(f"\n{sum(done.values())} events in {run.starts} starts, {during} of them while a checkpoint was being written")
    for kind in KINDS:
        print(f"  {kind:28} {done[kind]}")
    print(f"exit codes: {dict(ends)}; steps made again after an event: at most {max(lost, default=0)}, {sum(lost)} in all")
    print(
        f"{len(expected)} arrays of step {expected['step']}: {'all equal bit for bit' if not different else f'{len(different)} differ: {different[:5]}'}"
    )
    print(f"{time.monotonic() - began:.0f} s")
    if sum(done.values()) < options.events:
        print(f"error: the run ended after {sum(done.values())} of {options.events} events; give it more --steps", file=sys.stderr)
        return 1
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
