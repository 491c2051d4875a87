"""Mesh sizes and logical rules."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.parallel.aot.sizes import plan_sizes
from mila_jax.parallel.aot.sweep import changed, parse_sweep
from mila_jax.parallel.logical import AXES, constrain, rules_from_config, rules_of, spec, use_rules
from mila_jax.parallel.mesh import check_accumulation, check_divides, make_mesh
from mila_jax.parallel.placement import arrange
from tests.tpu_compiler import ROOT, TPU_ENVIRONMENT

ONE = dict.fromkeys(AXES, 1)


def test_minus_one_takes_the_rest():
    mesh = make_mesh(ONE | {"data": -1}, jax.devices()[:1])
    assert mesh.axis_names == AXES and mesh.size == 1


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": -1, "fsdp": -1}, {"data": 0}])
def test_sizes_that_do_not_fit_name_the_keys(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(ONE | sizes, jax.devices()[:1])


def test_rules_are_data():
    assert spec("batch", None, "frames", "heads") == P(("data", "fsdp"), None, "context", "tensor")
    with use_rules(heads=None, batch="data"):
        assert spec("batch", "heads") == P("data", None)
    assert spec("heads") == P("tensor")
    with pytest.raises(KeyError):
        spec("nonsense")


def test_constrain_without_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    "mode, sizes, key",
    [
        ("context", dict(batch=3), "train.batch"), ("context", dict(frames=7), "window.frames"), ("context", dict(heads=3), "model.heads"),
        ("context", dict(tokens=7), "tokens of a view"), ("context", dict(width=9), "model.width"), ("heads", dict(heads=2), "model.heads"),
        ("kv_gather", dict(frames=7), "window.frames"), ("none", {}, "attention.parallel=none"),
    ],
)  # fmt: skip
def test_divisibility_names_the_key(mode, sizes, key):
    class Mesh:
        shape = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}

    def check(batch=4, frames=8, tokens=28, heads=4, width=16):
        check_divides(Mesh, batch, heads, width, frames, tokens)

    with use_rules(**rules_of(mode)):
        with pytest.raises(UserError, match=key):
            check(**sizes)
        if mode != "none":
            check()
    with use_rules(**rules_of("heads")):
        check(tokens=7)  # only the mode `context` splits places


@pytest.mark.parametrize("rule, names", [
    ("data", None), (None, None), (("data", "fsdp"), "train.accumulate·mesh.data·mesh.fsdp=32"),
    (("data", "context"), "train.accumulate·mesh.data·mesh.context=16"),
])  # fmt: skip
def test_parts_of_a_batch_are_counted_where_the_rules_split_it(rule, names):
    class Mesh:
        shape = {"data": 2, "fsdp": 8, "context": 4, "tensor": 1}

    with use_rules(batch=rule), contextlib.nullcontext() if names is None else pytest.raises(UserError, match=f"train.batch=4 is not .* of {names};"):
        check_accumulation(ConfigDict(dict(batch=4, accumulate=2)), Mesh)


def test_a_plan_splits_the_batch_as_the_rules_say():
    change = ["--config.mesh.fsdp=8", "--config.mesh.data=1", "--config.train.batch=4"]
    assert plan_sizes(load_config("configs/tiny.py", [*change, "--config.mesh.rules.batch=data"]), 8, "train").batch == 4
    with pytest.raises(UserError, match="mesh.data·mesh.fsdp=8"):
        plan_sizes(load_config("configs/tiny.py", change), 8, "train")


@pytest.mark.parametrize(
    "mode, changes, key",
    [
        ("ring", {}, "attention.parallel"), ("none", {"mpl": None}, "mesh.rules.mpl"), ("none", {"mlp": "model"}, "mesh.rules.mlp"),
        ("none", {"mlp": ("fsdp", "tensro")}, "tensro"),
    ],
)  # fmt: skip
def test_rules_that_cannot_work_name_the_key(mode, changes, key):
    with pytest.raises(UserError, match=key):
        rules_of(mode, changes)


def test_rules_from_the_command_line():
    changes = ["--config.mesh.rules.places=None", "--config.mesh.rules.embed=('data','fsdp')", "--config.mesh.rules.mlp=fsdp"]
    rules = rules_from_config(load_config("configs/xl128.py", ["--config.train.steps=3", *changes]))
    assert (rules["places"], rules["embed"], rules["mlp"]) == (None, ("data", "fsdp"), "fsdp")
    with pytest.raises(UserError, match="mesh.rules.placse is no logical axis"):
        rules_from_config(load_config("configs/tiny.py", ["--config.mesh.rules.placse=None"]))
    with pytest.raises(UserError, match="is not --config.mesh.rules.NAME=VALUE"):
        load_config("configs/tiny.py", ["--config.mesh.rules.places"])
    with pytest.raises(UserError, match="is not --config.mesh.rules.NAME=VALUE"):
        load_config("configs/tiny.py", ["--config.mesh.rules.a.b=1"])
    with pytest.raises(UserError, match="mesh.rules.embed=1 must be a mesh axis"):
        rules_from_config(load_config("configs/tiny.py", ["--config.mesh.rules.embed=1"]))
    assert load_config("configs/tiny.py", ["--config.mesh.rules.embed=fsdp", "--config.mesh.rules.embed=('data','fsdp')"]).mesh.rules.embed == (
        "data",
        "fsdp",
    )
    assert [dict(c.mesh.rules) for c in (changed("configs/tiny.py", ["--config.mesh.rules.embed=tensor"], x) for x in parse_sweep("mesh.rules.embed=None,fsdp"))] == [
        {"embed": None}, {"embed": "fsdp"}
    ]  # fmt: skip


def test_one_mesh_axis_splits_one_axis_of_an_array():
    with use_rules(**rules_of("none", {"embed": "tensor"})), pytest.raises(UserError, match="tensor"):
        spec("embed", "mlp")


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the mesh looks at."""

    id: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_slices_lie_along_data_only():
    devices = [Device(i, slice_index=i % 2) for i in range(16)]  # slices interleaved, as they may be listed
    mesh = arrange((4, 2, 2, 1), devices)
    assert mesh.shape == (4, 2, 2, 1)
    for index in range(4):
        assert {d.slice_index for d in mesh[index].flat} == {index // 2}
    assert sorted(d.id for d in mesh.flat) == list(range(16))


def test_devices_without_slices_can_be_split_in_their_order():
    mesh = arrange((4, 2, 1, 1), [Device(i) for i in range(8)], dcn_data=2)
    assert {d.id for d in mesh[:2].flat} == {0, 1, 2, 3}
    assert {d.id for d in mesh[2:].flat} == {4, 5, 6, 7}


@pytest.mark.parametrize(
    "shape, slices, dcn_data, key", [((1, 8, 1, 1), 2, -1, "mesh.data"), ((2, 4, 1, 1), 2, 4, "mesh.dcn_data"), ((4, 2, 1, 1), 1, 4, "mesh.dcn_data")]
)
def test_slices_that_do_not_fit_name_the_key(shape, slices, dcn_data, key):
    with pytest.raises(UserError, match=key):
        arrange(shape, [Device(i, slice_index=i % slices, platform="tpu", device_kind="none") for i in range(8)], dcn_data)


@pytest.mark.tpu_backend
def test_mesh_of_a_topology_that_no_axis_fits():
    """v6e 8×8 as 16×4 cuts an axis of the torus; slices of two stay apart."""
    code = (
        "from jax.experimental import topologies; from mila_jax.parallel.mesh import make_mesh\n"
        "get = lambda name, **k: topologies.get_topology_desc(platform='tpu', topology_name=name, **k).devices\n"
        "one = dict(data=1, fsdp=-1, context=4, tensor=1)\n"
        "print(dict(make_mesh(one, get('v6e:8x8')).shape), dict(make_mesh(one, get('v5p:4x4x4')).shape))\n"
        "two = make_mesh(dict(data=2, fsdp=-1, context=2, tensor=1, dcn_data=2), get('v5e:2x4', num_slices=2))\n"
        "print([sorted({d.slice_index for d in part.flat}) for part in two.devices])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | TPU_ENVIRONMENT, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    shape = "{'data': 1, 'fsdp': 16, 'context': 4, 'tensor': 1}"
    assert run.stdout.splitlines() == [f"{shape} {shape}", "[[0], [1]]"]
