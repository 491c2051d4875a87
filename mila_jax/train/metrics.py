"""Metrics to `metrics.jsonl` and TensorBoard event files."""

import json
import pathlib


class MetricWriter:
    """Writes scalars of a step to both formats; opened by process 0 only. After a resume, lines of later steps are cut off."""

    def __init__(self, folder, resumed_at: int = 0):
        from tensorboardX import SummaryWriter  # only training pays for the import

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) is not None and _step(line) <= resumed_at]
            path.write_text("".join(line + "\n" for line in kept))
        self._lines = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, scalars: dict) -> None:
        """One line; values are Python numbers."""
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._lines.close()
        self._board.close()


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return None  # half a line of a killed run


def read_metrics(folder) -> list[dict]:
    """The lines of `metrics.jsonl` in `folder`; unreadable ones (of a killed run) are left out."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) is not None]
