"""Compiler options reach the programs of TPUs and of nothing else."""

import types

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.model.splash import BLOCKS, OTHER_BLOCK, largest_block
from mila_jax.parallel.aot.chips import CHIPS, chip_name
from mila_jax.parallel.compiler_options import OPTIONS, compiler_options, options_of
from mila_jax.parallel.mesh import make_mesh
from mila_jax.train.speed import peak_flops
from configs import tiny


def test_the_host_gets_none():
    assert jax.devices()[0].platform == "cpu"
    assert compiler_options("cpu") is None
    config = tiny.get_config()
    assert options_of(NamedSharding(make_mesh(config.mesh, jax.devices()[:1]), P())) is None
    jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))(1.0)


def test_every_known_tpu_gets_its_own():
    assert set(OPTIONS) == set(BLOCKS) == set(CHIPS)
    assert all(isinstance(value, str) for options in OPTIONS.values() for value in options.values())


@pytest.mark.parametrize("chip, kinds", [
    ("v5e", ("TPU v5 lite", "TPU v5e")), ("v5p", ("TPU v5", "TPU v5p")), ("v6e", ("TPU v6 lite", "TPU v6e")), ("tpu7x", ("TPU7x", "TPU v7x")),
])  # fmt: skip
def test_a_chip_has_its_settings_under_either_name(monkeypatch, chip, kinds):
    """Runtimes differ in what they call it."""
    monkeypatch.setitem(BLOCKS, chip, 640)
    for kind in kinds:
        assert chip_name(kind) == chip
        assert compiler_options(kind) == OPTIONS[chip] and largest_block(kind) == 640
        assert peak_flops(types.SimpleNamespace(device_kind=kind)) == CHIPS[chip].peak
    assert chip_name("TPU v4") is None and compiler_options("TPU v4") is None and largest_block("TPU v4") == OTHER_BLOCK


def test_the_host_would_refuse_them():
    with pytest.raises(Exception, match="windowed_einsum"):
        jax.jit(lambda x: x + 1, compiler_options=OPTIONS["v5p"])(1.0)
