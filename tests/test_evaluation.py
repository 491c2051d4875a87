"""What a run shows of itself: losses of each kind of window, and a generated clip as a picture."""

import jax
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.train.evaluation import LEVELS, Evaluation
from mila_jax.train.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(small_config, tmp_path_factory):
    c = small_config.copy_and_resolve_references()
    c.train.dir = str(tmp_path_factory.mktemp("run"))
    c.model.precondition = "none"
    c.train.eval_steps = 3
    return Trainer(c)


@pytest.fixture(scope="module")
def params(trainer):
    with jax.set_mesh(trainer.mesh):
        return trainer.initial_state().params


def test_losses_of_each_task_at_each_level(trainer, params):
    with jax.set_mesh(trainer.mesh):
        evaluation = Evaluation(trainer)
        first, again = evaluation.losses(params), Evaluation(trainer).losses(params)
    assert first == again  # the same windows, noise and levels
    tasks = ["12Hz_from_2", "12Hz_from_1", "2Hz_from_2", "2Hz_from_2_at_2Hz"]
    assert list(evaluation.tasks) == tasks
    for prefix in ("eval/", *(f"eval/{t}/" for t in tasks)):
        levels = [first[f"{prefix}loss_at_{level:.2f}"] for level in LEVELS]
        assert first[f"{prefix}loss"] == pytest.approx(np.mean(levels)) and all(np.isfinite(levels))
    assert first["eval/loss"] == pytest.approx(np.mean([first[f"eval/{t}/loss"] for t in tasks]))
    assert len({first[f"eval/{t}/loss"] for t in tasks}) == 4


def test_a_picture_of_generated_over_recorded_frames(trainer, params):
    with jax.set_mesh(trainer.mesh):
        picture = Evaluation(trainer).picture(params)
    # Three times of six views (two rows of three), generated ones above recorded ones.
    assert picture.shape == (2 * 2 * 32, 3 * 3 * 48, 3) and picture.dtype == np.uint8
    top, bottom = picture[:64, :144], picture[64:, :144]
    assert not np.array_equal(top, bottom) and bottom.std() > 1


def test_no_picture_with_another_autoencoder(trainer, params, monkeypatch):
    monkeypatch.setitem(trainer.data, "autoencoder_sha256", "0")
    with pytest.raises(UserError, match="autoencoder.path"), jax.set_mesh(trainer.mesh):
        Evaluation(trainer).picture(params)
