"""Training: the step, resuming, sharding, and errors."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open

from mila_jax.errors import UserError
from mila_jax.model import weights
from mila_jax.model.weights import load_model
from mila_jax.train import loop, step, trainer as trainer_module
from mila_jax.train.checkpoint import Checkpoints, laid_out
from mila_jax.train.metrics import MetricWriter, read_metrics
from mila_jax.train.optimizer import learning_rate, make_optimizer
from mila_jax.train.state import abstract_model, abstract_state
from tests.host_devices import host_devices
from tests.shared_programs import shared_steps


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs with the same network are of one program."""
    with shared_steps():
        yield


@pytest.fixture(scope="module")
def config(small_config, tmp_path_factory):
    """A learning rate that stays, so that runs of any length are of one program, and that one batch is learnt with soon."""
    return with_dir(small_config, tmp_path_factory.mktemp("run"), learning_rate=5e-3, decay=False)


@pytest.fixture(scope="module")
def once(config, tmp_path_factory):
    """Outcome of a run of one step."""
    return loop.train(with_dir(config, tmp_path_factory.mktemp("once"), steps=1), progress=False)


@pytest.fixture(scope="module")
def begun(config):
    """A run before its first step: (trainer, state, batch on the host and on the mesh, loss of the batch at level 0.5)."""
    trainer = trainer_module.Trainer(config)
    with jax.set_mesh(trainer.mesh):
        state = trainer.initial_state()
        batch = next(trainer.batches(trainer.train_source, 0))
        return trainer, state, jax.tree.map(np.asarray, batch), batch, trainer.loss(state.params, batch, trainer.key, level=jnp.float32(0.5))


def with_dir(config, path, **train):
    c = config.copy_and_resolve_references()
    c.train.dir = str(path)
    c.train.update(train)
    return c


def parameters(path):
    return [np.asarray(x) for x in jax.tree.leaves(load_model(path).params)]


def last_state(config):
    """Parameters, average and optimizer moments of the newest checkpoint, in full precision."""
    trainer = trainer_module.Trainer(config)
    with jax.set_mesh(trainer.mesh):
        return Checkpoints(trainer.folder).restore(laid_out(abstract_state(trainer.dit, trainer.tx), trainer.shardings))


def test_resume_is_bit_equal(config, tmp_path):
    whole = loop.train(with_dir(config, tmp_path / "whole", profile=(3, 2)), progress=False)
    assert list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))
    first = loop.train(with_dir(config, tmp_path / "parts"), progress=False, stop_after=3)
    assert (first.step, first.finished) == (3, False)
    second = loop.train(with_dir(config, tmp_path / "parts"), progress=False)
    assert (second.step, second.finished) == (8, True)
    assert all(np.array_equal(a, b) for a, b in zip(parameters(whole.model), parameters(second.model), strict=True))
    states = [jax.tree.leaves(last_state(with_dir(config, tmp_path / name))) for name in ("whole", "parts")]
    assert len(states[0]) > 100 and all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
    steps = [m["step"] for m in read_metrics(tmp_path / "parts")]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert list((tmp_path / "parts" / "tensorboard").iterdir())
    again = loop.train(with_dir(config, tmp_path / "parts"), progress=False)  # nothing left to do
    assert again.step == 8


def test_the_step_of_exported_weights_is_read_without_computing(monkeypatch, tmp_path):
    """Process 0 looks alone, under the mesh of all: anything that is computed there would wait for the others."""

    def no(*args, **kwargs):
        raise AssertionError("computed")

    for module, name in ((trainer_module, "load_model"), (weights, "abstract_model"), (weights.jnp, "asarray")):
        monkeypatch.setattr(module, name, no)
    path = tmp_path / "model.safetensors"
    exported = lambda: trainer_module.Trainer.exported(types.SimpleNamespace(model_path=path))  # noqa: E731
    assert exported() is None
    path.write_bytes(weights.SHIPPED.read_bytes())
    with safe_open(path, framework="numpy") as file:
        assert exported() == json.loads(file.metadata()["card"])["steps"]
    path.write_bytes(weights.SHIPPED.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is not a readable safetensors file"):
        exported()


def test_profile_holds_the_work_of_its_steps(monkeypatch, tmp_path):
    """Steps are started long before the device has done them: the recording waits for it at both ends."""
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda state: calls.append(state))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with loop._profile(tmp_path, (3, 2), 0) as profile:
        for number in range(1, 8):
            profile.at(number, f"after {number - 1}")
    assert calls == ["after 2", "start", "after 4", "stop"]


@pytest.mark.parametrize("window, start, recorded", [
    ((3, 2), 0, [3, 4]), ((3, 2), 2, [4, 5]), ((3, 2), 3, [5, 6]), ((3, 2), 4, []), ((3, 2), 90, []), ((0, 1), 0, [2]), ((0, 1), 2, []), ((3, 0), 0, []),
])  # fmt: skip
def test_a_start_after_the_window_records_nothing(monkeypatch, tmp_path, window, start, recorded):
    """A run that goes on again and again would fill its disk with recordings that nobody asked for."""
    calls, found = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with loop._profile(tmp_path, window, start) as profile:
        for number in range(start + 1, start + 10):
            profile.at(number, None)
            if profile.running:
                found.append(number)
    assert found == recorded and calls == (["start", "stop"] if recorded else [])


def test_loss_falls_on_one_batch(begun):
    trainer, state, _, batch, before = begun
    with jax.set_mesh(trainer.mesh):
        for _ in range(60):
            state, metrics = trainer.step(state, batch, trainer.key)
        after = float(trainer.loss(state.params, batch, trainer.key, level=jnp.float32(0.5)).mean)
    assert np.isfinite(float(metrics["grad_norm"])) and after < 0.8 * float(before.mean)


def test_roles_of_frames():
    b = 4000
    clip = {"latents": np.zeros((b, 1, 8, 1, 1, 1)), "fps": np.where(np.arange(b) % 2, 12.0, 2.0), "conditioning": np.full(b, 2)}
    objective = step.Objective("uniform", 0.0, "exponential", 0.5, 0.4, 0.7, 0.75, 0.1, 0.1, 0.99)
    clean, anchor = map(np.asarray, step.frame_roles(jax.random.key(0), clip, objective))
    assert clean[:, :2].all() and not clean[:, 2:7].any() and not (clean & anchor).any()
    fine = clip["fps"] == 12
    assert not anchor[~fine].any() and not clean[~fine, 7].any()  # coarse windows have no anchor
    assert abs(anchor[fine, 7].mean() - 0.7 * 0.75) < 0.04
    assert abs(clean[fine, 7].mean() - 0.7 * 0.25) < 0.04
    several = dataclasses.replace(objective, anchor_stride=3)  # frames 7 and 4 of a window together; frame 1 is given
    inner_clean, inner = map(np.asarray, step.frame_roles(jax.random.key(0), clip, several))
    assert np.array_equal(inner[:, 7], anchor[:, 7]) and np.array_equal(inner[:, 4], anchor[:, 7]) and not inner[:, [0, 1, 2, 3, 5, 6]].any()
    assert (
        np.array_equal(inner_clean[:, 7], clean[:, 7])
        and np.array_equal(inner_clean[:, 4], clean[:, 7])
        and inner_clean.sum() == clean.sum() + clean[:, 7].sum()
    )
    from_one = step.frame_roles(jax.random.key(0), clip | {"conditioning": np.full(b, 1)}, several)  # 7 new frames hold no whole number of strides
    assert np.array_equal(from_one[1][:, 7], anchor[:, 7]) and not from_one[1][:, :7].any()


def test_clean_frames_do_not_count(begun):
    trainer, _, batch, _, value = begun
    v, t = batch["latents"].shape[1:3]
    clean, _ = step.frame_roles(jax.random.split(trainer.key, 5)[0], batch, trainer.objective)
    per_frame = np.prod(batch["latents"].shape[3:]) * v
    assert float(value.count) == per_frame * float(jnp.sum(~clean)) < per_frame * clean.size


def test_one_optimizer_step_equals_the_original(golden):
    """Open-Sora's first AdamW step (clip 1.0, lr 1e-4, eps 1e-15) from recorded gradients."""
    base, npz = golden("stdit3_A"), golden("stdit3_A_train")
    names = [k.removeprefix("adamw1/") for k in npz if k.startswith("adamw1/")]
    params = {k[2:]: jnp.asarray(v) for k, v in base.items() if k.startswith("w/")}
    grads = {k.removeprefix("masked/grad/"): jnp.asarray(v) for k, v in npz.items() if k.startswith("masked/grad/")}
    params = {k: params[k] for k in grads}
    train = ConfigDict(dict(steps=10, learning_rate=1e-4, warmup=0, decay=False, beta2=0.999, weight_decay=0.0, epsilon=1e-15, clip=1.0))
    tx = make_optimizer(train)

    @jax.jit
    def first_step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    new = first_step(params, grads)
    for name in names:
        np.testing.assert_allclose(new[name], npz[f"adamw1/{name}"], atol=2e-6)


def test_learning_rate_warms_up_as_in_open_sora():
    rate = learning_rate(ConfigDict(dict(learning_rate=1.0, warmup=9, decay=False, steps=100)))
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(50)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    falling = learning_rate(ConfigDict(dict(learning_rate=1.0, warmup=9, decay=True, steps=100)))
    assert falling(100) == pytest.approx(0.05) and falling(50) < 0.9


SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from mila_jax.train.trainer import Trainer
from mila_jax.config import load_config
import ml_collections
config = ml_collections.ConfigDict(json.load(open(sys.argv[1])))
out = {}
for name, sizes in json.loads(sys.argv[2]).items():
    config.train.optimizer = "muon" if "muon" in name else "adamw"
    config.mesh.update(sizes)
    count = int(np.prod(list(sizes.values())))
    trainer = Trainer(config, devices=jax.devices()[:count])
    with jax.set_mesh(trainer.mesh):
        state = trainer.initial_state()
        batches = trainer.batches(trainer.train_source, 0)
        losses = []
        for _ in range(2):
            state, metrics = trainer.step(state, next(batches), trainer.key)
            losses.append(float(metrics["loss"]))
        mu = state.opt_state[1][0].mu if name[:4] != "muon" else state.opt_state[1].inner_states["muon"].inner_state[0].mu
        laid = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
        same = [x.sharding == laid[jax.tree_util.keystr(path)] for path, x in jax.tree_util.tree_leaves_with_path(mu)]
        split = any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(mu))
    total = sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(state.params))
    out[name] = dict(losses=losses, total=total, moments_like_parameters=all(same), split=split)
print("RESULT" + json.dumps(out))
"""


def steps_on_meshes(config, tmp_path, meshes):
    """Two steps on each mesh of eight host devices, in a process of its own."""
    # With Open-Sora's epsilon the first AdamW step is the sign of the gradient, and rounding decides the sign of the tiny ones.
    c = with_dir(config, tmp_path / "run", epsilon=1e-4)
    c.data.image_size = tuple(c.data.image_size)
    (tmp_path / "config.json").write_text(c.to_json())
    env = host_devices(8) | {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}  # kept between runs of the suite
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "config.json"), json.dumps(meshes)], env=env, capture_output=True, text=True,
        cwd=pathlib.Path(__file__).parents[1], timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.split("RESULT")[1])
    alone = result[next(iter(meshes))]
    for name in meshes:
        np.testing.assert_allclose(result[name]["losses"], alone["losses"], rtol=2e-5)
        np.testing.assert_allclose(result[name]["total"], alone["total"], rtol=1e-5)
        assert result[name]["moments_like_parameters"]
    assert not alone["split"] and all(result[name]["split"] for name in list(meshes)[1:])


ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def test_meshes_give_the_same_step(small_config, tmp_path):
    """Fully sharded, context and tensor parallelism together on eight host devices against one device."""
    steps_on_meshes(small_config, tmp_path, {"one": ONE, "all": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}})


@pytest.mark.slow
def test_muon_on_a_mesh_gives_the_same_step(small_config, tmp_path):
    steps_on_meshes(small_config, tmp_path, {"muon one": ONE, "muon fsdp": ONE | {"fsdp": 4}})


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("window.anchor_level", 0.1, "anchor"), ("window.frames", 200, "frames"),
        ("train.log_every", 0, "train.log_every"), ("train.accumulate", 3, "train.accumulate"),
        ("train.trainable", ("nothing.*",), "train.trainable"), ("train.explode", 0.5, "train.explode"),
        ("train.moments", "float16", "train.moments"), ("train.fps", (12.0,), "train.fps"), ("train.optimizer", "sgd", "train.optimizer"),
        ("train.foreground_weight", -1.0, "train.foreground_weight"), ("train.foreground_weight", 1.0, "data.foreground"),
        ("train.foreground_of", "all", "train.foreground_of"), ("train.foreground_of", "given", "train.foreground_weight"),
        ("train.clip", 0.0, "train.clip"), ("train.eval_every", -1, "train.eval_every"), ("train.minutes", -1.0, "train.minutes"),
        ("train.warmup", -1, "train.warmup"), ("train.text_drop", 3.0, "train.text_drop"), ("train.profile", (5,), "train.profile"),
        ("train.fps", ("a", "b"), "train.fps"), ("train.level", "foo", "train.level"), ("window.tpd_family", "foo", "window.tpd_family"),
        ("window.tpd_strength", 50.0, "window.tpd_strength"), ("model.dtype", "bf16", "model.dtype"),
        ("model.precondition", "magic", "model.precondition"), ("mesh.tensor", 3, "mesh"), ("model.heads", 3, "model.heads"),
    ],
)  # fmt: skip
def test_bad_configs_fail_before_compiling(config, tmp_path, key, value, match):
    c = with_dir(config, tmp_path)
    section, name = key.split(".")
    c[section][name] = value
    with pytest.raises(UserError, match=match):
        trainer_module.Trainer(c)


def test_folder_of_another_model_is_refused(config, once):
    folder = once.model.parent
    with pytest.raises(UserError, match="train.optimizer"):
        loop.train(with_dir(config, folder, steps=2, optimizer="muon"), progress=False)
    other = with_dir(config, folder, steps=2)
    other.model.depth = 2
    with pytest.raises(UserError, match="model.depth|does not fit"):
        loop.train(other, progress=False)


def test_a_run_that_never_made_a_step_does_not_keep_its_folder(config, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    c = with_dir(config, tmp_path, steps=1)
    other = with_dir(config, tmp_path, steps=1)
    other.model.input_sq_size *= 2  # with parameters of the same shapes
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.step_module, "jit_train_step", lambda *a, **k: full)
        with pytest.raises(MemoryError):
            loop.train(other, progress=False)
    assert loop.train(c, progress=False).finished
    with pytest.raises(UserError, match="model.input_sq_size"):
        loop.train(other, progress=False)


@pytest.mark.parametrize("content", ["not json", "[]", '{"model_type": "t5"}'])
def test_a_folder_of_something_else_is_refused(config, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is not of a run"):
        loop.train(with_dir(config, tmp_path), progress=False)
    assert (tmp_path / "config.json").read_text() == content


def test_unwritable_folder_is_one_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="train.dir"):
        loop.train(with_dir(config, tmp_path / "file" / "run"), progress=False)


def test_metrics_survive_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    writer = MetricWriter(tmp_path, resumed_at=4)
    writer.write(5, {"loss": 0.5})
    writer.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [(1, 2.0), (5, 0.5)]


def test_weights_that_do_not_fit_name_the_tensor(config, once, tmp_path):
    model = load_model(once.model)
    assert jax.tree.structure(model.params) == jax.tree.structure(abstract_model(model.dit)[1])
    c = with_dir(config, tmp_path / "b", init_from=str(once.model))
    c.model.heads = 4  # a larger depth would be grown into (mila_jax/model/grow.py)
    with pytest.raises(UserError, match="pairs"):
        loop.train(c, progress=False)
    c = with_dir(config, tmp_path / "c", init_from=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="none.safetensors"):
        loop.train(c, progress=False)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.safetensors"):
        load_model(tmp_path / "junk.safetensors")


def test_weights_of_another_autoencoder_are_refused_and_of_another_text_encoder_reported(config, tmp_path, capsys):
    trainer = trainer_module.Trainer(with_dir(config, tmp_path))
    trainer._check_start(trainer.data)
    assert capsys.readouterr().err == ""
    trainer._check_start(trainer.data | {"text_encoder": "minilm"})
    assert "text is learned anew" in capsys.readouterr().err
    with pytest.raises(UserError, match="another autoencoder"):
        trainer._check_start(trainer.data | {"autoencoder_sha256": "0"})
    with pytest.raises(UserError, match="temporal chunk17"):
        trainer._check_start(trainer.data | {"temporal": "chunk17"})
