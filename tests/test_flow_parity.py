"""Recorded numbers of Open-Sora 1.2's scheduler."""

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.parity import rflow


def test_everything_recorded_is_reproduced(golden):
    npz = dict(golden("rflow.npz"))
    results = rflow.check(npz)
    names = [name for name, _, _ in results]
    runs = {f"{run}/out" for run in ("plain", "tt", "tt30", "discrete7", "mask_plain", "mask_tt")}
    parts = {"mask_plain/x_mask", "train_mask/loss", "train_nomask/x_t", "tt_grid/out"}
    parts |= {"mask_strategy/align5/z", "mask_strategy/alignNone/mask"}
    assert runs | parts <= set(names)
    assert [(name, error) for name, error, tolerance in results if not error <= tolerance] == []


def test_format_is_recognised_and_differences_are_seen(golden):
    npz = dict(golden("rflow.npz"))
    assert rflow.matches(npz) and not rflow.matches({"meta_json": "", "w/x": 0})
    npz["plain/out"] = npz["plain/out"] + 1e-3
    npz["mask_strategy/align5/mask"] = 1 - npz["mask_strategy/align5/mask"]
    npz["tt_grid/out"] = np.nan_to_num(npz["tt_grid/out"])  # NaN where the published rule gives NaN is part of the record
    for run in ("tt", "tt30", "mask_tt", "discrete7", "mask_plain"):
        del npz[f"{run}/out"]  # a file may hold less
    bad = [name for name, error, tolerance in rflow.check(npz) if not error <= tolerance]
    assert bad == ["plain/out", "tt_grid/out", "mask_strategy/align5/mask"]
    del npz["train/t"]
    with pytest.raises(UserError, match="train/t"):
        rflow.check(npz)
