"""Checkpoints: orbax with separate items, so that a demo can load `ema` alone, on any mesh.

Items: params, ema, opt_state, meta (the step; data position, noise and schedules all derive from it). The run's config lies
beside them as config.json, written once.
"""

import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mila_jax.errors import UserError
from mila_jax.train.state import TrainState

ITEMS = ("params", "ema", "opt_state")


class Checkpoints:
    """Saves and restores `TrainState`s in `folder`/checkpoints; saving is asynchronous and atomic (a half save is ignored)."""

    def __init__(self, folder, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute() / "checkpoints"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder} ({error.strerror}); set train.dir to a writable folder") from None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, item_names=(*ITEMS, "meta"), options=options)

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Starts saving; returns before it is on disk. A step that is there already is left alone."""
        if self._manager.latest_step() == step:
            return
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ITEMS}
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({"step": step})))

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (newest by default) laid out as `abstract` (ShapeDtypeStructs with shardings).

        Raises `UserError` if there is none or it belongs to another model.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no finished checkpoint; train first")
        items = {name: ocp.args.StandardRestore(getattr(abstract, name)) for name in ITEMS}
        try:
            out = self._manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UserError(f"{self.folder}/{step} does not fit this model ({reason}); use its config or another train.dir") from None
        return TrainState(step=jnp.int32(out["meta"]["step"]), **{name: out[name] for name in ITEMS})

    def close(self) -> None:
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract_state(state_shapes: TrainState, shardings: TrainState) -> TrainState:
    """ShapeDtypeStructs with shardings, for `restore`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state_shapes, shardings)
