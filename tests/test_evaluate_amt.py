"""AMT-S and VBench's motion smoothness: equal to independent PyTorch code on random weights, weights made by hand, wrong files."""

import os
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.evaluate import amt, vbench


def _weights(seed=0) -> dict:
    rng, flat = np.random.default_rng(seed), {}
    for name, shape in amt.shapes().items():
        if len(shape) == 4:
            scale = np.sqrt(1 / np.prod(shape[1:])) * (3 if ".convblock.2." in name else 1)  # flows of about a pixel
            flat[name] = rng.uniform(-scale, scale, shape).astype(np.float32)
        else:  # slopes of PReLUs, else biases
            slope = name.endswith(("prelu.weight", ".1.weight"))
            flat[name] = (rng.uniform(0.1, 0.4, shape) if slope else rng.normal(size=shape) * 0.05).astype(np.float32)
    return flat


def _still_weights(flow=0.0) -> dict:
    """Of a network that blends both frames in equal parts, after moving the first by `flow` pixels to the right and the second to the left."""
    flat = {name: np.zeros(shape, np.float32) for name, shape in amt.shapes().items()}
    flat["decoder1.convblock.2.bias"][0:6:2] = -flow
    flat["decoder1.convblock.2.bias"][6:12:2] = flow
    return flat


def _save(path, flat):
    save_file({k: np.ascontiguousarray(v) for k, v in flat.items()}, path)
    return path


def _pictures(n, height, width, seed=1):
    """Smooth ones."""
    small = np.random.default_rng(seed).uniform(0, 255, (n, height // 8, width // 8, 3))
    return np.asarray(jax.image.resize(small, (n, height, width, 3), "linear")).astype(np.uint8)


def test_tensors_are_those_of_the_original():
    """Counted there: 213 tensors, 2 990 543 numbers."""
    shapes = amt.shapes()
    assert len(shapes) == 213 and sum(int(np.prod(s)) for s in shapes.values()) == 2_990_543
    assert shapes["feat_encoder.layer2.0.downsample.0.weight"] == (64, 32, 1, 1) and shapes["decoder4.convblock.2.weight"] == (112, 48, 4, 4)
    assert shapes["update2.convc1.weight"] == (64, 392, 1, 1) and shapes["comb_block.1.weight"] == (18,)


def test_score_by_hand():
    """Frames 1 and 3 against what is made of 0, 2 and 4; the sixth has no follower."""
    frames = np.zeros((6, 2, 2, 3), np.uint8)
    frames[:, :, :] = np.array([10, 20, 30, 90, 50, 255], np.uint8)[:, None, None, None]
    assert vbench.motion_smoothness(frames, lambda a, b: ((a.astype(int) + b) // 2).astype(np.uint8)) == pytest.approx((255 - (0 + 50) / 2) / 255)
    assert vbench.motion_smoothness(frames[:3], lambda a, b: a) == pytest.approx(245 / 255)
    with pytest.raises(ValueError, match="three frames"):
        vbench.motion_smoothness(frames[:2], None)


def test_a_blending_network_by_hand(tmp_path):
    """A still video has 1 but for rounding down, brightness that rises evenly too, and flicker what it has by hand; chunks change nothing."""
    path, picture = _save(tmp_path / "blend.safetensors", _still_weights()), _pictures(1, 64, 80)[0]
    network = amt.Interpolator(path, chunk=2)
    still = vbench.motion_smoothness(np.stack([picture] * 7), network)
    assert 1 - 1 / 255 <= still <= 1
    levels = np.array([10, 20, 30, 40, 50, 60, 70], np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (7, 64, 80, 3))
    assert 1 - 1 / 255 <= vbench.motion_smoothness(frames, network) <= 1
    flicker = np.where(np.arange(7)[:, None, None, None] % 2, np.uint8(200), frames)
    assert vbench.motion_smoothness(flicker, network) == pytest.approx((255 - (200 - 40)) / 255, abs=1.01 / 255)
    pictures = _pictures(4, 64, 80)
    made = network(pictures[:3], pictures[1:])
    blend = (pictures[:3].astype(int) + pictures[1:]) / 2
    assert made.dtype == np.uint8 and np.abs(made - blend).max() <= 1
    np.testing.assert_array_equal(network(pictures[2:3], pictures[3:]), made[2:])


def test_large_pictures_go_one_by_one():
    assert 4 * amt.correlation_bytes(256, 448) < amt.MEMORY < amt.correlation_bytes(900, 1600)
    assert amt.correlation_bytes(64, 64) == 64 * (64 + 16 + 4 + 1) * 4 * 2


def test_a_network_that_moves_pictures_likes_them_moving(tmp_path):
    """Two pixels a frame to the right: exact but at the sides, and worse with the frames out of order."""
    network = amt.Interpolator(_save(tmp_path / "move.safetensors", _still_weights(flow=2.0)), chunk=2)
    wide = _pictures(1, 64, 96)[0]
    frames = np.stack([wide[:, 16 - 2 * k : 96 - 2 * k] for k in range(7)])
    assert np.abs(network(frames[0:1], frames[2:3])[0, :, 2:-2].astype(int) - frames[1, :, 2:-2]).max() <= 1
    moving, shuffled = (vbench.motion_smoothness(frames[order], network) for order in (range(7), [3, 0, 5, 1, 6, 2, 4]))
    assert moving > 0.99 and shuffled < moving - 0.005


def test_wrong_files_and_pictures_are_named(tmp_path):
    flat, name = _still_weights(), "decoder3.convblock.1.conv4.0.weight"
    with pytest.raises(UserError, match=f"short.safetensors: tensor {name} .* is missing"):
        amt.load_params(_save(tmp_path / "short.safetensors", {k: v for k, v in flat.items() if k != name}))
    with pytest.raises(UserError, match=f"other.safetensors: tensor {name} has shape"):
        amt.load_params(_save(tmp_path / "other.safetensors", flat | {name: flat[name][:5]}))
    with pytest.raises(UserError, match="more.safetensors: tensor extra is none of AMT-S's"):
        amt.load_params(_save(tmp_path / "more.safetensors", flat | {"extra": flat[name]}))
    with pytest.raises(UserError, match="nothing.pth does not exist"):
        amt.Interpolator(tmp_path / "nothing.pth")
    network = amt.Interpolator(_save(tmp_path / "right.safetensors", {f"module.{k}": v for k, v in flat.items()}))
    with pytest.raises(UserError, match="at least 49 pixels a side, these have 48×80"):
        network(_pictures(1, 48, 80), _pictures(1, 48, 80))
    with pytest.raises(ValueError, match="two uint8 arrays"):
        network(_pictures(1, 64, 80), _pictures(2, 64, 80))


TORCH = os.environ.get("MILA_TORCH_PYTHON", "")  # a Python with torch

# Written from the published definition with PyTorch's functions, in its layout, one pair at a time.
REFERENCE = """
import sys, numpy as np, torch
from torch.nn import functional as F
z = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
frames = z.pop("frames")
torch.save({"epoch": 300, "state_dict": dict(z), "optim": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}}, sys.argv[3])

def conv(x, name, stride=1): return F.conv2d(x, z[name + ".weight"], z[name + ".bias"], stride, z[name + ".weight"].shape[-1] // 2)
def act(x, name): return F.prelu(x, z[name + ".weight"])
def cr(x, name, stride=1): return act(conv(x, name + ".0", stride), name + ".1")
def resize(x, s): return F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False)
def block(x, name):
    x = cr(x, name + ".0")
    y = cr(x, name + ".1.conv1")
    y = torch.cat([y[:, :-20], cr(y[:, -20:], name + ".1.conv2")], 1)
    y = cr(y, name + ".1.conv3")
    y = torch.cat([y[:, :-20], cr(y[:, -20:], name + ".1.conv4")], 1)
    x = act(x + conv(y, name + ".1.conv5"), name + ".1.prelu")
    return F.conv_transpose2d(x, z[name + ".2.weight"], z[name + ".2.bias"], stride=2, padding=1)
def warp(x, flow):
    h, w = x.shape[-2:]
    gy, gx = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    grid = torch.stack([gx + flow[:, 0] / ((w - 1) / 2), gy + flow[:, 1] / ((h - 1) / 2)], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
def features(x):
    relu_norm = lambda x: F.relu(F.instance_norm(x))
    x = relu_norm(conv(x, "feat_encoder.conv1", 2))
    for i in (1, 2, 3):
        for j in (0, 1):
            n, s = f"feat_encoder.layer{i}.{j}", 2 if (i > 1 and j == 0) else 1
            y = relu_norm(conv(x, n + ".conv1"))
            y = relu_norm(conv(y, n + ".conv2", s))
            y = relu_norm(conv(y, n + ".conv3"))
            if s == 2: x = F.instance_norm(conv(x, n + ".downsample.0", 2))
            x = F.relu(x + y)
    return conv(x, "feat_encoder.conv2")
def pyramid(x):
    out = []
    for i in (1, 2, 3, 4):
        x = cr(cr(x, f"encoder.pyramid{i}.0", 2), f"encoder.pyramid{i}.1")
        out.append(x)
    return out
def look(volume, place):  # volume [h1, w1, h2, w2], place [1, 2, h1, w1]
    h1, w1, h2, w2 = volume.shape
    v, at, out = volume.reshape(h1 * w1, 1, h2, w2), place.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2), []
    steps = torch.arange(-3.0, 4.0)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)  # the first axis goes along x
    for level in range(4):
        h, w = v.shape[-2:]
        c = at / 2 ** level + offsets
        if min(h, w) == 1: found = torch.zeros(h1 * w1, 1, 7, 7)
        else: found = F.grid_sample(v, torch.stack([2 * c[..., 0] / (w - 1) - 1, 2 * c[..., 1] / (h - 1) - 1], -1), align_corners=True)
        out.append(found.reshape(1, h1, w1, 49))
        if level < 3: v = F.avg_pool2d(v, 2, 2)
    return torch.cat(out, -1).permute(0, 3, 1, 2)
def update(name, net, flow, corr, s):
    lr = lambda x: F.leaky_relu(x, 0.1)
    two = lambda x, n: conv(lr(conv(x, n + ".0")), n + ".2")
    if s > 1: net = resize(net, 1 / s)
    c = lr(conv(corr, name + ".convc1"))
    f = lr(conv(lr(conv(flow, name + ".convf1")), name + ".convf2"))
    x = two(torch.cat([lr(conv(torch.cat([c, f], 1), name + ".conv")), flow, net], 1), name + ".gru")
    a, b = two(x, name + ".feat_head"), two(x, name + ".flow_head")
    return (resize(a, s), s * resize(b, s)) if s > 1 else (a, b)
def between(i0, i1):
    mean = torch.cat([i0, i1], 2).mean()
    i0, i1 = i0 - mean, i1 - mean
    a, b = features(i0)[0], features(i1)[0]
    volume = torch.einsum("cij,ckl->ijkl", a, b) / 84 ** 0.5
    back = volume.permute(2, 3, 0, 1)
    h, w = volume.shape[:2]
    gy, gx = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    grid = torch.stack([gx, gy])[None]
    p0, p1 = pyramid(i0), pyramid(i1)
    x = block(torch.cat([p0[3], p1[3], torch.full_like(p0[3][:, :1], 0.5)], 1), "decoder4.convblock")
    f0, f1, net = x[:, :2], x[:, 2:4], x[:, 4:]
    for level, (u, s) in zip((3, 2, 1), (("update4", 1), ("update3", 2), ("update2", 4))):
        g0, g1 = (f0, f1) if s == 1 else (resize(f0, 1 / s) / s, resize(f1, 1 / s) / s)
        corr = torch.cat([look(volume, grid + 2 * g1), look(back, grid + 2 * g0)], 1)
        dn, df = update(u, net, torch.cat([g0, g1], 1), corr, s)
        net, f0, f1 = net + dn, f0 + df[:, :2], f1 + df[:, 2:]
        x = block(torch.cat([net, warp(p0[level - 1], f0), warp(p1[level - 1], f1), f0, f1], 1), f"decoder{level}.convblock")
        if level > 1: f0, f1, net = x[:, :2] + 2 * resize(f0, 2.0), x[:, 2:4] + 2 * resize(f1, 2.0), x[:, 4:]
    d0, d1, mask, res = torch.split(x, [6, 6, 3, 9], 1)
    f0, f1, mask = d0 + 2 * resize(f0, 2.0).repeat(1, 3, 1, 1), d1 + 2 * resize(f1, 2.0).repeat(1, 3, 1, 1), torch.sigmoid(mask)
    made = [mask[:, k:k + 1] * warp(i0, f0[:, 2 * k:2 * k + 2]) + (1 - mask[:, k:k + 1]) * warp(i1, f1[:, 2 * k:2 * k + 2]) + mean
            + res[:, 3 * k:3 * k + 3] for k in range(3)]
    out = sum(made) / 3 + conv(act(conv(torch.cat(made, 1), "comb_block.0"), "comb_block.1"), "comb_block.2")
    return out.clamp(0, 1), f0
x = frames.permute(0, 3, 1, 2) / 255.0
h, w = x.shape[-2:]
ph, pw = -h % 16, -w % 16
x = F.pad(x, [pw // 2, pw - pw // 2, ph // 2, ph - ph // 2], mode="replicate")
made, diffs, flows = [], [], []
with torch.no_grad():
    for i in range(0, len(x) - 2, 2):
        out, flow = between(x[i:i + 1], x[i + 2:i + 3])
        out = out[0, :, ph // 2:ph // 2 + h, pw // 2:pw // 2 + w].permute(1, 2, 0).numpy()
        made.append(out)
        flows.append(flow.abs().mean().item())
        diffs.append(np.abs((out * 255).clip(0, 255).astype(np.uint8).astype(int) - frames[i + 1].numpy()).mean())
np.savez(sys.argv[2], made=np.stack(made), score=(255.0 - np.mean(diffs)) / 255.0, flow=np.mean(flows))
"""


@pytest.mark.skipif(not TORCH, reason="set MILA_TORCH_PYTHON to a Python that has torch")
@pytest.mark.parametrize("size", ((64, 80), (150, 131)))
def test_equals_pytorch_from_its_own_file_to_the_score(tmp_path, size):
    frames = _pictures(6, *size)  # two pairs; the last one has no follower
    np.savez(tmp_path / "in.npz", frames=frames, **_weights())
    paths = [str(tmp_path / name) for name in ("in.npz", "out.npz", "amt-s.pth")]
    subprocess.run([TORCH, "-c", REFERENCE, *paths], check=True, timeout=300)
    network = amt.Interpolator(tmp_path / "amt-s.pth", chunk=2)
    ours = np.asarray(amt.forward(amt.load_params(tmp_path / "amt-s.pth"), frames[0:4:2], frames[2:6:2]))
    with np.load(tmp_path / "out.npz") as theirs:
        spread = theirs["made"].std()
        assert spread > 0.02 and theirs["flow"] > 0.3
        np.testing.assert_allclose(ours, theirs["made"], rtol=0, atol=1e-3 * spread)
        assert vbench.motion_smoothness(frames, network) == pytest.approx(float(theirs["score"]), abs=1e-4)
