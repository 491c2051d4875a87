"""Compiler options reach the programs of TPUs and of nothing else."""

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.parallel.compiler_options import OPTIONS, compiler_options, options_of
from mila_jax.parallel.mesh import make_mesh
from configs import tiny


def test_the_host_gets_none():
    assert jax.devices()[0].platform == "cpu"
    assert compiler_options("cpu") is None
    config = tiny.get_config()
    assert options_of(NamedSharding(make_mesh(config.mesh, jax.devices()[:1]), P())) is None
    jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))(1.0)


def test_every_known_tpu_gets_its_own():
    from mila_jax.model.splash import BLOCKS

    assert set(OPTIONS) == set(BLOCKS)
    assert all(isinstance(value, str) for options in OPTIONS.values() for value in options.values())


def test_the_host_would_refuse_them():
    with pytest.raises(Exception, match="windowed_einsum"):
        jax.jit(lambda x: x + 1, compiler_options=OPTIONS["TPU v5"])(1.0)
