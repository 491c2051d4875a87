"""The training step on a small random model: accumulation, skipped steps, frozen parameters, moments in bfloat16, Muon."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.parallel.mesh import make_mesh
from mila_jax.train import step as step_module
from mila_jax.train.optimizer import in_bfloat16, like_parameters, make_optimizer, round_stochastically
from mila_jax.train.stages import describe, resolve
from mila_jax.train.state import abstract_model, create_state, state_shardings
from mila_jax.train.step import YOUNG, draw, gradients, split_batch, train_step
from tests.parallel_probe import CONFIG, OBJECTIVE, make_clip

TINY = dataclasses.replace(CONFIG, width=16, heads=2, depth=3)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(dict(data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def parameters():
    _, params = abstract_model(TINY)
    r = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.2 * r.normal(size=x.shape)).astype(np.float32), params)


def adam():
    return optax.adamw(1e-2, weight_decay=0.0)


def make_step(trainable=None, tx=None, **options):
    graphdef, _ = abstract_model(TINY)
    static = dict(
        graphdef=graphdef, config=TINY, prior=None, objective=dataclasses.replace(OBJECTIVE, explode=3.0), tx=tx or adam(), trainable=trainable
    )
    return jax.jit(functools.partial(train_step, **static, **options))


@pytest.fixture(scope="module")
def plain_step():
    return make_step()


def make_state(mesh, parameters, trainable=None, tx=None):
    with jax.set_mesh(mesh):
        return create_state(mesh, TINY, tx or adam(), 0, parameters, trainable)


def whole(mesh, parameters, plain_step, clip):
    """Loss and gradient of a batch in one part, from the plain step: Adam's first moment after the first step is a tenth of the gradient."""
    state, metrics = plain_step(make_state(mesh, parameters), clip, KEY)
    assert int(metrics["skipped"]) == 0
    return metrics["loss"], jax.tree.map(lambda m: np.asarray(m) / np.float32(1 - 0.9), state.opt_state[0].mu)


@pytest.fixture(scope="module")
def in_parts(parameters):
    """The same of a batch in four parts, as a function of the batch."""
    static = dict(graphdef=abstract_model(TINY)[0], config=TINY, prior=None, objective=OBJECTIVE, accumulate=4)
    program = jax.jit(functools.partial(gradients, **static))
    return lambda clip: program(parameters, parameters, clip, jax.random.fold_in(KEY, 0))


@pytest.fixture(scope="module")
def gradient(mesh, parameters, plain_step):
    """Loss and gradient of the batch that all optimizers are tried on."""
    return whole(mesh, parameters, plain_step, make_clip())


def step_with(tx, state, gradient, trainable=None):
    """A step with optimizer `tx` on a loss and gradient that are known: the network, most of the program, is the same with all."""
    loss, whole = gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "gradients", lambda selected, params, clip, key, **static: clip)
        return make_step(trainable, tx)(state, (loss, trainable.select(whole) if trainable else whole), KEY)


@pytest.fixture(scope="module")
def few(parameters):
    """Parameters of each kind, which are enough to see of what type moments are: the fewer, the smaller the program."""
    return resolve(parameters, ("pairs.spatial.attn.*", "final.*"), TINY.depth)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_batch_in_parts_has_the_gradient_of_the_whole(gradient, in_parts):
    (loss, expected), (parts, got) = gradient, in_parts(make_clip())
    np.testing.assert_allclose(parts, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_parts_weigh_by_their_noisy_frames(mesh, parameters, plain_step, in_parts):
    """Samples with three clean frames of four count a third of those with one: the mean of the parts' means is another number."""
    clip = make_clip() | {"conditioning": np.array([1, 3, 1, 3], np.int32), "fps": np.full(4, 2.0, np.float32)}  # at which no frame is an anchor
    assert float(in_parts(clip)[0]) == pytest.approx(float(whole(mesh, parameters, plain_step, clip)[0]), rel=1e-5)


def test_each_device_splits_its_own_rows():
    x = np.arange(16)  # two groups of eight rows
    parts = split_batch(x, 2, 2)
    assert parts.shape == (2, 2, 4) and parts[0].tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]] and parts[1, 0].tolist() == [1, 3, 5, 7]
    assert split_batch(x, 4, 1).shape == (4, 4)


def test_a_step_that_is_no_number_changes_nothing(mesh, parameters, plain_step):
    state = make_state(mesh, parameters)
    bad = make_clip()
    bad["latents"] = np.full_like(bad["latents"], np.nan)
    state, _ = plain_step(state, make_clip(), KEY)
    skipped, metrics = plain_step(state, bad, KEY)
    skipped, metrics = plain_step(skipped, bad, KEY)
    assert np.isnan(metrics["loss"]) and (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 2)
    for part in ("params", "ema", "opt_state"):
        assert same(getattr(state, part), getattr(skipped, part))
    assert int(skipped.step) == 3 and float(skipped.health.average) == float(state.health.average)
    after, metrics = plain_step(skipped, make_clip(), KEY)
    assert not same(after.params, skipped.params) and (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)


def test_a_loss_far_above_the_average_is_skipped_once_there_is_one(mesh, parameters, plain_step):
    far = make_clip()
    far["latents"] = far["latents"] * 100
    state = make_state(mesh, parameters)
    young, metrics = plain_step(state, far, KEY)
    assert int(metrics["skipped"]) == 0  # nothing to compare with yet
    _, metrics = plain_step(state, make_clip(), KEY)
    step = jax.device_put(np.int32(YOUNG), state.step.sharding)  # laid out as before, or the step would be compiled again
    average = jax.device_put(metrics["loss"], state.health.average.sharding)
    settled = dataclasses.replace(state, step=step, health=dataclasses.replace(state.health, average=average))
    kept, metrics = plain_step(settled, far, KEY)
    assert int(metrics["skipped_in_row"]) == 1 and same(kept.params, settled.params)
    _, metrics = plain_step(settled, make_clip(), KEY)
    assert int(metrics["skipped"]) == 0


def test_frozen_parameters_stay_and_take_no_memory(mesh, parameters):
    trainable = resolve(parameters, ("pairs[-1].*", "pairs.spatial.attn.*", "final.*"), TINY.depth)
    state = make_state(mesh, parameters, trainable)
    before = dict(nnx.to_flat_state(state.params))
    after, _ = make_step(trainable)(state, make_clip(), KEY)
    moments = dict(nnx.to_flat_state(after.opt_state[0].mu))
    for path, value in nnx.to_flat_state(after.params):
        changed = np.any(np.asarray(value[...]) != np.asarray(before[path][...]), axis=tuple(range(1, value[...].ndim)))
        if path[0] == "final":
            assert changed.all() or changed.any()
            assert moments[path].shape == value.shape
        elif path[:3] == ("pairs", "spatial", "attn"):
            assert changed.all() and moments[path].shape == value.shape
        elif path[0] == "pairs":
            assert changed.tolist() == [False, False, True] and moments[path].shape == (1, *value.shape[1:])
        else:
            assert not changed.any() and path not in moments
    text = describe(parameters, trainable)
    assert "frozen" in text and str(sum(x.size for x in jax.tree.leaves(after.opt_state[0].mu))) in text.replace(",", "").splitlines()[-1]


@pytest.mark.parametrize(
    "patterns, match",
    [(("pairs.spacial.*",), "names no parameter"), (("pairs[5].*",), "no pair of the 3"), (("pairs[0].*", "pairs[2].*"), "one run")],
)
def test_bad_patterns(parameters, patterns, match):
    with pytest.raises(UserError, match=match):
        resolve(parameters, patterns, TINY.depth)


def test_everything_is_everything(parameters):
    for patterns in (("*",), ("pairs[0:2].*", "pairs[-1].*", "*.*", "final_table")):
        trainable = resolve(parameters, patterns, TINY.depth)
        assert trainable.everything and trainable.select(parameters) is parameters


def test_moments_in_bfloat16_follow_those_in_float32():
    """The second moment of a constant gradient: rounded to nearest it would stop far below its limit."""
    tx = in_bfloat16(optax.adam(1e-2, b2=0.999))
    params = {"w": jnp.zeros(4096)}
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("bfloat16")}
    update = jax.jit(tx.update)
    for _ in range(700):
        _, state = update({"w": jnp.ones(4096)}, state)
    nu = np.asarray(state.inner[0].nu["w"], np.float32)
    assert nu.mean() == pytest.approx(1 - 0.999**700, rel=0.01)


def test_stochastic_rounding_keeps_the_mean_and_exact_numbers():
    x = jnp.full(20_000, 1 + 1 / 512)  # a quarter of the way from 1 to its neighbour
    up = np.asarray(round_stochastically(x, jnp.uint32(7)), np.float32)
    assert set(up.tolist()) == {1.0, 1.0078125} and up.mean() == pytest.approx(1 + 1 / 512, abs=1e-4)
    exact = jnp.asarray([0.0, 1.0, -2.5, 1e-30])
    exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.array_equal(np.asarray(round_stochastically(exact, jnp.uint32(7)), np.float32), exact)


def test_a_step_with_moments_in_bfloat16(mesh, parameters, gradient, few):
    tx = in_bfloat16(adam())
    state, metrics = step_with(tx, make_state(mesh, parameters, few, tx), gradient, few)
    assert np.isfinite(metrics["loss"]) and {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_unknown_moments(small_config):
    train = small_config.train.copy_and_resolve_references()
    train.moments = "float16"
    with pytest.raises(UserError, match="train.moments"):
        make_optimizer(train)


def muon(config, **changes):
    train = config.train.copy_and_resolve_references()
    train.update(dict(optimizer="muon", warmup=0, decay=False, learning_rate=1e-2, **changes))
    return make_optimizer(train)


def test_muon_steps_along_all_directions_of_a_matrix_alike(mesh, parameters, gradient, small_config):
    tx = muon(small_config)
    looked_at = ("pairs.spatial.attn.*", "pairs.spatial.cross.*", "pairs.spatial.table", "pairs.temporal.mlp.*", "final.*")
    trainable = resolve(parameters, looked_at, TINY.depth)
    before = make_state(mesh, parameters, trainable, tx)
    after, metrics = step_with(tx, before, gradient, trainable)
    assert int(metrics["skipped"]) == 0
    old, width = dict(nnx.to_flat_state(before.params)), TINY.width
    steps = {path: np.asarray(v[...]) - np.asarray(old[path][...]) for path, v in nnx.to_flat_state(after.params)}

    def spread(matrix):  # of the singular values, over the learning rate and the size that gives steps a root mean square of 0.2
        return np.linalg.svd(matrix, compute_uv=False) / (1e-2 * 0.2 * max(matrix.shape) ** 0.5)

    for name in ("attn", "cross"):
        fused = steps[("pairs", "spatial", name, "qkv" if name == "attn" else "kv")]
        for pair in range(TINY.depth):
            for which in range(fused.shape[2]):  # queries, keys and values are matrices of their own
                values = spread(fused[pair, :, which].reshape(width, -1))
                values = values[values > 0.01]  # a few tokens of text give a gradient of few directions
                assert len(values) >= 4 and 0.4 < np.median(values) < 1.3 and values.max() < 1.4
    values = spread(steps[("pairs", "temporal", "mlp", "fc1", "kernel")][1])
    assert values.min() > 0.3 and values.max() < 1.4
    # Everything else goes as with Adam: the first step is the learning rate everywhere, whatever the gradient (with Nesterov momentum, more).
    for path in (("final", "kernel"), ("pairs", "spatial", "table"), ("pairs", "spatial", "attn", "qkv_bias")):
        moved = np.abs(steps[path])[np.abs(steps[path]) > 1e-6]
        assert moved.size and np.median(moved) == pytest.approx(1.4737e-2, rel=0.02)


def test_moments_of_muon_lie_as_their_parameters(small_config):
    mesh = make_mesh(dict(data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1])
    tx = muon(small_config)
    trainable = resolve(abstract_model(TINY)[1], ("pairs[-1].*", "final.*"), TINY.depth)
    trained = jax.eval_shape(trainable.select, abstract_model(TINY)[1])
    marks, state = jax.tree.map(lambda x: str(x.shape), trained), jax.eval_shape(tx.init, trained)
    laid = like_parameters(tx, state, marks, "else")
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(laid), strict=True))
    assert {name for _, name in pairs} == {*jax.tree.leaves(marks), "else"}
    assert all(name in (str(x.shape), "else") and (name == "else") == (x.shape in ((), (3,))) for x, name in pairs)
    shardings = state_shardings(mesh, TINY, tx, trainable)
    assert jax.tree.structure(shardings.opt_state) == jax.tree.structure(state)


def test_muon_with_moments_in_bfloat16_keeps_its_constants(mesh, parameters, gradient, few, small_config):
    tx = muon(small_config, moments="bfloat16")
    state = make_state(mesh, parameters, few, tx)
    constants = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32]
    state, metrics = step_with(tx, state, gradient, few)
    assert np.isfinite(metrics["loss"]) and {x.shape for x in constants} == {(3,)}
    assert same(constants, [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.float32])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.opt_state) if x.ndim > 1)


def test_unknown_optimizer(small_config):
    train = small_config.train.copy_and_resolve_references()
    train.optimizer = "sgd"
    with pytest.raises(UserError, match="train.optimizer='sgd' is unknown; use one of adamw, muon"):
        make_optimizer(train)


def test_first_frames_are_noised_in_a_share_of_the_samples_and_never_counted():
    clip = jax.tree.map(lambda x: jnp.concatenate([jnp.asarray(x)] * 64), make_clip())
    first = jnp.arange(clip["latents"].shape[2]) < clip["conditioning"][:, None]
    drawn = jax.jit(draw, static_argnums=2)
    plain, noised = (drawn(clip, KEY, objective) for objective in (OBJECTIVE, dataclasses.replace(OBJECTIVE, context_rate=0.5, context_level=0.2)))
    np.testing.assert_array_equal(jnp.where(first, 0, noised.levels), jnp.where(first, 0, plain.levels))
    np.testing.assert_array_equal(noised.clean, plain.clean)  # so they stay out of the loss
    levels = np.asarray(jnp.where(first, noised.levels, 0).max(-1))
    assert 0.35 < (levels > 0).mean() < 0.65 and levels.max() <= 0.2 and levels[levels > 0].std() > 0.03
