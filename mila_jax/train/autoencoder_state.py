"""Resumable state of the autoencoder's training: one safetensors file, replaced atomically, and the metrics' JSON lines.

A file of a few megabytes on one machine needs no checkpoint manager; the world model's training, which is sharded, has one.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mila_jax.errors import UserError

State = TypeVar("State")


def _named_leaves(state) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def save_state(out_dir: Path, state, identity: dict) -> None:
    """Writes `state` (any pytree of arrays) and what it belongs to (`identity`, JSON-able) to out_dir/state.safetensors."""
    path = out_dir / "state.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(
            {name: np.asarray(leaf) for name, leaf in _named_leaves(state).items()}, partial, {"identity": json.dumps(identity, sort_keys=True)}
        )
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free space or choose another --out") from error


def restore_state(out_dir: Path, fresh: State, identity: dict) -> State:
    """The saved state, or `fresh` when there is none (making `out_dir`).

    UserError when the file is broken, belongs to another run, or the folder cannot be made.
    """
    path = out_dir / "state.safetensors"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return fresh
        with safe_open(path, framework="numpy") as file:
            saved = json.loads((file.metadata() or {}).get("identity", "{}"))
            if {"frames": identity.get("frames")} | saved != json.loads(json.dumps(identity)):  # older files do not tell of their frames
                raise UserError(f"{path} belongs to a run with another config, seed, number of steps or frames; choose another --out or remove it")
            leaves = [jnp.asarray(file.get_tensor(name)) for name in _named_leaves(fresh)]
    except SafetensorError as error:
        raise UserError(f"{path} is broken ({error}); remove it to start over") from error
    except OSError as error:
        raise UserError(f"cannot use {out_dir}: {error.strerror}; choose a writable --out") from error
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def read_metrics(out_dir: Path) -> list[dict]:
    """The rows of out_dir/metrics.jsonl; [] when there is none. A last line cut short by a crash is dropped."""
    path = out_dir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
