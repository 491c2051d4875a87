"""Vision transformers of VBench's consistency dimensions: DINO ViT-B/16 and the picture tower of CLIP ViT-B/32, from users' weight files.

Both are plain pre-norm transformers; what differs is in `Spec`. Weights under the original names and under those of transformers are read.
Sources: facebookresearch/dino (vision_transformer.py), openai/CLIP (clip/model.py), preprocessing as in Vchitect/VBench (vbench/utils.py).
"""

import dataclasses
import functools
import pathlib
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate import resize
from mila_jax.evaluate.convolutions import Tensors
from mila_jax.evaluate.networks import Network
from mila_jax.evaluate.torch_files import read_torchscript
from mila_jax.model.weight_files import file_sha256, read_tensors, weight_files


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes of one network. grid: patches along a side that it was trained with; projection: width of the last linear layer, 0 for none;
    clip: CLIP's variant (norm before the blocks, no bias of the patches, x·sigmoid(1.702 x), centre crop)."""

    name: str
    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    epsilon: float
    projection: int
    clip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DINO = Spec("DINO ViT-B/16", 768, 12, 12, 16, 14, 1e-6, 0, False, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Spec("CLIP ViT-B/32", 768, 12, 12, 32, 7, 1e-5, 512, True, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZE = 224  # pixels of the short side

# Our name → theirs; `{}` is the block's number. Three names for qkv are put one below the other.
_DINO = {
    "patch": "patch_embed.proj", "cls": "cls_token", "pos": "pos_embed", "post": "norm", "ln1": "blocks.{}.norm1", "ln2": "blocks.{}.norm2",
    "qkv": ("blocks.{}.attn.qkv",), "out": "blocks.{}.attn.proj", "fc1": "blocks.{}.mlp.fc1", "fc2": "blocks.{}.mlp.fc2",
}  # fmt: skip
_DINO_HF = {
    "patch": "embeddings.patch_embeddings.projection", "cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings", "post": "layernorm",
    "ln1": "encoder.layer.{}.layernorm_before", "ln2": "encoder.layer.{}.layernorm_after",
    "qkv": tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")),
    "out": "encoder.layer.{}.attention.output.dense", "fc1": "encoder.layer.{}.intermediate.dense", "fc2": "encoder.layer.{}.output.dense",
}  # fmt: skip
_BLOCK = "visual.transformer.resblocks.{}."
_CLIP = {
    "patch": "visual.conv1", "cls": "visual.class_embedding", "pos": "visual.positional_embedding", "pre": "visual.ln_pre", "post": "visual.ln_post",
    "ln1": _BLOCK + "ln_1", "ln2": _BLOCK + "ln_2", "qkv": (_BLOCK + "attn.in_proj_",), "out": _BLOCK + "attn.out_proj", "fc1": _BLOCK + "mlp.c_fc",
    "fc2": _BLOCK + "mlp.c_proj", "projection": "visual.proj",
}  # fmt: skip
_LAYER = "vision_model.encoder.layers.{}."
_CLIP_HF = {
    "patch": "vision_model.embeddings.patch_embedding", "cls": "vision_model.embeddings.class_embedding",
    "pos": "vision_model.embeddings.position_embedding.weight", "pre": "vision_model.pre_layrnorm", "post": "vision_model.post_layernorm",
    "ln1": _LAYER + "layer_norm1", "ln2": _LAYER + "layer_norm2", "qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "out": _LAYER + "self_attn.out_proj", "fc1": _LAYER + "mlp.fc1", "fc2": _LAYER + "mlp.fc2", "projection": "visual_projection.weight",
}  # fmt: skip


def _read(path) -> dict:
    file = weight_files(path)[0]
    if file.suffix == ".pt" and zipfile.is_zipfile(file):  # CLIP is published as a TorchScript archive
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(file)
    return read_tensors(path)[0]


def load_params(path, spec: Spec) -> dict:
    """Weights of `spec` from safetensors, a PyTorch state dict or a TorchScript archive; no pickle is executed.

    Raises `UserError` naming the file, and the tensor that is missing or of another shape.
    """
    flat = {re.sub(r"^(module\.|backbone\.|vit\.)+", "", name): value for name, value in _read(path).items()}
    names = next((table for table in ((_CLIP_HF, _CLIP) if spec.clip else (_DINO_HF, _DINO)) if table["cls"] in flat), None)
    if names is None:
        raise UserError(f"{path}: has no tensor {(_CLIP if spec.clip else _DINO)['cls']}; it is no weight file of {spec.name}")
    tensors, d = Tensors(path, flat), spec.width

    def norm(name):
        return {"scale": tensors.take(f"{name}.weight", (d,)), "bias": tensors.take(f"{name}.bias", (d,))}

    def linear(name, inside, outside):
        dot = "" if name.endswith("_") else "."  # in_proj_weight
        return {"kernel": tensors.take(f"{name}{dot}weight", (outside, inside)).T, "bias": tensors.take(f"{name}{dot}bias", (outside,))}

    def shaped(name, size):  # leading axes of one are theirs to have
        found = flat.get(name)
        return tensors.take(name, (1,) * max(0, np.ndim(found) - len(size)) + size).reshape(size)

    blocks = []
    for number in range(spec.depth):
        at = {key: value.format(number) for key, value in names.items() if isinstance(value, str)}
        parts = [linear(name.format(number), d, 3 * d // len(names["qkv"])) for name in names["qkv"]]
        qkv = {leaf: np.concatenate([part[leaf] for part in parts], -1) for leaf in ("kernel", "bias")}
        blocks.append(
            {"ln1": norm(at["ln1"]), "ln2": norm(at["ln2"]), "qkv": qkv, "out": linear(at["out"], d, d), "fc1": linear(at["fc1"], d, 4 * d),
             "fc2": linear(at["fc2"], 4 * d, d)}
        )  # fmt: skip
    patch = tensors.take(f"{names['patch']}.weight", (d, 3, spec.patch, spec.patch)).transpose(2, 3, 1, 0)
    params = {"patch": patch, "cls": shaped(names["cls"], (d,)), "pos": shaped(names["pos"], (1 + spec.grid**2, d)), "post": norm(names["post"])}
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    if spec.clip:
        params["pre"] = norm(names["pre"])
        wanted = (spec.projection, d) if names is _CLIP_HF else (d, spec.projection)
        projection = tensors.take(names["projection"], wanted)
        params["projection"] = projection.T if names is _CLIP_HF else projection
    else:
        params["patch_bias"] = tensors.take(f"{names['patch']}.bias", (d,))
    return params


def _norm(x, p, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def _positions(pos, rows: int, columns: int, grid: int):
    """Position embeddings of a grid of another size, as DINO makes them: bicubic, with its ratios of (rows + 0.1) / grid."""
    if (rows, columns) == (grid, grid):
        return pos
    square = pos[1:].reshape(grid, grid, -1)
    up, across = (jnp.asarray(resize.cubic_weights(grid, n, grid / (n + 0.1))) for n in (rows, columns))
    return jnp.concatenate([pos[:1], jnp.einsum("oh,hwd,pw->opd", up, square, across).reshape(rows * columns, -1)])


def forward(params, x, spec: Spec):
    """Features [n, width or projection] of preprocessed pictures [n, H, W, 3]; pixels beyond whole patches are left out. In full float32."""
    with jax.default_matmul_precision("highest"):
        rows, columns = (length // spec.patch for length in x.shape[1:3])
        x = x[:, : rows * spec.patch, : columns * spec.patch]
        x = x.reshape(len(x), rows, spec.patch, columns, spec.patch, 3)
        x = jnp.einsum("nhpwqc,pqcd->nhwd", x, params["patch"]).reshape(len(x), rows * columns, spec.width)
        x = x if spec.clip else x + params["patch_bias"]
        x = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(x), 1, spec.width)), x], 1) + _positions(params["pos"], rows, columns, spec.grid)
        if spec.clip:
            x = _norm(x, params["pre"], spec.epsilon)

        def linear(x, p):
            return x @ p["kernel"] + p["bias"]

        def block(x, p):
            n, t, d = x.shape
            qkv = linear(_norm(x, p["ln1"], spec.epsilon), p["qkv"]).reshape(n, t, 3, spec.heads, d // spec.heads)
            q, k, v = (qkv[:, :, i] for i in range(3))
            weights = jax.nn.softmax(jnp.einsum("nqhe,nkhe->nhqk", q, k) * (d // spec.heads) ** -0.5, axis=-1)
            x = x + linear(jnp.einsum("nhqk,nkhe->nqhe", weights, v).reshape(n, t, d), p["out"])
            h = linear(_norm(x, p["ln2"], spec.epsilon), p["fc1"])
            h = h * jax.nn.sigmoid(1.702 * h) if spec.clip else jax.nn.gelu(h, approximate=False)
            return x + linear(h, p["fc2"]), None

        x, _ = jax.lax.scan(block, x, params["blocks"])
        x = _norm(x[:, 0], params["post"], spec.epsilon)
        return x @ params["projection"] if spec.clip else x


def preprocess(x, spec: Spec):
    """Pictures [n, H, W, 3] in 0..255 as VBench gives them to the network: the short side to 224 (bilinear for DINO, which sees the whole
    picture; bicubic and the centre square for CLIP), without anti-aliasing and rounding, then normalised."""
    x = x.astype(jnp.float32)
    height, width = resize.short_side(x.shape[1:3], SIZE)
    if spec.clip:
        x = resize.bicubic(x, height, width)
        top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
        x = x[:, top : top + SIZE, left : left + SIZE]
    else:
        x = resize.bilinear(x, height, width)
    return (x / 255 - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)


def open_vit(path, spec: Spec, chunk: int = 8) -> Network:
    """The network as a `Network` of pictures, `chunk` at a time. Raises `UserError` as `load_params`."""
    params = load_params(path, spec)
    function = functools.partial(jax.jit(lambda params, x: forward(params, preprocess(x, spec), spec)), params)
    how = f"short side to {SIZE}, " + ("bicubic, centre crop" if spec.clip else "bilinear") + ", not anti-aliased"
    digest = file_sha256(path) if pathlib.Path(path).is_file() else file_sha256(weight_files(path)[0])
    return Network(spec.name, spec.name, digest, how, False, function, chunk)
