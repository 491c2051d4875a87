"""The T5 v1.1 encoder in JAX, from published safetensors: Open-Sora's text encoder (T5 v1.1 XXL: 24 layers, 4096 channels).

Sizes are read from the tensors, so any encoder of the v1.1 kind loads (gated GELU, relative positions shared by all layers, no biases);
decoder tensors in the same file are passed over. Texts become token ids by a sentencepiece model (`spiece.model`) or a `tokenizer.json`.
Source of the architecture: transformers, models/t5/modeling_t5.py (`T5EncoderModel`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.model.captions import check_libraries, clean_caption
from mila_jax.model.weight_files import TORCH, local_file, read_tensors

MAX_DISTANCE = 128  # of relative positions that have a bucket of their own; the same in every published model
EPSILON = 1e-6
PAD, END = 0, 1  # token ids


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder."""

    layers: int
    width: int
    heads: int
    head_width: int
    mlp_width: int
    buckets: int
    vocabulary: int


def infer_t5_config(tensors: Mapping[str, np.ndarray]) -> T5Config:
    """Sizes from names and shapes. `UserError` for a missing tensor, and for T5 1.0, whose MLP is another."""

    def shape(name):
        if name not in tensors:
            raise UserError(f"T5 weights: tensor {name!r} is missing; is this a T5 v1.1 encoder?")
        return tensors[name].shape

    vocabulary, width = shape("shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight")
    buckets, heads = shape("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.block.")})
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in tensors:
        raise UserError("T5 weights: this is a T5 1.0 (one input projection in its MLP); give a v1.1 encoder")
    inner = shape("encoder.block.0.layer.0.SelfAttention.q.weight")[0]
    if inner % heads:
        raise UserError(f"T5 weights: {inner} attention channels do not divide into {heads} heads; the tensors do not belong together")
    return T5Config(layers, width, heads, inner // heads, shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0], buckets, vocabulary)


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Published name → shape of every tensor of the encoder but the token embedding."""
    inner, d, m = config.heads * config.head_width, config.width, config.mlp_width
    out = {"encoder.final_layer_norm.weight": (d,)}
    out["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (config.buckets, config.heads)
    for i in range(config.layers):
        block = f"encoder.block.{i}.layer"
        out |= {f"{block}.0.SelfAttention.{part}.weight": (inner, d) for part in "qkv"}
        out |= {f"{block}.0.SelfAttention.o.weight": (d, inner), f"{block}.1.DenseReluDense.wo.weight": (d, m)}
        out |= {f"{block}.1.DenseReluDense.{part}.weight": (m, d) for part in ("wi_0", "wi_1")}
        out |= {f"{block}.{j}.layer_norm.weight": (d,) for j in (0, 1)}
    return out


def check_tensors(tensors: Mapping[str, np.ndarray], config: T5Config) -> None:
    """`UserError` naming the tensor of the encoder that is missing, has the wrong shape, or is not known."""
    wanted = t5_shapes(config)
    for name, shape in wanted.items():
        if name not in tensors:
            raise UserError(f"T5 weights: tensor {name!r} is missing; is this a complete T5 v1.1 encoder?")
        if tensors[name].shape != shape:
            raise UserError(f"T5 weights: tensor {name!r} has shape {tuple(tensors[name].shape)}, not {shape}; the tensors do not belong together")
    unknown = [name for name in tensors if name.startswith("encoder.") and name not in wanted and name != "encoder.embed_tokens.weight"]
    if unknown:
        raise UserError(f"T5 weights: unknown tensor {unknown[0]!r} ({len(unknown)} in all); is this a T5 v1.1 encoder?")


def position_buckets(length: int, buckets: int) -> np.ndarray:
    """Bucket of each query-key pair, int [length, length]: exact up to a quarter of the buckets, then logarithmic, keys behind and ahead apart."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), 1)
    # float32, as in the original: the logarithm of a bucket's edge falls on either side of it.
    steps = np.log(far.astype(np.float32) / np.float32(exact)) / np.float32(np.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
    large = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(np.abs(distance) < exact, np.abs(distance), large) + half * (distance > 0)


def t5_forward(weights: Mapping[str, jax.Array], config: T5Config, words: jax.Array, mask: jax.Array) -> jax.Array:
    """Token embeddings [n, l, d] and mask bool [n, l] (True at tokens) -> last hidden state [n, l, d], zero at padding."""
    n, length, _ = words.shape

    def norm(x, name):
        # No mean is taken away, and the variance is float32 whatever the weights are.
        variance = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(variance + EPSILON)).astype(x.dtype) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    bias = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][position_buckets(length, config.buckets)]
    bias = jnp.moveaxis(bias, -1, 0)[None].astype(jnp.float32)
    bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
    x = words
    for i in range(config.layers):
        block = f"encoder.block.{i}.layer"
        y = norm(x, f"{block}.0.layer_norm")
        q, k, v = (linear(y, f"{block}.0.SelfAttention.{part}").reshape(n, length, config.heads, -1) for part in "qkv")
        logits = jnp.einsum("nqhe,nkhe->nhqk", q, k, preferred_element_type=jnp.float32) + bias  # not scaled
        y = jnp.einsum("nhqk,nkhe->nqhe", jax.nn.softmax(logits, -1).astype(x.dtype), v).reshape(n, length, -1)
        x = x + linear(y, f"{block}.0.SelfAttention.o")
        y = norm(x, f"{block}.1.layer_norm")
        gate = jax.nn.gelu(linear(y, f"{block}.1.DenseReluDense.wi_0"), approximate=True)
        x = x + linear(gate * linear(y, f"{block}.1.DenseReluDense.wi_1"), f"{block}.1.DenseReluDense.wo")
    return jnp.where(mask[..., None], norm(x, "encoder.final_layer_norm"), 0)


def open_tokenizer(path):
    """texts -> lists of token ids, each ended by `END`, from a sentencepiece model or a tokenizer.json.

    Raises `UserError` naming the file, and when sentencepiece is not installed.
    """
    file = local_file(path)
    if not file.exists():
        raise UserError(f"{path} does not exist; set text.tokenizer to the model's spiece.model or tokenizer.json")
    if file.suffix == ".json":
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises its own base class
            raise UserError(f"{path} is not a readable tokenizer.json ({error}); get it again") from None
        check_ends(path, tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>"))
        tokenizer.no_padding(), tokenizer.no_truncation()
        return lambda texts: [[i for i in t.ids if i != END] + [END] for t in tokenizer.encode_batch(list(texts))]
    try:
        import sentencepiece
    except ImportError:
        raise UserError("sentencepiece is not installed; pip install 'mila_jax[t5]', or give the model's tokenizer.json") from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model ({str(error).splitlines()[0][:120]}); get it again") from None
    check_ends(path, model.pad_id(), model.eos_id())
    return lambda texts: [model.encode(text) + [END] for text in texts]


def check_ends(path, pad: int | None, end: int | None) -> None:
    """Raises `UserError` naming the file for a tokenizer that marks padding and ends with other ids than T5's."""
    if (pad, end) != (PAD, END):
        raise UserError(
            f"{path} is not T5's tokenizer: its padding and end are {pad} and {end}, T5's {PAD} and {END}; set text.tokenizer to T5 v1.1's"
        )


class T5:
    """A text encoder (see `mila_jax.model.text.TextEncoder`); tokens come as float16, since 4096 channels are many.

    Its name is t5 where texts are cleaned before (`captions.clean_caption`, as Open-Sora 1.2 does with prompts), else t5-raw.
    """

    def __init__(self, path, tokenizer=None, length: int = 300, dtype=None, clean: bool = True):
        """path: weights (a file, a folder, an address); tokenizer: spiece.model or tokenizer.json, default beside the weights.

        dtype: of the computation; float32 on CPUs, bfloat16 elsewhere. Weights are split over this host's devices. clean: texts first.
        Raises `UserError` naming the file, the tensor, or the library for cleaning that is not installed.
        """
        if length < 2:
            raise UserError(f"text length {length} has no room for a token and its end; change text.length")
        self.name, self._clean = ("t5", clean_caption) if clean else ("t5-raw", str)
        if clean:
            check_libraries()
        tensors, _, self.sha256 = read_tensors(path)
        config = infer_t5_config(tensors)
        check_tensors(tensors, config)
        self.length, self.width, self._config = length, config.width, config
        self._tokenize = open_tokenizer(tokenizer or find_tokenizer(path))
        self._dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
        self._words = tensors["shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"]  # stays on the host
        self._weights = {name: self._place(tensors[name]) for name in t5_shapes(config)}
        self._forward = jax.jit(lambda weights, words, mask: t5_forward(weights, config, words, mask))

    def _place(self, tensor: np.ndarray) -> jax.Array:
        """A tensor on this host's devices, rows split over them where they divide."""
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("rows",))
        axes = ("rows",) if tensor.ndim == 2 and tensor.shape[0] % mesh.size == 0 else ()
        return jax.device_put(tensor.astype(self._dtype), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """n texts -> tokens float16 [n, length, width], zero at padding, and mask bool [n, length]; longer texts are cut.

        Each text is encoded on its own, so that its bytes do not depend on the others. Raises `UserError` for values beyond float16.
        """
        mask = np.zeros((len(texts), self.length), bool)
        out = np.zeros((len(texts), self.length, self.width), np.float16)
        for row, ids in enumerate(self._tokenize([self._clean(text) for text in texts])):
            ids = ids[: self.length - 1] + [END] if len(ids) > self.length else ids
            if max(ids) >= self._config.vocabulary:
                raise UserError(
                    f"token {max(ids)} of {texts[row]!r} is beyond T5's {self._config.vocabulary} words; text.tokenizer is another model's"
                )
            mask[row, : len(ids)] = True
            padded = np.asarray(self._words[ids + [PAD] * (self.length - len(ids))])[None].astype(self._dtype)
            with np.errstate(over="ignore"):
                out[row] = np.asarray(self._forward(self._weights, padded, mask[row][None])[0], np.float32)
        if not np.isfinite(out).all():
            raise UserError("T5 gives values that float16 does not hold; its weights are not those of a v1.1 encoder")
        return out, mask


def find_tokenizer(path):
    """The tokenizer file beside the weights; `UserError` when there is none."""
    from data_pipeline.storage import Folder, is_remote

    text = str(path)
    if text.endswith((".safetensors", *TORCH)):
        text = text.rpartition("/")[0] if is_remote(text) else str(Path(text).parent)
    folder = Folder(text)
    for name in ("spiece.model", "tokenizer.json"):
        if folder.exists(name):
            return folder.at(name)
    raise UserError(f"{folder} has no spiece.model or tokenizer.json; set text.tokenizer to that file")
