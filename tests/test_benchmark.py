"""The PyTorch network of scripts/benchmark_cpu.py computes what our backbone computes; skipped where PyTorch is not installed."""

import importlib.util
import pathlib

import numpy as np
import pytest

from mila_jax.model.dit import DiTConfig

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_networks_agree(monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is in the benchmark's environment only")
    monkeypatch.syspath_prepend(SCRIPTS)
    benchmark = load("benchmark_cpu")
    for name, value in (("FRAMES", 3), ("ROWS", 4), ("COLUMNS", 6), ("TEXT", 5)):
        monkeypatch.setattr(benchmark, name, value)
    config = DiTConfig(
        width=32, depth=2, heads=2, in_channels=4, out_channels=4, text_width=12, text_length=5, image_size=(32, 48), new_embeddings=False, pred_sigma=False
    )  # fmt: skip
    arrays = benchmark.inputs(config)
    weights, *ours = benchmark.ours(config, arrays)
    output, gradient = benchmark.differences(ours, benchmark.theirs(config, weights, arrays, 1))
    assert output <= benchmark.OUTPUT_TOLERANCE and gradient <= benchmark.GRADIENT_TOLERANCE


def test_functions_alternate_and_the_first_round_does_not_count():
    benchmark, calls = load("benchmark_cpu"), []
    medians = benchmark.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(medians) == {"a", "b"} and np.isfinite(list(medians.values())).all()
