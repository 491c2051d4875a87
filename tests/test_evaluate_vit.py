"""DINO's and CLIP's vision transformers: equal to independent PyTorch code on random weights, weight files, errors; VBench's consistency."""

import dataclasses
import os
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.evaluate import resize, vbench, vit

DINO = dataclasses.replace(vit.DINO, width=48, depth=2, heads=3)
CLIP = dataclasses.replace(vit.CLIP, width=48, depth=2, heads=3, projection=20)


def _weights(spec, seed=0) -> dict:
    """Random weights under the original names."""
    rng, d = np.random.default_rng(seed), spec.width

    def draw(*shape, scale=0.2):
        return (rng.normal(size=shape) * scale).astype(np.float32)

    names = vit._CLIP if spec.clip else vit._DINO
    lead = () if spec.clip else (1,)
    flat = {f"{names['patch']}.weight": draw(d, 3, spec.patch, spec.patch, scale=0.05)}
    flat[names["cls"]] = draw(*(() if spec.clip else (1, 1)), d)
    flat[names["pos"]] = draw(*lead, 1 + spec.grid**2, d)
    norms, linears = [names["post"]], []
    if spec.clip:
        norms.append(names["pre"])
        flat[names["projection"]] = draw(d, spec.projection)
    else:
        flat[f"{names['patch']}.bias"] = draw(d)
    for i in range(spec.depth):
        norms += [names[k].format(i) for k in ("ln1", "ln2")]
        linears += [(names["qkv"][0].format(i), d, 3 * d), (names["out"].format(i), d, d)]
        linears += [(names["fc1"].format(i), d, 4 * d), (names["fc2"].format(i), 4 * d, d)]
    for name in norms:
        flat |= {f"{name}.weight": 1 + draw(d), f"{name}.bias": draw(d)}
    for name, inside, outside in linears:
        dot = "" if name.endswith("_") else "."
        flat |= {f"{name}{dot}weight": draw(outside, inside), f"{name}{dot}bias": draw(outside)}
    return flat


def _save(path, flat):
    save_file({k: np.ascontiguousarray(v) for k, v in flat.items()}, path)
    return path


def _renamed(flat, spec) -> dict:
    """The same weights under transformers' names."""
    ours, theirs = (vit._CLIP, vit._CLIP_HF) if spec.clip else (vit._DINO, vit._DINO_HF)
    out = {}
    for key, name in ours.items():
        for i in range(spec.depth if key in ("ln1", "ln2", "qkv", "out", "fc1", "fc2") else 1):
            source = (name[0] if key == "qkv" else name).format(i)
            for leaf in ("weight", "bias"):
                value = flat.get(source + ("" if source.endswith("_") else ".") + leaf)
                if value is not None and key == "qkv":
                    out |= {f"{n.format(i)}.{leaf}": part for n, part in zip(theirs["qkv"], np.split(value, 3))}
                elif value is not None:
                    out[f"{theirs[key].format(i)}.{leaf}"] = value
        if key in ("cls", "pos"):
            out[theirs[key]] = flat[name]
    if spec.clip:
        out[theirs["projection"]] = flat[ours["projection"]].T
    return out


@pytest.mark.parametrize("spec", (DINO, CLIP), ids=("dino", "clip"))
def test_both_namings_give_the_same_features_and_a_wrong_file_is_named(tmp_path, spec):
    flat = _weights(spec)
    pictures = np.random.default_rng(1).integers(0, 256, (3, 32, 56, 3)).astype(np.uint8)
    features = [vit.open_vit(_save(tmp_path / f"{n}.safetensors", f), spec, chunk=2)(pictures) for n, f in (("a", flat), ("b", _renamed(flat, spec)))]
    assert features[0].shape == (3, spec.projection or spec.width)
    np.testing.assert_allclose(features[1], features[0], rtol=1e-5, atol=1e-6)
    name = (vit._CLIP if spec.clip else vit._DINO)["fc1"].format(1) + ".weight"
    short = _save(tmp_path / "short.safetensors", {k: v for k, v in flat.items() if k != name})
    with pytest.raises(UserError, match=f"short.safetensors: tensor {name} .* is missing"):
        vit.load_params(short, spec)
    other = _save(tmp_path / "other.safetensors", flat | {name: flat[name][:5]})
    with pytest.raises(UserError, match=f"other.safetensors: tensor {name} has shape"):
        vit.load_params(other, spec)
    with pytest.raises(UserError, match="none.safetensors: has no tensor .* no weight file of"):
        vit.load_params(_save(tmp_path / "none.safetensors", {"x": flat[name]}), spec)


TORCH = os.environ.get("MILA_TORCH_PYTHON", "")  # a Python with torch

# Written from the published definitions with PyTorch's own modules (nn.MultiheadAttention, interpolate), not from our code.
REFERENCE = """
import sys, numpy as np, torch
from torch import nn
from torch.nn import functional as F
z = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
clip, patch, depth, heads = (int(z.pop(k)) for k in ("is_clip", "patch", "depth", "heads"))
x = z.pop("pictures").permute(0, 3, 1, 2).float()
h, w = x.shape[-2:]
size = (224, int(224 * w / h)) if h <= w else (int(224 * h / w), 224)
x = F.interpolate(x, size=size, mode="bicubic" if clip else "bilinear", align_corners=False)
if clip:
    top, left = (int(round((n - 224) / 2)) for n in size)
    x = x[:, :, top:top + 224, left:left + 224]
mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) if clip else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
x = (x / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
def get(a, b): return z[b if clip else a]
def norm(x, a, b):
    n = b if clip else a
    return F.layer_norm(x, x.shape[-1:], z[n + ".weight"], z[n + ".bias"], 1e-5 if clip else 1e-6)
x = F.conv2d(x, get("patch_embed.proj.weight", "visual.conv1.weight"), z.get("patch_embed.proj.bias"), stride=patch)
rows, columns = x.shape[-2:]
x = x.flatten(2).transpose(1, 2)
d = x.shape[-1]
x = torch.cat([get("cls_token", "visual.class_embedding").reshape(1, 1, d).expand(len(x), 1, d), x], 1)
pos = get("pos_embed", "visual.positional_embedding").reshape(1, -1, d)
g = int((pos.shape[1] - 1) ** 0.5)
if (rows, columns) != (g, g):
    square = pos[:, 1:].reshape(1, g, g, d).permute(0, 3, 1, 2)
    square = F.interpolate(square, scale_factor=((rows + 0.1) / g, (columns + 0.1) / g), mode="bicubic")
    pos = torch.cat([pos[:, :1], square.permute(0, 2, 3, 1).reshape(1, -1, d)], 1)
x = x + pos
if clip: x = norm(x, "", "visual.ln_pre")
for i in range(depth):
    a, b = f"blocks.{i}.", f"visual.transformer.resblocks.{i}."
    m = nn.MultiheadAttention(d, heads, batch_first=True)
    m.load_state_dict({"in_proj_weight": get(a + "attn.qkv.weight", b + "attn.in_proj_weight"), "in_proj_bias": get(a + "attn.qkv.bias", b + "attn.in_proj_bias"),
        "out_proj.weight": get(a + "attn.proj.weight", b + "attn.out_proj.weight"), "out_proj.bias": get(a + "attn.proj.bias", b + "attn.out_proj.bias")})
    y = norm(x, a + "norm1", b + "ln_1")
    x = x + m(y, y, y, need_weights=False)[0]
    y = norm(x, a + "norm2", b + "ln_2")
    y = F.linear(y, get(a + "mlp.fc1.weight", b + "mlp.c_fc.weight"), get(a + "mlp.fc1.bias", b + "mlp.c_fc.bias"))
    y = y * torch.sigmoid(1.702 * y) if clip else F.gelu(y)
    x = x + F.linear(y, get(a + "mlp.fc2.weight", b + "mlp.c_proj.weight"), get(a + "mlp.fc2.bias", b + "mlp.c_proj.bias"))
x = norm(x[:, 0], "norm", "visual.ln_post")
x = x @ z["visual.proj"] if clip else x
values = F.normalize(x, dim=-1)
similar = [max(0.0, F.cosine_similarity(values[i - 1:i], values[i:i + 1]).item()) + max(0.0, F.cosine_similarity(values[:1], values[i:i + 1]).item()) for i in range(1, len(x))]
np.savez(sys.argv[2], features=x.detach().numpy(), consistency=sum(similar) / 2 / len(similar))
"""


@pytest.mark.skipif(not TORCH, reason="set MILA_TORCH_PYTHON to a Python that has torch")
@pytest.mark.parametrize("size", ((64, 112), (90, 61)))
@pytest.mark.parametrize("spec", (DINO, CLIP), ids=("dino", "clip"))
def test_equals_pytorch_from_pictures_to_the_score(tmp_path, spec, size):
    flat = _weights(spec)
    pictures = np.random.default_rng(3).integers(0, 256, (4, *size, 3)).astype(np.uint8)
    about = {"is_clip": spec.clip, "patch": spec.patch, "depth": spec.depth, "heads": spec.heads}
    np.savez(tmp_path / "in.npz", pictures=pictures, **{k: np.array(int(v)) for k, v in about.items()}, **flat)
    subprocess.run([TORCH, "-c", REFERENCE, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")], check=True, timeout=300)
    ours = vit.open_vit(_save(tmp_path / "a.safetensors", flat), spec)(pictures)
    with np.load(tmp_path / "out.npz") as theirs:
        spread = np.abs(np.diff(theirs["features"], axis=0)).max()
        assert spread > 1e-2 * np.abs(theirs["features"]).max()
        np.testing.assert_allclose(ours, theirs["features"], rtol=0, atol=1e-3 * spread)
        assert vbench.consistency(ours) == pytest.approx(float(theirs["consistency"]), abs=1e-5)


# A module with the names of CLIP's, saved as OpenAI's ViT-B-32.pt is: a TorchScript archive in float16 with both towers in it.
ARCHIVE = """
import collections, sys, numpy as np, torch
from torch import nn
z = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
width, depth, heads, out, x = 48, 2, 3, 20, z.pop("x")
class QuickGELU(nn.Module):
    def forward(self, x): return x * torch.sigmoid(1.702 * x)
class ResidualAttentionBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(d, heads), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(collections.OrderedDict(c_fc=nn.Linear(d, 4 * d), gelu=QuickGELU(), c_proj=nn.Linear(4 * d, d)))
    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))
class Transformer(nn.Module):
    def __init__(self, d, depth):
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(d) for _ in range(depth)))
    def forward(self, x): return self.resblocks(x)
class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 32, 32, bias=False)
        self.class_embedding, self.positional_embedding = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(50, width))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(width), Transformer(width, depth), nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out))
    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, width), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj
class CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.transformer, self.token_embedding = VisionTransformer(), Transformer(24, 1), nn.Embedding(7, 24)
        self.positional_embedding, self.text_projection = nn.Parameter(torch.randn(5, 24)), nn.Parameter(torch.randn(24, out))
        self.ln_final, self.logit_scale = nn.LayerNorm(24), nn.Parameter(torch.tensor(2.6))
        for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 7)): self.register_buffer(name, torch.tensor(value))
    def forward(self, image, text):
        a = self.visual(image)
        y = self.transformer(self.token_embedding(text) + self.positional_embedding)
        return self.logit_scale.exp() * a @ (self.ln_final(y[:, 0]) @ self.text_projection).T
model = CLIP().eval()
lost = model.load_state_dict(z, strict=False)
assert not lost.unexpected_keys and not any(k.startswith("visual.") for k in lost.missing_keys)
torch.jit.save(torch.jit.trace(model, (x, torch.zeros(1, 5, dtype=torch.long))).half(), sys.argv[3])
half = torch.jit.load(sys.argv[3]).float()
np.savez(sys.argv[2], features=half.visual(x).detach().numpy())
"""


@pytest.mark.skipif(not TORCH, reason="set MILA_TORCH_PYTHON to a Python that has torch")
def test_reads_a_torchscript_archive_as_openai_publishes(tmp_path):
    pictures = np.random.default_rng(4).integers(0, 256, (2, 64, 112, 3)).astype(np.uint8)
    prepared = np.asarray(vit.preprocess(pictures, CLIP)).transpose(0, 3, 1, 2)
    np.savez(tmp_path / "in.npz", x=prepared, **_weights(CLIP))
    archive = tmp_path / "ViT-B-32.pt"
    subprocess.run([TORCH, "-W", "ignore", "-c", ARCHIVE, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), str(archive)], check=True, timeout=300)
    ours = vit.open_vit(archive, CLIP, chunk=2)(pictures)
    with np.load(tmp_path / "out.npz") as theirs:
        np.testing.assert_allclose(ours, theirs["features"], rtol=0, atol=1e-3 * theirs["features"].std())


def test_sizes_of_the_published_networks():
    for spec, tokens in ((vit.DINO, 197), (vit.CLIP, 50)):
        assert 1 + spec.grid**2 == tokens and spec.grid * spec.patch == vit.SIZE
    params = {
        "patch": np.zeros((16, 16, 3, 48)), "patch_bias": np.zeros(48), "cls": np.zeros(48), "pos": np.zeros((197, 48)),
        "post": {"scale": np.zeros(48), "bias": np.zeros(48)},
        "blocks": jax.tree.map(lambda s: np.zeros((2, *s)), {
            "ln1": {"scale": (48,), "bias": (48,)}, "ln2": {"scale": (48,), "bias": (48,)}, "qkv": {"kernel": (48, 144), "bias": (144,)},
            "out": {"kernel": (48, 48), "bias": (48,)}, "fc1": {"kernel": (48, 192), "bias": (192,)}, "fc2": {"kernel": (192, 48), "bias": (48,)}},
            is_leaf=lambda x: isinstance(x, tuple)),
    }  # fmt: skip
    assert jax.eval_shape(lambda x: vit.forward(params, vit.preprocess(x, DINO), DINO), np.zeros((2, 64, 112, 3), np.uint8)).shape == (2, 48)


def test_bicubic_keeps_plains_and_its_own_size():
    assert resize.short_side((64, 112), 224) == (224, 392) and resize.short_side((90, 61), 224) == (330, 224)
    np.testing.assert_allclose(resize.cubic_weights(7, 19).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(resize.cubic_weights(5, 5), np.eye(5), atol=1e-6)


def test_consistency_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert vbench.consistency(x) == 0  # cosines 0, 0 and 0, -1: negative ones count as 0
    assert vbench.consistency(np.array([[1.0, 1], [1, 0], [1, 0]])) == pytest.approx((2 * 0.5**0.5 + 1 + 0.5**0.5) / 4)
    assert vbench.consistency(np.ones((4, 3))) == pytest.approx(1)
    with pytest.raises(ValueError):
        vbench.consistency(x[:1])
