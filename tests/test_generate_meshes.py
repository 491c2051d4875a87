"""Videos made on a mesh are those of one device: `tests/generate_probe.py` in one child process with eight host devices."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.generate import Generator
from mila_jax.rollout_program import evaluations, generation_mesh
from tests.generate_probe import make_config, make_model, make_starts, with_smaller_guide
from tests.host_devices import chosen_slow, host_devices

ONE = dict(data=1, fsdp=1, context=1, tensor=1)
CASES = {
    "one": dict(mesh=ONE, mode="context", videos=2), "data": dict(mesh=ONE | dict(data=4), mode="none", videos=2),
    "passes": dict(mesh=ONE | dict(data=-1), mode="none", videos=1), "context": dict(mesh=ONE | dict(data=2, context=2, tensor=2), mode="context", videos=2),
    "heads": dict(mesh=ONE | dict(data=2, fsdp=2, context=2), mode="heads", videos=1), "kv_gather": dict(mesh=ONE | dict(context=4), mode="kv_gather", videos=2),
    # With a guide, a weaker model. Passes: those with and without text are split over `data`, and the guide sees the one video whole.
    "guide": dict(mesh=ONE, mode="none", videos=2, guide=True), "guide_split": dict(mesh=ONE | dict(data=2, context=2), mode="context", videos=2, guide=True),
    "guide_passes": dict(mesh=ONE | dict(data=2, fsdp=2), mode="none", videos=1, guide=True),
}  # fmt: skip


FAST = ("one", "context", "guide", "guide_passes")  # the others compile for another minute and a half
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """name/what → array, of the cases that the chosen tests are about."""
    folder = tmp_path_factory.mktemp("meshes")
    cases = {name: case for name, case in CASES.items() if name in FAST or chosen_slow(request)}
    (folder / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [sys.executable, "-m", "tests.generate_probe", str(folder / "cases.json"), str(folder / "out.npz")], capture_output=True, text=True,
        env=host_devices(8), cwd=pathlib.Path(__file__).parents[1], timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(folder / "out.npz") as z:
        return {k: z[k] for k in z.files}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("one", "guide")])
def test_mesh_equals_one_device(results, name):
    expected = results["guide/latents" if CASES[name].get("guide") else "one/latents"][: CASES[name]["videos"]]
    assert np.abs(expected).max() > 0.5 and np.isfinite(expected).all()
    np.testing.assert_allclose(results[f"{name}/latents"], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_streaming_and_resuming_give_the_same_bits_on_a_mesh(results, name):
    assert np.array_equal(results[f"{name}/windows"], results[f"{name}/resumed"])
    new = np.moveaxis(results[f"{name}/windows"][1:, :, :, 2:], 0, 2)  # behind the coarse window
    streamed = new.reshape(new.shape[:2] + (-1,) + new.shape[4:])[:, :, :10]
    assert np.array_equal(streamed, results[f"{name}/latents"])


def test_the_guide_counts(results):
    plain, guided = results["one/latents"], results["guide/latents"]
    assert np.abs(guided - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_is_used(results, name):
    """Devices, and parts of a parameter over tensor and fsdp."""
    expected = {
        "one": (1, 1), "data": (4, 1), "context": (8, 2), "heads": (8, 2), "kv_gather": (4, 1), "guide": (1, 1), "guide_split": (4, 1),
        "guide_passes": (4, 2), "passes": (2, 1),  # no more than there are passes
    }  # fmt: skip
    assert (int(results[f"{name}/devices"]), int(results[f"{name}/split"])) == expected[name]


def test_meshes_that_do_not_fit_name_the_key():
    config = load_config("configs/tiny.py")
    assert evaluations(config.generate, 3) == 3
    config.generate.update(guidance_text=2.0, guidance_waypoints=3.0)
    assert evaluations(config.generate, 3) == 9
    config.generate.guidance_batched = False
    assert evaluations(config.generate, 3) == 3
    devices = list(range(8))
    for sizes, samples, message in [
        (dict(data=3), 3, "mesh sizes"),
        (dict(data=8), 3, "mesh.data=8 does not divide 3"),
        (dict(context=3), 1, "mesh sizes"),
    ]:
        config.mesh.update(ONE | dict(data=-1) | sizes)
        with pytest.raises(UserError, match=message):
            generation_mesh(config.mesh, samples, devices)
    config = make_config()
    config.mesh.update(ONE)
    config.attention.parallel = "nowhere"
    with pytest.raises(UserError, match="attention.parallel='nowhere'"):
        Generator(make_model(config), config)
    config = make_config()
    config.mesh.update(ONE | dict(tensor=4))
    with pytest.raises(UserError, match="the guide's model.heads=2 is not a multiple of mesh.tensor=4"):
        Generator(with_smaller_guide(make_model(config)), config, devices=jax.devices()[:1] * 4)


def test_one_device_takes_any_number_of_videos():
    generator = Generator(make_model(make_config()), make_config())
    assert generator.layout.mesh.size == 1
    assert generator.job(make_starts(2), 10).first.shape[0] == 2
