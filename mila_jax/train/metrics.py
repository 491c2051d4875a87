"""Metrics to `metrics.jsonl`, TensorBoard event files and, if asked for, Weights & Biases."""

import hashlib
import json
import math
import pathlib
import sys

from data_pipeline.records import write_atomically
from mila_jax.errors import UserError
from mila_jax.evaluate.video import write_png

INSTALL = 'pip install "mila_jax[wandb]"'


class MetricWriter:
    """Writes scalars and pictures of a step; opened by process 0 only. After a resume, lines of later steps are cut off.

    A disk that is full costs metrics, never the run: it is said once. wandb_project: also to that project. Raises `UserError` when it is
    given and wandb is not installed.
    """

    def __init__(self, folder, resumed_at: int = 0, *, wandb_project: str | None = None, config: dict | None = None):
        from tensorboardX import SummaryWriter  # only training pays for the import

        self.folder, self._failed = pathlib.Path(folder), False
        self._wandb = _open_wandb(wandb_project, self.folder, config) if wandb_project else None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            before = path.read_text()
            kept = "".join(line + "\n" for line in before.splitlines() if _step(line) is not None and _step(line) <= resumed_at)
            if kept != before:
                write_atomically(path, kept.encode())
        self._lines = path.open("a")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, scalars: dict) -> None:
        """One line; values are Python numbers. Those that are no finite numbers are left out: JSON has none."""
        scalars = {k: v for k, v in scalars.items() if math.isfinite(v)}
        with _Kept(self):
            self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
            self._lines.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def picture(self, step: int, name: str, image) -> None:
        """uint8 [rows, columns, 3] as `pictures/NAME_STEP.png`, and to TensorBoard."""
        with _Kept(self):
            write_png(self.folder / "pictures" / f"{name.replace('/', '_')}_{step:07d}.png", image)
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Flushes and closes all; twice does nothing."""
        if self._lines.closed:
            return
        with _Kept(self):
            self._lines.close()
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class _Kept:
    """Says once that metrics cannot be written, and goes on."""

    def __init__(self, writer: MetricWriter):
        self.writer = writer

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (OSError, UserError)):
            return False
        if not self.writer._failed:
            print(f"warning: metrics cannot be written to {self.writer.folder} ({error}); training goes on without", file=sys.stderr, flush=True)
        self.writer._failed = True
        return True


class _Nowhere:
    """What the other processes write to."""

    def write(self, step, scalars):
        """Nothing."""

    def picture(self, step, name, image):
        """Nothing."""

    def close(self):
        """Nothing."""


def no_writer() -> _Nowhere:
    """A writer that writes nothing."""
    return _Nowhere()


def _open_wandb(project: str, folder, config):
    try:
        import wandb
    except ImportError:
        raise UserError(f"train.wandb={project!r}, but wandb is not installed: {INSTALL}") from None
    # The id ties a resumed run to its curves; folders of one name in different places are different runs. A bucket's is wherever it is copied.
    address = str((config or {}).get("train", {}).get("dir", ""))
    place = hashlib.sha256((address if "://" in address else str(folder.resolve())).encode()).hexdigest()[:12]
    return wandb.init(project=project, dir=str(folder), id=f"{folder.name}-{place}", name=folder.name, resume="allow", config=config)


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None  # half a line of a killed run


def read_metrics(folder) -> list[dict]:
    """The lines of `metrics.jsonl` in `folder`; unreadable ones (of a killed run) are left out."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) is not None]
