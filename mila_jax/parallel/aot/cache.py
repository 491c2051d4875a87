"""What the compiler said, kept on disk under a hash of everything that it depends on; costs are computed anew each time."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib

from mila_jax.parallel.aot.compiler import Outcome

PACKAGE = pathlib.Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# Sections and keys of the config that change no compiled step: paths, the simulator, how data is encoded.
UNUSED = ("simulate", "autoencoder", "data.nuscenes", "data.version", "data.dir", "data.encode_batch", "data.foreground", "text.encoder")
UNUSED += ("train.dir", "train.init_from")
UNUSED += (
    "generate.weights",
    "generate.guide",
    "train.minutes",
    "train.keep",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
)
UNUSED += ("generate.windows_per_call", "generate.decode_frames", "generate.decode_views", "generate.decode_tile")


def folder() -> pathlib.Path | None:
    """`plan` in MILA_CACHE (default ~/.cache/mila_jax); None when that is set to nothing."""
    root = os.environ.get("MILA_CACHE", str(pathlib.Path.home() / ".cache" / "mila_jax"))
    return pathlib.Path(root) / "plan" if root else None


def config_part(config) -> dict:
    """The settings that a compiled step depends on."""
    tree = json.loads(config.to_json())
    for key in UNUSED:
        section, _, name = key.partition(".")
        if name:
            tree.get(section, {}).pop(name, None)
        else:
            tree.pop(section, None)
    if not tree.get("plan", {}).get("guide"):
        tree.get("generate", {}).pop("guidance_model", None)
    return tree


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def config_hash(config) -> str:
    """Sixteen hexadecimal digits over `config_part`."""
    return _digest(config_part(config))


def versions() -> dict[str, str]:
    """Versions of everything that takes part in compiling; "none" for what is not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def source_hash() -> str:
    """Over our own source of the steps: costs and pages may change without compiling again."""
    files = [PACKAGE / "generate.py", PACKAGE / "rollout_program.py", PACKAGE / "views.py"]
    for room in ("model", "flow", "train", "parallel"):
        files += sorted((PACKAGE / room).glob("*.py"))
    files += [pathlib.Path(__file__).parent / name for name in ("program.py", "child.py", "compiler.py", "sizes.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def key(config, topology: str, step: str, full: bool) -> str:
    """Name of the entry of one compilation."""
    return _digest([config_part(config), topology, step, full, versions(), source_hash()])


def load(name: str) -> Outcome | None:
    """The outcome kept under `name`, None if there is none that can be read."""
    root = folder()
    path = root / f"{name}.json.gz" if root else None
    if path is None or not path.exists():
        return None
    try:
        return Outcome(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError):
        return None  # half a file, or one of another version: compile again


def save(name: str, outcome: Outcome) -> None:
    """Keeps an outcome; a folder that cannot be written to is no error."""
    root = folder()
    if root is None:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = root / f"{name}.{os.getpid()}.partial"
        partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(outcome)).encode(), 4))
        os.replace(partial, root / f"{name}.json.gz")
    except OSError:
        return
