"""The shipped configs: what each is meant to be, and the published state dict that configs/xl.py loads."""

import collections.abc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mila_jax.config import load_config
from mila_jax.model import stdit3_weights
from mila_jax.model.dit import DiTConfig
from mila_jax.model.network import dit_config

MATRIX = {  # in every block of STDiT3-XL/2, hpcaitech/Open-Sora, branch opensora/v1.2
    "scale_shift_table": (6, 1152), "attn.qkv.weight": (3456, 1152), "attn.qkv.bias": (3456,), "attn.q_norm.weight": (72,), "attn.k_norm.weight": (72,),
    "attn.proj.weight": (1152, 1152), "attn.proj.bias": (1152,), "cross_attn.q_linear.weight": (1152, 1152), "cross_attn.q_linear.bias": (1152,),
    "cross_attn.kv_linear.weight": (2304, 1152), "cross_attn.kv_linear.bias": (2304,), "cross_attn.proj.weight": (1152, 1152),
    "cross_attn.proj.bias": (1152,), "mlp.fc1.weight": (4608, 1152), "mlp.fc1.bias": (4608,), "mlp.fc2.weight": (1152, 4608), "mlp.fc2.bias": (1152,),
}  # fmt: skip
OTHERS = {
    "rope.freqs": (36,), "x_embedder.proj.weight": (1152, 4, 1, 2, 2), "x_embedder.proj.bias": (1152,), "t_block.1.weight": (6912, 1152),
    "t_block.1.bias": (6912,), "y_embedder.y_embedding": (300, 4096), "y_embedder.y_proj.fc1.weight": (1152, 4096), "y_embedder.y_proj.fc1.bias": (1152,),
    "y_embedder.y_proj.fc2.weight": (1152, 1152), "y_embedder.y_proj.fc2.bias": (1152,), "final_layer.scale_shift_table": (2, 1152),
    "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
}  # fmt: skip
for _name in ("t_embedder", "fps_embedder"):
    OTHERS |= {
        f"{_name}.mlp.0.weight": (1152, 256),
        f"{_name}.mlp.0.bias": (1152,),
        f"{_name}.mlp.2.weight": (1152, 1152),
        f"{_name}.mlp.2.bias": (1152,),
    }
PUBLISHED = OTHERS | {f"{kind}_blocks.{i}.{name}": shape for kind in ("spatial", "temporal") for i in range(28) for name, shape in MATRIX.items()}


def sizes(preset: str) -> DiTConfig:
    """The network of a preset, with latents and texts as its `plan` section says."""
    c = load_config(f"configs/{preset}.py")
    return dit_config(c.model, c.plan.latent_channels, c.data.image_size, c.plan.text_width, c.text.length, c.attention)


def count(config: DiTConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(stdit3_weights.abstract_parameters(config)))


def test_xl_is_the_published_model():
    assert len(PUBLISHED) == 973
    shapes = stdit3_weights.published_shapes(sizes("xl"))
    assert shapes == {k: v for k, v in PUBLISHED.items() if k != "rope.freqs"}
    # 1,207,643,972 in the published parameters, of which 36 are rope's constants; the null text is a buffer there.
    assert sum(int(np.prod(s)) for s in shapes.values()) == 1_207_643_972 - 36 + 300 * 4096


def test_all_973_names_go_both_ways():
    """Depth 28 with every name, at a width that fits a test; the published shapes are the test above and the slow one below."""
    config = DiTConfig(width=16, depth=28, heads=2, text_width=6, text_length=5, new_embeddings=False)
    r = np.random.default_rng(0)
    state = {k: r.normal(size=s).astype(np.float32) for k, s in stdit3_weights.published_shapes(config).items()} | {
        "rope.freqs": np.zeros(4, np.float32)
    }
    assert set(state) == set(PUBLISHED)
    params = stdit3_weights.load(stdit3_weights.abstract_parameters(config), config, state)
    again = stdit3_weights.save(params, config)
    assert set(again) == set(state) - {"rope.freqs"} and all(np.array_equal(again[k], state[k]) for k in again)
    flat = {".".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(params)}
    for i in (0, 27):  # block i of the published model is row i of ours, inputs first
        np.testing.assert_array_equal(flat["pairs.temporal.mlp.fc1.kernel"][i], state[f"temporal_blocks.{i}.mlp.fc1.weight"].T)
        np.testing.assert_array_equal(flat["pairs.spatial.attn.qkv"][i][:, 2, 1], state[f"spatial_blocks.{i}.attn.qkv.weight"][40:48].T)


def test_shorter_texts_take_the_first_null_tokens():
    config = DiTConfig(width=16, depth=1, heads=2, text_width=6, text_length=5, new_embeddings=False)
    state = {k: np.ones(s, np.float32) for k, s in stdit3_weights.published_shapes(config).items()}
    state["y_embedder.y_embedding"] = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    params = stdit3_weights.load(stdit3_weights.abstract_parameters(config), config, state)
    np.testing.assert_array_equal(params["text"]["null"][...], state["y_embedder.y_embedding"][:5])


class PublishedState(collections.abc.Mapping):
    """A state dict of the published names and shapes whose tensors are made when they are read: it never lies in memory as a whole."""

    def __init__(self):
        self._random = np.random.default_rng(0).normal(size=1 << 20).astype(jnp.bfloat16)

    def __getitem__(self, name):
        start = sum(name.encode()) * 7919 % 4099
        return np.resize(self._random[start:], PUBLISHED[name])

    def __iter__(self):
        return iter(PUBLISHED)

    def __len__(self):
        return len(PUBLISHED)


@pytest.mark.slow
def test_the_published_size_loads_and_saves():
    """In bfloat16, 2.4 GB: half of what the parameters take in training."""
    config, state = sizes("xl"), PublishedState()
    params = stdit3_weights.load(stdit3_weights.abstract_parameters(config), config, state, dtype=jnp.bfloat16)
    again = stdit3_weights.save(params, config)
    for name in list(again):
        assert np.array_equal(again.pop(name), state[name]), name


@pytest.mark.parametrize(
    "preset, millions, head, tokens",
    [("xl", 1213, 72, 2688), ("xl128", 1213, 128, 2688), ("v6e", 1265, 128, 2688), ("base", 311, 128, 2688), ("small", 59, 128, 672)],
)  # fmt: skip
def test_presets_are_what_they_say(preset, millions, head, tokens):
    c, dit = load_config(f"configs/{preset}.py"), sizes(preset)
    rows, columns = (s // c.plan.compression // p for s, p in zip(c.data.image_size, dit.patch[1:]))
    assert (dit.width // dit.heads, 6 * rows * columns) == (head, tokens)
    assert count(dit) / 1e6 == pytest.approx(millions, rel=0.01)
    if preset == "v6e":
        assert dit.width % 256 == 0
