"""Where a run's wall time goes: the share in which steps were made that count (goodput), over all its starts.

Every start of a run keeps a line in `goodput.jsonl`, written anew at each log: seconds by kind and the last step. Steps that were made
again after a kill are lost, and so is the time between the last line of a killed start and its death.
"""

import contextlib
import json
import pathlib
import sys
import time

from data_pipeline.records import write_atomically

KINDS = ("start", "compile", "data", "checkpoint", "evaluation", "restore", "skipped", "lost")


class Goodput:
    """Counts seconds of one start. `with clock("data"): …` for everything that is not a step; the rest, from `begin` on, is steps."""

    def __init__(self, folder, began: float):
        """folder: the run's; began: time.time() at which this start came to life."""
        self.path = pathlib.Path(folder) / "goodput.jsonl"
        self.earlier = _read(self.path)
        self.began, self.first, self.skipped = began, None, 0
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._told = False

    @contextlib.contextmanager
    def clock(self, kind: str):
        """Counts the block's time as `kind`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[kind] += time.monotonic() - start

    def begin(self, step: int, skipped: int = 0) -> None:
        """Everything is ready and the next step is step + 1. skipped: steps that changed nothing until now, of all earlier starts."""
        known = sum(self.seconds.values())
        self.seconds["start"] += max(0.0, time.time() - self.began - known)
        self.first, self.skipped = step, skipped

    def record(self, step: int, skipped: int = 0) -> dict:
        """This start, up to `step`; `skipped`: steps of all starts that changed nothing. `steps` are the seconds in which steps were made."""
        wall = time.time() - self.began
        seconds = dict(self.seconds)
        steps = max(0.0, wall - sum(seconds.values()))
        done = max(step - (self.first or 0), 0)
        seconds["skipped"] = steps * max(skipped - self.skipped, 0) / done if done else 0.0
        return {"began": self.began, "wall": wall, "first": self.first, "last": step, "steps": steps - seconds["skipped"]} | seconds

    def write(self, step: int, skipped: int = 0) -> dict:
        """Keeps the line and returns `summary` of all starts. A disk that is full costs the line, never the run: it is said once."""
        starts = [*self.earlier, self.record(step, skipped)]
        try:
            write_atomically(self.path, "".join(json.dumps(s) + "\n" for s in starts).encode())
        except OSError as error:
            if not self._told:
                print(f"warning: {self.path} cannot be written ({error}); training goes on without", file=sys.stderr, flush=True)
            self._told = True
        return summary(starts)


def _read(path) -> list[dict]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return out


def summary(starts: list[dict]) -> dict:
    """Of all starts: wall seconds, goodput (0 … 1), seconds by kind, starts. Steps that a later start made again count as lost."""
    total = dict.fromkeys(KINDS, 0.0)
    good = 0.0
    for number, start in enumerate(starts):
        for kind in KINDS:
            total[kind] += start.get(kind, 0.0)
        done = start["last"] - (start["first"] or 0)
        resumed = [s["first"] for s in starts[number + 1 :] if s["first"] is not None]
        again = max(0, start["last"] - min(resumed)) if resumed else 0
        lost = start["steps"] * min(1.0, again / done) if done > 0 else 0.0
        good += start["steps"] - lost
        total["lost"] += lost
    wall = sum(s["wall"] for s in starts)
    return {"wall": wall, "goodput": good / wall if wall else 0.0, "starts": len(starts), **total}


def describe(total: dict) -> str:
    """One line for the terminal."""
    rest = ", ".join(f"{kind} {100 * total[kind] / total['wall']:.1f} %" for kind in KINDS if total[kind] > 0.0005 * total["wall"])
    return f"goodput {100 * total['goodput']:.1f} % of {total['wall']:.0f} s in {total['starts']} start(s)" + (f"; {rest}" if rest else "")
