"""`mila plan` with the real TPU compiler, on a model that compiles in seconds; no TPU is needed."""

import pytest

from mila_jax import cli
from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.parallel.aot.chips import parse_topology
from mila_jax.parallel.aot.compiler import compile_step
from mila_jax.parallel.aot.layout import plan_layout

pytestmark = pytest.mark.tpu_backend

SMALL = (
    "--config.model.width=128", "--config.model.depth=3", "--config.model.heads=4", "--config.model.ray_rotary=False", "--config.model.precondition=none", "--config.model.dtype=bfloat16",
    "--config.model.detail=0",
    "--config.train.optimizer=adamw", "--config.window.frames=4", "--config.window.conditioning=2", "--config.window.anchor_stride=2", "--config.train.batch=4", "--config.mesh.fsdp=4",
)  # fmt: skip
SLICE = parse_topology("v5p:2x2x1")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name → result; each layout is compiled once."""
    cache = tmp_path_factory.mktemp("cache")
    settings = {
        "train": ("train", False, ("--config.model.remat=none",)),
        "remat": ("train", False, ("--config.model.remat=block",)),
        "sample": ("sample", False, ("--config.mesh.fsdp=2", "--config.mesh.context=2", "--config.generate.guidance_text=2.0", "--config.generate.guidance_waypoints=2.0")),
        "full": ("train", True, ("--config.model.remat=none",)),
    }  # fmt: skip
    found = {}

    def get(name):
        if name not in found:
            step, full, changes = settings[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MILA_CACHE", str(cache))
                found[name] = plan_layout(load_config("configs/tiny.py", [*SMALL, *changes]), SLICE, step, full=full)
        return found[name]

    return get


def test_operations_are_conserved(results):
    # The compiled program does the model's matmuls: no loop is missed or counted twice, no device does another's work. What is more is
    # the rotary embedding, which is a product with a constant matrix: a hundredth at this size.
    assert results("train")["flops"]["hlo_over_model"] == pytest.approx(1.01, abs=0.01)
    assert results("train")["warnings"] == []


def test_recomputation_is_seen(results):
    assert results("remat")["flops"]["hlo_over_model"] == pytest.approx(4 / 3, abs=0.03)
    assert results("remat")["hbm"]["peak_gib"] < results("train")["hbm"]["peak_gib"]


def test_a_plan_has_every_figure(results):
    result = results("train")
    assert result["status"] == "planned" and result["mode"] == "fast" and result["hbm"]["fits"]
    assert 0 < result["hbm"]["state_and_batch_gib"] < result["hbm"]["peak_gib"]
    assert 0 < result["mfu"]["pessimistic"] <= result["mfu"]["roofline"] < 1
    assert any(e["axis"] == "fsdp" for e in result["collectives"])
    assert len(result["costliest"]) == 10 and any(e["source"].startswith(("model/", "train/")) for e in result["costliest"])


def test_the_sampling_step_splits_two_passes_and_frames(results):
    result = results("sample")
    assert result["status"] == "planned" and result["sizes"]["evaluations"] == 2
    assert {"context", "fsdp"} & {e["axis"] for e in result["collectives"]}


def test_two_slices_send_to_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MILA_CACHE", str(tmp_path))
    config = load_config("configs/tiny.py", [*SMALL, "--config.train.batch=8", "--config.mesh.data=2", "--config.model.remat=none"])
    result = plan_layout(config, parse_topology("2xv5e:2x2"), "train")
    axes = {e["axis"]: e["ms"] for e in result["collectives"]}
    assert result["devices"] == 8 and axes["slices"] > 0 and axes["fsdp"] > 0 and "?" not in axes
    assert result["flops"]["hlo_over_model"] == pytest.approx(1.01, abs=0.01)


@pytest.mark.slow
def test_full_mode_agrees_with_fast_mode(results):
    fast, full = results("train"), results("full")
    assert full["mode"] == "full" and full["flops"]["hlo"] == fast["flops"]["hlo"]
    assert full["hbm"]["peak_gib"] <= fast["hbm"]["peak_gib"] * 1.01  # the report counts fragments, too
    assert full["mfu"]["roofline"] == pytest.approx(fast["mfu"]["roofline"], rel=0.05)


def test_a_slice_that_does_not_exist_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MILA_CACHE", "")
    code = cli.main(["plan", "--topology=v5e:3x5", "--quiet", "--config.train.batch=15"])
    err = capsys.readouterr().err
    assert code == 2 and "v5e:3x5" in err and err.count("\n") == 1


def test_a_model_that_is_too_large_is_refused_or_does_not_fit():
    config = load_config("configs/tiny.py", [*SMALL, "--config.train.batch=16384", "--config.model.remat=none"])
    outcome = compile_step(config, "v5e:2x2", "train")
    over = outcome.memory.get("peak", 0) > 15.75 * 2**30
    assert over or "hbm" in (outcome.failure or "").lower()


def test_time_has_a_limit():
    with pytest.raises(UserError, match="--minutes"):
        compile_step(load_config("configs/tiny.py", SMALL), "v5p:2x2x1", "train", limit=0.1)
