"""Published weight files, wherever they lie: safetensors (one file, or shards with their index), or PyTorch files read by a whitelist.

Files in a bucket are fetched once into the cache. Nothing in any file is executed.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipeline.nuscenes.index import cache_folder
from data_pipeline.storage import Folder, is_remote
from mila_jax.errors import UserError

TORCH = (".pth", ".pt", ".bin")
INDICES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def local_file(path) -> Path:
    """`path` itself, or the cached copy of an address (gs://…), fetched when there is none or the original has changed.

    Raises `UserError` naming the address when it cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    folder, _, name = str(path).rpartition("/")
    remote = Folder(folder)
    try:
        state = remote.state(name)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the address") from None
    home = cache_folder() / "weights" / hashlib.sha256(f"{path} {state}".encode()).hexdigest()[:32]
    if not (home / name).exists():
        home.mkdir(parents=True, exist_ok=True)
        partial = home / f"{name}.{os.getpid()}.tmp"  # other processes of this machine may fetch it, too
        with remote.open(name) as source, open(partial, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
        partial.replace(home / name)
    return home / name


def file_sha256(path) -> str:
    """Hex SHA-256 of a file on this machine or in a bucket, to tell later which weights made something."""
    with open(local_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(path) -> list[Path]:
    """The files of a set of weights: the file itself, or in a folder its only file or the shards of its index, on this machine.

    Raises `UserError` when there is none, or a shard is missing.
    """
    if str(path).endswith((".safetensors", *TORCH)):
        found = local_file(path)
        if not found.exists():
            raise UserError(f"{path} does not exist; give a .safetensors file or a folder that holds one")
        return [found]
    folder = Folder(path)
    for name in INDICES:
        if folder.exists(name):
            try:
                shards = sorted(set(json.loads(folder.read(name))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{folder.at(name)} is not an index of weight shards ({error}); get it again") from None
            lost = [shard for shard in shards if not folder.exists(shard)]
            if lost:
                raise UserError(f"{folder.at(lost[0])} is missing, {name} names it; get all {len(shards)} shards")
            return [local_file(folder.at(shard)) for shard in shards]
    for name in SINGLES:
        if folder.exists(name):
            return [local_file(folder.at(name))]
    raise UserError(f"{path} holds no weights ({', '.join(SINGLES)} or shards with their index)")


def read_tensors(path) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """(name → array, safetensors metadata, SHA-256 over the files) of a file, a folder or an address; see `weight_files`.

    Raises `UserError` naming the file that is missing, broken, or asks for more than tensors.
    """
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    files = weight_files(path)
    for file in files:
        if file.suffix in TORCH:
            from mila_jax.evaluate.torch_files import read_torch_file

            found = read_torch_file(file)
            found = found.get("state_dict", found) if isinstance(found, dict) else found
            if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
                raise UserError(f"{file} does not hold a state dict of tensors alone; save one with torch.save(model.state_dict(), …)")
            tensors |= found
            continue
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
                metadata |= opened.metadata() or {}
        except (SafetensorError, OSError, TypeError) as error:
            raise UserError(f"cannot read weights {file}: {error}; the file is broken or not safetensors") from error
    digests = [file_sha256(file) for file in files]
    return tensors, metadata, digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_config_beside(path) -> dict | None:
    """The config.json in the folder of a weights file, or in the folder itself; None when there is none. `UserError` when it is broken."""
    text = str(path)
    is_file = text.endswith((".safetensors", *TORCH))
    parent = (text.rpartition("/")[0] or ".") if is_remote(path) else Path(text).parent
    folder = Folder(parent if is_file else text)
    try:
        return json.loads(folder.read("config.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{folder.at('config.json')} is not valid JSON ({error}); get it again") from None
