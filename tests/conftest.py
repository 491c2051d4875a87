"""Shared fixtures: recorded numbers of the original code, and a small encoded data set with a small model."""

import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run for moments and compile for seconds: hardly optimised machine code takes half the time in all. What is
# fused, split or sent, and where arrays lie, is decided before. Whoever names a level keeps it, as `scripts/test.sh --slow` does.
LEVEL = "--xla_backend_optimization_level"
if LEVEL not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {LEVEL}=1".strip()
# NumPy's products and eigenvalues here are small; threads of theirs would only wait, spinning, for cores that other workers have.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
XLA_FLAGS = os.environ["XLA_FLAGS"]  # before a command run by some test sets its own

import jax
import numpy as np
import pytest

DATA = pathlib.Path(__file__).parent / "data"

# Compiled programs are kept between runs of the suite; results do not depend on it.
_cache = pathlib.Path(os.environ.get("MILA_TEST_CACHE", pathlib.Path.home() / ".cache" / "mila_jax_tests"))
_cache.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


# Files that take longest, first of all, or they would be what one of two workers still does when the other has nothing left.
LONGEST = ("test_several_processes", "test_train_step", "test_demo", "test_generate_meshes", "test_generate", "test_parallel_modes")


def pytest_collection_modifyitems(items):
    """The order of the files. Tests marked tpu_backend compile for TPUs ahead of time: they are skipped where the compiler is not installed."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("tpu_backend"):
                item.add_marker(pytest.mark.skip(reason="libtpu is not installed: pip install 'jax[tpu]' (no TPU is needed)"))


@pytest.fixture(scope="session")
def golden():
    """golden("stdit3_A") → dict of arrays of tests/data/stdit3_A.npz (numbers of the original PyTorch code)."""

    def load(name):
        with np.load(DATA / f"{name.removesuffix('.npz')}.npz", allow_pickle=False) as z:
            return {k: z[k] for k in z.files}

    return load


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """A config of configs/tiny.py at a size that compiles in seconds, whose data set is written, encoded and ready.

    The autoencoder has random weights: these tests are about the machinery, not about pictures.
    """
    from flax import nnx

    import tests.nuscenes_stub as stub
    from data_pipeline.simulator.write import SimulatorConfig, simulate
    from mila_jax.config import load_config
    from mila_jax.model.autoencoder import AutoencoderConfig, AutoencoderKL
    from mila_jax.model.autoencoder_weights import save_autoencoder
    from mila_jax.prepare import prepare

    root = tmp_path_factory.mktemp("small")
    config = load_config("configs/tiny.py")
    config.data.image_size = (32, 48)
    config.simulate.height, config.simulate.width = 32, 48
    config.data.nuscenes, config.data.dir, config.train.dir = str(root / "nuscenes"), str(root / "encoded"), str(root / "train")
    config.autoencoder.path = str(root / "autoencoder.safetensors")
    config.text.encoder, config.text.length = "table", 8
    config.model.width, config.model.depth, config.model.heads, config.model.fourier_bands = 16, 1, 2, 2
    config.model.sweep = 2  # corridors are most of such a small program (all nine: tests/test_model_evidence.py)
    config.model.detail = 0  # tests/test_model_detail.py
    config.window.frames, config.window.conditioning = 8, 2
    config.train.batch, config.train.steps, config.train.warmup, config.train.log_every = 4, 8, 2, 2
    config.train.checkpoint_every, config.train.eval_every, config.train.eval_batches = 4, 0, 1
    config.train.fps, config.train.fps_weights, config.train.single_frame = (12.0, 2.0), (0.6, 0.4), 0.1
    config.train.optimizer = "adamw"
    config.generate.steps = 2
    simulate(config.data.nuscenes, SimulatorConfig(scenes=3, seconds=7.0, height=32, width=48), False, stub.World, stub.Renderer)
    sizes = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, pixel_unshuffle=4)
    with nnx.use_eager_sharding(False):
        params = nnx.state(AutoencoderKL(sizes, rngs=nnx.Rngs(0)))
    save_autoencoder(config.autoencoder.path, sizes, params, np.zeros(4, np.float32), np.ones(4, np.float32), {"note": "random"})
    prepare(config, progress=False)
    return config
