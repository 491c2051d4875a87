"""`mila plan` without the TPU compiler: sizes, model FLOPs, sweeps, cache, errors, output."""

import dataclasses
import gzip
import importlib.util
import json
import pathlib
import re
import signal

import jax
import pytest
from ml_collections import ConfigDict

from mila_jax import cli
from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.model import cpu_gradients
from mila_jax.model.stdit3_weights import create
from mila_jax.model.weights import model_config, save_model
from mila_jax.parallel.aot import cache, child, compiler, flops, layout, page, sweep, terminal
from mila_jax.parallel.aot.chips import CHIPS, parse_topology
from mila_jax.parallel.aot.command import load_results
from mila_jax.parallel.aot.compiler import Outcome
from mila_jax.parallel.aot.program import make_program
from mila_jax.parallel.aot.sizes import data_description, plan_sizes, with_guide_sizes
from mila_jax.parallel.mesh import make_mesh
from mila_jax.views import VIEWS

SMALL = ("--config.model.width=32", "--config.model.depth=2", "--config.model.heads=2", "--config.data.image_size=(32,48)", "--config.train.batch=4")
SMALL += ("--config.model.ray_rotary=False", "--config.model.detail=0", "--config.window.frames=8", "--config.window.conditioning=2", "--config.train.optimizer=adamw")
PROGRAM = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {
  %a = bf16[4096,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,4096]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %d = bf16[4096,4096]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
GIB = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MILA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def forms_of_accelerators(monkeypatch):
    """On one CPU some gradients have forms of their own, with other products."""
    monkeypatch.setattr(cpu_gradients, "device_kind", lambda: "another device")


@pytest.fixture
def compiled(monkeypatch):
    """Stands for the compiler; `compiled.append` what it shall answer next (the last answer is given again), `asked` says what for."""
    answers, asked = [Outcome(PROGRAM, {"peak": 8 * GIB, "source": "test"}, None, 1.0, GIB)], []

    def fake(config, topology, step, **options):
        asked.append((config.to_dict(), topology, step, options))
        return answers[min(len(asked), len(answers)) - 1]

    monkeypatch.setattr(layout, "compile_step", fake)
    monkeypatch.setattr("mila_jax.parallel.aot.command.require_compiler", lambda: None)
    answers_and_asked = type("Fake", (), {"answers": answers, "asked": asked})
    return answers_and_asked


def run(capsys, *arguments):
    code = cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def rotary(sizes):
    """Work that is in the program and not the model's: partners of the rotary embedding of q and k, found by a constant matrix."""
    rows = sizes.batch * sizes.passes * len(VIEWS) * -(-sizes.frames // sizes.dit.patch[0]) * sizes.tokens
    blocks = sizes.dit.depth * (2 if sizes.dit.ray_rotary else 1)
    once = 2 * blocks * 2 * rows * sizes.dit.width * (sizes.dit.width // sizes.dit.heads)
    return once * (2 if sizes.step == "train" else 1)


@pytest.mark.parametrize(
    "step, settings, tolerance",
    [
        ("train", ("--config.model.precondition=none", "--config.model.remat=none"), 0),
        ("sample", ("--config.model.precondition=none",), 0),
        ("sample", ("--config.model.precondition=none", "--config.generate.guidance_text=2.0", "--config.generate.guidance_waypoints=2.0"), 0),
        ("sample", ("--config.model.precondition=none", "--config.generate.guidance_text=2.0", "--config.generate.guidance_waypoints=3.0"), 0),
        ("train", ("--config.model.pred_sigma=True", "--config.model.patch=(2,2,2)", "--config.model.precondition=none"), 0),
        ("train", ("--config.model.precondition=none", "--config.model.ray_rotary=True"), 1e-3),  # the rays' own rotation is left out
        ("train", ("--config.model.precondition=motion", "--config.model.sweep=0", "--config.model.evidence=False", "--config.model.mixture=False"), 0.02),
        ("train", ("--config.model.precondition=none", "--config.model.detail=8", "--config.model.patch=(2,2,2)"), 0),
        # Solves over t × t frames, rotations of rays and points, misfits and the like are left out.
        ("train", ("--config.model.precondition=motion", "--config.model.sweep=3", "--config.model.evidence=True", "--config.model.mixture=True"), 0.04),
    ],
)  # fmt: skip
def test_the_list_of_matmuls_is_what_the_program_does(step, settings, tolerance):
    config = load_config("configs/tiny.py", [*SMALL, *settings])
    sizes = plan_sizes(config, 1, step)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, sizes, mesh)
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments).jaxpr
    assert flops.count_jaxpr(traced) == pytest.approx(flops.model_flops(sizes) + rotary(sizes), rel=tolerance)


def test_a_guide_is_part_of_the_sampling_step(tmp_path):
    """Of another width and depth than the model, evaluated once where text guidance evaluates the model twice."""
    guide = load_config(
        "configs/tiny.py", [*SMALL, "--config.model.precondition=none", "--config.model.depth=1", "--config.model.width=16", "--config.model.heads=2"]
    )
    data = data_description(guide)
    save_model(tmp_path / "model.safetensors", create(model_config(guide, data))[1], guide, data, None, {})
    settings = [*SMALL, "--config.model.precondition=none", "--config.generate.guidance_text=2.0"]
    alone = plan_sizes(load_config("configs/tiny.py", settings), 1, "sample")
    asked = load_config("configs/tiny.py", [*settings, f"--config.generate.guide={tmp_path}"])
    config = with_guide_sizes(asked, "sample")
    sizes = plan_sizes(config, 1, "sample")
    assert (sizes.passes, sizes.of_guide.passes, sizes.guide.width) == (2, 1, 16)
    assert plan_sizes(ConfigDict(json.loads(config.to_json())), 1, "sample") == sizes  # what the compiling process is told is enough
    assert flops.model_flops(sizes) == flops.model_flops(alone) + flops.model_flops(sizes.of_guide)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, sizes, mesh)
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments).jaxpr
    assert flops.count_jaxpr(traced) == flops.model_flops(sizes) + rotary(sizes) + rotary(sizes.of_guide)
    # The guide's sizes decide which program is meant; without one, and in training, its settings are of no account.
    keys = {name: cache.config_hash(with_guide_sizes(c, step)) for name, c, step in (("alone", load_config("configs/tiny.py", settings), "sample"),
            ("guided", asked, "sample"), ("train", asked, "train"))}  # fmt: skip
    assert keys["alone"] == keys["train"] != keys["guided"]
    guide.model.width = 32
    save_model(tmp_path / "model.safetensors", create(model_config(guide, data))[1], guide, data, None, {})
    assert cache.config_hash(with_guide_sizes(asked, "sample")) != keys["guided"]
    save_model(tmp_path / "model.safetensors", create(model_config(guide, data))[1], guide, data | {"text_shape": [1, 2]}, None, {})
    with pytest.raises(UserError, match="generate.guide=.*text_shape"):
        with_guide_sizes(asked, "sample")


@pytest.mark.parametrize("precondition", ["none", "motion"])
def test_a_guide_may_be_preconditioned_otherwise(tmp_path, precondition):
    other = {"none": "motion", "motion": "none"}[precondition]
    guide = load_config("configs/tiny.py", [*SMALL, f"--config.model.precondition={other}", "--config.model.depth=1"])
    data = data_description(guide)
    save_model(tmp_path / "guide.safetensors", create(model_config(guide, data))[1], guide, data, None, {})
    settings = [*SMALL, f"--config.model.precondition={precondition}", f"--config.generate.guide={tmp_path}/guide.safetensors"]
    config = with_guide_sizes(load_config("configs/tiny.py", settings), "sample")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, plan_sizes(config, 1, "sample"), mesh)
    with jax.set_mesh(mesh):
        assert jax.tree.leaves(program.function.trace(*program.arguments).out_info)[0].shape == program.arguments[1].shape


def test_recomputing_is_not_the_models_work():
    config = load_config("configs/tiny.py", [*SMALL, "--config.model.precondition=none", "--config.model.remat=block"])
    sizes = plan_sizes(config, 1, "train")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_program(config, sizes, mesh)
    with jax.set_mesh(mesh):
        ratio = flops.count_jaxpr(program.function.trace(*program.arguments).jaxpr) / flops.model_flops(sizes)
    assert 1.25 < ratio < 1.34


def test_full_size_flops_are_known():
    # 1.2 B parameters, 2,688 tokens a frame, 28 frames: 185.4 TFLOP forward by an independent count.
    config = load_config("configs/default.py", ["--config.data.image_size=(256,448)", "--config.window.frames=28", "--config.train.batch=1"])
    config.text.length, config.plan.text_width, config.plan.latent_channels = 120, 4096, 4
    assert flops.model_flops(plan_sizes(config, 1, "train")) / 3 == pytest.approx(185.4e12, rel=0.003)


@pytest.mark.parametrize("name, devices", [("small", 8), ("base", 16), ("xl", 64), ("xl128", 64), ("v6e", 64)])
def test_the_flops_that_a_config_tells_are_those_of_its_model(name, devices):
    told = re.search(r"([\d.]+) TF a sample", pathlib.Path(f"configs/{name}.py").read_text())[1]
    config = load_config(f"configs/{name}.py")
    found = flops.model_flops(plan_sizes(config, devices, "train")) / config.train.batch / 1e12
    assert f"{found:.{len(told.partition('.')[2])}f}" == told


@pytest.mark.parametrize("name, match", [
    ("v5q:4x4", "unknown chip 'v5q'"), ("v5p", "not CHIP"), ("v5p:4x4", "3 dimensions"), ("v5e:4x4x4", "2 dimensions"), ("v5e:0x4", "at least 1"), ("0xv5e:4x4", "one slice"),
])  # fmt: skip
def test_bad_topologies_are_one_line(capsys, name, match):
    with pytest.raises(UserError, match=match):
        parse_topology(name)
    code, _, err = run(capsys, f"--topology={name}")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_topologies_count_devices():
    assert [parse_topology(n).devices for n in ("v5p:4x4x4", "v5e:4x4", "tpu7x:2x2x1", "2xv5e:16x16")] == [64, 16, 8, 512]
    assert parse_topology("2xv5e:16x16").slice_name == "v5e:16x16"
    assert all(c.peak > 1e14 and c.hbm_limit > 10 for c in CHIPS.values())


@pytest.mark.parametrize("settings, key", [
    (("--config.mesh.fsdp=3",), "mesh"), (("--config.train.batch=3",), "train.batch"), (("--config.data.image_size=(60,112)",), "plan.compression"),
    (("--config.mesh.data=1", "--config.mesh.context=4", "--config.window.frames=6"), "window.frames"), (("--config.plan.text_width=0",), "plan.text_width"),
    (("--config.model.dtype=half",), "model.dtype"), (("--config.mesh.contxt=2",), "mesh.context"), (("--sweep=mesh.context",), "--sweep"),
    (("--step=sample",), "plan.sample_batch"), (("--config.data.image_size=(64,)",), "data.image_size"),
])  # fmt: skip
def test_mistakes_are_said_before_anything_is_compiled(capsys, monkeypatch, settings, key):
    monkeypatch.setattr("mila_jax.parallel.aot.command.require_compiler", lambda: pytest.fail("the compiler was asked for"))
    code, _, err = run(capsys, "--topology=v5e:2x2", *settings)
    assert code == 2 and key in err and err.count("\n") == 1


def test_without_the_compiler_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(capsys, "--topology=v5e:2x2")
    assert code == 2 and 'pip install "jax[tpu]"' in err and err.count("\n") == 1


def test_nothing_of_the_users_flags_reaches_the_compiler(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "A_SECRET_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    variables = compiler.environment()
    assert variables["JAX_PLATFORMS"] == "cpu" and variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert not {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "A_SECRET_TOKEN"} & set(variables)


def test_an_abort_is_one_line():
    log = "F1125 01:29:55.1 57 util.cc:322] Check failed: Product(a) == Product(b) (8 vs. 4)\n*** Check failure stack trace: ***\n  @ 0x7f xla::CommonFactors()"
    line = compiler.failure_line(-signal.SIGABRT, log)
    assert "SIGABRT" in line and "Product(a) == Product(b)" in line and "0x7f" not in line and "\n" not in line
    assert "SIGKILL" in compiler.failure_line(-signal.SIGKILL, "")
    assert "TypeError: no" in compiler.failure_line(1, "Traceback\n  File x\nTypeError: no")


def test_a_child_that_aborts_ends_as_a_refused_layout(monkeypatch):
    monkeypatch.setattr(compiler, "require_compiler", lambda: None)
    monkeypatch.setattr(compiler.sys, "executable", "/bin/sh")  # a shell does not know `-m`: it stops with an error
    outcome = compiler.compile_step(load_config(), "v5e:2x2", "train")
    assert outcome.text is None and "compiling process failed" in outcome.failure and outcome.passing


def test_a_process_that_was_killed_says_nothing_of_the_layout(capsys, compiled):
    planned = compiled.answers[0]
    compiled.answers[:] = [Outcome(None, {}, "the compiling process ended with SIGKILL", 1.0, passing=True), planned]
    assert run(capsys, "--topology=v5e:2x2")[0] == 1
    assert run(capsys, "--topology=v5e:2x2")[0] == 0 and len(compiled.asked) == 2


@pytest.mark.parametrize(
    "accumulate, words", [(2, "not a multiple of train.accumulate"), (3, "not a multiple of train.accumulate"), (0, "must be at least 1")]
)
def test_parts_of_a_batch_that_training_refuses(capsys, compiled, accumulate, words):
    code, _, err = run(capsys, "--topology=v5e:4x4", "--config.train.batch=16", "--config.mesh.fsdp=16", f"--config.train.accumulate={accumulate}")
    assert code == 2 and words in err and not compiled.asked


def test_a_sampling_step_lies_as_generation_lays_it():
    """One video and two guidance passes: split over data where they are one batch; never over fsdp, where they do not divide."""
    guided = ("--config.generate.guidance_text=7.0", "--config.generate.guidance_waypoints=7.0", "--config.plan.sample_batch=1")
    for settings, data in ((("--config.mesh.fsdp=8",), 1), (("--config.mesh.data=2", "--config.mesh.fsdp=4"), 2)):
        config = load_config("configs/tiny.py", [*SMALL, *guided, *settings])
        sizes = plan_sizes(config, 8, "sample")
        assert (sizes.passes, sizes.mesh["data"]) == (2, data)
    config = load_config(
        "configs/tiny.py", [*SMALL, *guided, "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.generate.guidance_batched=False"]
    )
    with pytest.raises(UserError, match="1 sample"):
        plan_sizes(config, 8, "sample")


def test_frozen_parameters_are_said(capsys, compiled, tmp_path):
    file = tmp_path / "plan.json"
    run(capsys, "--topology=v5e:2x2", "--config.train.trainable=('final.*',)", f"--json={file}")
    assert any("train.trainable" in warning for warning in json.loads(file.read_text())["warnings"])


def test_the_child_does_not_outlive_its_parent(monkeypatch):
    ended = []
    monkeypatch.setattr(child.os, "getppid", lambda: 1)
    monkeypatch.setattr(child.os, "_exit", ended.append)
    child._end_with(5)
    assert ended == [4]


def test_memory_reports_are_read():
    report = (
        "Memory Space: default (color=0)\nTotal bytes: 240401376 (229.26MiB)\n  x\n\nMemory Space: vmem (color=1)\nTotal bytes: 36700160 (35.00MiB)\n"
    )
    assert compiler.memory_report(report) == {"default": 240401376, "vmem": 36700160}


def test_sweeps_cross():
    assert sweep.parse_sweep("mesh.context=1,4; model.patch=(1,2,2),(1,1,1)") == [
        {"mesh.context": "1", "model.patch": "(1,2,2)"}, {"mesh.context": "1", "model.patch": "(1,1,1)"},
        {"mesh.context": "4", "model.patch": "(1,2,2)"}, {"mesh.context": "4", "model.patch": "(1,1,1)"},
    ]  # fmt: skip
    assert sweep.parse_sweep(None) == [{}]
    config = sweep.changed("configs/tiny.py", ["--config.model.patch=(1,4,4)", "--config.seed=3"], {"model.patch": "(1,1,1)"})
    assert tuple(config.model.patch) == (1, 1, 1) and config.seed == 3  # replaced, not appended to


def test_a_sweep_skips_ranks_and_recommends(capsys, compiled, tmp_path):
    compiled.answers += [
        Outcome(PROGRAM, {"peak": 15 * GIB, "source": "test"}, None, 1.0, GIB),  # fits, but leaves no room
        Outcome(None, {}, "RESOURCE_EXHAUSTED: Ran out of memory on HBM: needs (44.18G) exceeds available (15.75G)", 1.0, GIB),
    ]
    file = tmp_path / "out" / "plan.json"
    code, out, err = run(
        capsys, "--topology=v5e:2x2", "--sweep=mesh.context=1,2,3;model.remat=none,block", f"--json={file}", f"--html={tmp_path / 'plan.html'}"
    )
    results = load_results(file)
    assert code == 0 and len(compiled.asked) == 4
    assert [r["status"] for r in results] == ["planned", "planned", "refused", "refused", "skipped", "skipped"]
    assert results[2]["hbm"]["peak_gib"] == 44.18 and not results[2]["hbm"]["fits"]
    assert "mesh" in results[4]["reason"] and "Ran out of memory" in results[2]["reason"]
    assert sweep.recommend(results) is not None and "recommended: v5e:2x2 mesh.context=1 model.remat=none" in out
    assert "over 90% of HBM" in out and "skipped (0 s)" in err
    text = (tmp_path / "plan.html").read_text()
    assert "<script" not in text and not re.search(r"(src|href)=.?http", text)
    assert text.count("<svg") == 2 and "Nothing was measured" in text and "Ran out of memory" in text


def test_one_layout_is_one_object(capsys, compiled, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run(
        capsys,
        "--topology=v5p:2x2x1",
        "--step=sample",
        "--config.mesh.data=1",
        "--config.mesh.context=4",
        "--config.window.frames=8",
        f"--json={file}",
    )
    result = json.loads(file.read_text())
    assert code == 0 and isinstance(result, dict)
    assert result["hbm"]["peak_gib"] == 8 and result["hbm"]["limit_gib"] == 95.74 and result["hbm"]["fits"]
    assert result["flops"]["hlo"] == 2 * 4096 * 4096 * 128
    assert result["flops"]["hlo_over_model"] == pytest.approx(result["flops"]["hlo"] / result["flops"]["model"])
    assert set(result["mfu"]) == {"roofline", "pessimistic", "roofline_without_collectives", "pessimistic_without_collectives"}
    assert {"collectives", "costliest", "assumptions", "mode", "config_hash", "mesh", "versions", "sources", "copies", "traffic"} <= set(result)
    assert "modelled, not measured" in out and "assumptions:" in out


def test_a_layout_that_does_not_fit_is_not_recommended(capsys, compiled):
    compiled.answers[:] = [Outcome(PROGRAM, {"peak": 16 * GIB, "source": "test"}, None, 1.0, GIB)]
    code, out, _ = run(capsys, "--topology=v5e:2x2")
    assert code == 1 and "needs 16.00 GiB of 15.75 GiB" in out


def test_results_are_kept_until_something_changes(capsys, compiled, monkeypatch):
    run(capsys, "--topology=v5e:2x2")
    run(capsys, "--topology=v5e:2x2", "--config.train.log_every=7")  # changes no step
    assert len(compiled.asked) == 1
    for arguments in (
        ("--config.model.depth=3",),
        ("--step=sample", "--config.mesh.data=1", "--config.mesh.context=4", "--config.window.frames=8"),
        ("--full",),
        ("--no-cache",),
    ):
        before = len(compiled.asked)
        run(capsys, "--topology=v5e:2x2", *arguments)
        assert len(compiled.asked) == before + 1, arguments
    run(capsys, "--topology=v5e:4x4", "--config.train.batch=16")
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "another"})
    run(capsys, "--topology=v5e:2x2")
    assert len(compiled.asked) == 7


def test_the_cache_survives_half_a_file_and_can_be_off(monkeypatch):
    outcome = Outcome("text", {"peak": 1}, None, 2.0, 3)
    cache.save("name", outcome)
    assert cache.load("name") == outcome
    (cache.folder() / "name.json.gz").write_bytes(gzip.compress(b"{}")[:10])
    assert cache.load("name") is None
    monkeypatch.setenv("MILA_CACHE", "")
    cache.save("name", outcome)
    assert cache.folder() is None and cache.load("name") is None


def test_a_config_hash_is_about_the_step():
    config = load_config()
    first = cache.config_hash(config)
    config.data.dir = "/somewhere"
    assert cache.config_hash(config) == first
    config.window.frames = 12
    assert cache.config_hash(config) != first


def test_unreadable_results_name_the_file(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    for name in ("a.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            load_results(tmp_path / name)


def test_pages_show_every_state(tmp_path):
    topology = parse_topology("v5e:2x2")
    results = [layout.skipped(topology, "train", {"mesh.context": 3}, UserError("does not divide <b>"))]
    text = page.write_page(tmp_path / "p.html", results, None).read_text()
    assert "does not divide &lt;b&gt;" in text and "mesh.context=3" in terminal.overview(results)
    files = (pathlib.Path(__file__).parents[1] / "docs" / "plan").glob("v*.json")
    planned = [result for file in files for result in load_results(file)]
    text = page.write_page(tmp_path / "p.html", [*planned, *results], planned[0]).read_text()
    bars = text[text.index("<svg") : text.index("</svg>")]
    assert len(planned) > 3 and bars.count("<rect") == 4 + 4 * len(planned)  # legend, and four parts of each layout
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="16"', bars)]
    assert all(sum(widths[4 * k : 4 * k + 4]) == pytest.approx(sum(widths[:4]), abs=0.5) for k in range(len(planned)))
    assert widths[0] / sum(widths[:4]) == pytest.approx(planned[0]["mfu"]["pessimistic"], abs=1e-3)


def test_outcomes_are_plain_values():
    outcome = Outcome(None, {}, "no", 1.0)
    assert Outcome(**json.loads(json.dumps(dataclasses.asdict(outcome)))) == outcome


def test_the_readme_table_is_made_from_results(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("plan_table", pathlib.Path(__file__).parents[1] / "scripts" / "plan_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for _, arguments in script.LAYOUTS.values():  # what it would ask for is understood
        topology = parse_topology(next(a.partition("=")[2] for a in arguments if a.startswith("--topology=")))
        assert topology.devices % 4 == 0 and any(a.startswith("--config=configs/") for a in arguments)
    planned = {
        "topology": "v5p:4x4x4", "mesh": {"data": 1, "fsdp": 64}, "hbm": {"peak_gib": 4.5, "limit_gib": 95.74}, "mode": "full", "reason": "",
        "mfu": {"pessimistic": 0.5, "roofline": 0.73, "roofline_without_collectives": 0.8}, "flops": {"hlo_over_model": 1.03},
    }  # fmt: skip
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "v5p_64.json").write_text(json.dumps(planned))
    (tmp_path / "another.json").write_text(json.dumps([{k: v for k, v in planned.items() if k not in ("mfu", "flops")} | {"reason": "too large"}]))
    assert script.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 64 samples on 64 chips | v5p:4x4x4 | fsdp 64 | 4.5 of 95.74 | 0.50 … 0.73 | 0.80 | 1.030 | full |"
    assert "too large" in lines[3] and len(lines) == 4
    (tmp_path / "README.md").write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    assert script.main(["--update"]) == 0
    assert (tmp_path / "README.md").read_text() == f"before\n{script.BEGIN}\n" + "\n".join(lines) + f"\n{script.END}\nafter\n"
    (tmp_path / "README.md").write_text("no place")
    assert script.main(["--update"]) == 2
