"""Every mode of attention parallelism is the one-device computation, with the collectives that it is meant to have.

The modes run in one child process with eight host devices (`tests/parallel_probe.py`), the very training step that is trained with.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.host_devices import chosen_slow, host_devices

ONE = dict(data=1, fsdp=1, context=1, tensor=1)
SPLIT = ONE | dict(fsdp=2, context=2, tensor=2)
CASES = {
    "one": dict(mesh=ONE, mode="none"), "none": dict(mesh=ONE | dict(data=2, fsdp=2, tensor=2), mode="none"),
    "context": dict(mesh=SPLIT, mode="context"), "once": dict(mesh=SPLIT, mode="context", gather="step"),
    "heads": dict(mesh=SPLIT, mode="heads"), "kv_gather": dict(mesh=SPLIT, mode="kv_gather"),
    "accumulated": dict(mesh=ONE | dict(data=2), mode="none", accumulate=2),
    "accumulated_zero": dict(mesh=ONE | dict(data=2), mode="none", rules={"embed": ["data", "fsdp"]}, accumulate=2),  # parameters over data, too
    "accumulated_split": dict(mesh=ONE | dict(data=2, context=2, tensor=2), mode="context", accumulate=2),
    "detail_one": dict(mesh=ONE, mode="none", detail=8), "detail": dict(mesh=SPLIT, mode="context", detail=8),
}  # fmt: skip
MODES = ("none", "context", "heads", "kv_gather")
CHECKED = (*MODES, pytest.param("once", marks=pytest.mark.slow))  # once: kernels are gathered once a step
SLOW = ("once", "accumulated_zero", "accumulated_split", "detail_one", "detail")

# What the compiler of jax 0.10 makes of the step at these sizes (depth 2, scanned). A change that needs more has to be explained here.
#
# all-to-all: three small ones are of the embeddings. `context` adds the stream's: in the scanned pair one before and one after the
# temporal block, forward and backward, and two at the ends; `heads` adds those of q, k, v and of the result, each twice.
# all-gather: of kernels over fsdp, those of q, k and v one by one (kv_gather: also k and v). The CPU's compiler never makes a
# reduce-scatter of an all-reduce.
# all-reduce: of gradients, and of the sums of squares of their norm, which the update waits for; several arrays in one, outside the loop.
MOST = {
    "none": {"all-to-all": 3, "all-gather": 68, "reduce-scatter": 0, "all-reduce": 29, "collective-permute": 4},
    "context": {"all-to-all": 9, "all-gather": 69, "reduce-scatter": 0, "all-reduce": 44, "collective-permute": 28},
    "once": {"all-to-all": 9, "all-gather": 49, "reduce-scatter": 0, "all-reduce": 43, "collective-permute": 24},
    "heads": {"all-to-all": 13, "all-gather": 70, "reduce-scatter": 0, "all-reduce": 47, "collective-permute": 28},
    "kv_gather": {"all-to-all": 3, "all-gather": 70, "reduce-scatter": 0, "all-reduce": 45, "collective-permute": 28},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """name → dict of arrays; `told`: loss and collectives; of the cases that the chosen tests are about."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "cases.json").write_text(json.dumps({name: case for name, case in CASES.items() if name not in SLOW or chosen_slow(request)}))
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel_probe", str(folder / "cases.json"), str(folder / "out.npz")], capture_output=True, text=True,
        env=host_devices(8), cwd=pathlib.Path(__file__).parents[1], timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(folder / "out.npz") as z:
        return {k: z[k] for k in z.files} | {"told": json.loads(str(z["told"]))}


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[pytest.mark.slow] * (mode in SLOW)) for mode in CASES if not mode.endswith("one")])
def test_mode_equals_one_device(results, mode):
    """Velocity, loss and the gradient of every parameter, each against the largest value of its array."""
    told, one = results["told"], "detail_one" if mode == "detail" else "one"
    np.testing.assert_allclose(told[mode]["loss"], told[one]["loss"], rtol=1e-5)
    names = [k.removeprefix(f"{one}/") for k in results if k.startswith(f"{one}/")]
    if "accumulate" in CASES[mode]:
        names.remove("velocity")  # is of no parts
    assert len(names) > 60
    for name in names:
        expected, found = results[f"{one}/{name}"], results[f"{mode}/{name}"]
        largest = np.abs(expected).max()
        assert largest > 1e-4, f"{name} does not take part"
        np.testing.assert_allclose(found, expected, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("mode", CHECKED)
def test_mode_has_no_more_collectives_than_it_is_meant_to(results, mode):
    found = results["told"][mode]["collectives"]
    assert not sum(results["told"]["one"]["collectives"].values())
    assert all(found[kind] <= most for kind, most in MOST[mode].items()), f"{found} against {MOST[mode]}"


def test_modes_differ_as_they_are_meant_to(results):
    told = {mode: results["told"][mode]["collectives"] for mode in MODES}
    assert told["none"]["all-to-all"] == told["kv_gather"]["all-to-all"] < told["context"]["all-to-all"] < told["heads"]["all-to-all"]
    assert told["kv_gather"]["all-gather"] > told["context"]["all-gather"]


def test_accumulated_gradients_meet_once(results):
    """Parts of a batch one after the other, data parallel: one all-reduce for everything, outside of all loops, and nothing is gathered."""
    told = results["told"]["accumulated"]
    assert told["collectives"] == told["outside"] == {kind: int(kind == "all-reduce") for kind in told["outside"]}


@pytest.mark.slow
def test_parameters_that_lie_over_data_are_gathered(results):
    assert results["told"]["accumulated_zero"]["collectives"]["all-gather"] > 0
