"""What every command sets up before JAX starts."""

import importlib.util
import os
import pathlib

import jax

_GOOGLE, _NETWORK_CARD = "0x1ae0", "0x0042"  # PCI vendor; that vendor's network card, which every cloud machine has


def setup() -> None:
    """Chooses the platform (`choose_platform`) and keeps compiled programs on disk, so that a second start is quick.

    MILA_CACHE: the folder, default ~/.cache/mila_jax; empty = off.
    """
    platforms = choose_platform()
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)
    folder = os.environ.get("MILA_CACHE", str(pathlib.Path.home() / ".cache" / "mila_jax"))
    if not folder:
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home is no reason not to run
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def tpu_present(root="/") -> bool:
    """Whether this machine has TPU chips, from its device nodes (`root`: of the file system, for tests)."""
    root = pathlib.Path(root)
    if any(root.glob("dev/accel[0-9]*")) or any(root.glob("dev/accel/accel[0-9]*")):
        return True
    if not any(root.glob("dev/vfio/[0-9]*")):
        return False
    for device in root.glob("sys/bus/pci/devices/*"):
        try:
            if (device / "vendor").read_text().strip() == _GOOGLE and (device / "device").read_text().strip() != _NETWORK_CARD:
                return True
        except OSError:
            continue
    return False


def choose_platform(root="/") -> str | None:
    """The platforms that JAX shall try, or None to leave the choice to JAX.

    Only where libtpu is installed (for `mila plan`, or the tests) and there is no TPU: left alone, JAX would start libtpu to find
    that out, which looks for a metadata server, prints errors and locks other processes out. Whoever sets JAX_PLATFORMS decides.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None or tpu_present(root):
        return None
    cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return "cuda,cpu" if cuda and any(pathlib.Path(root).glob("dev/nvidia[0-9]*")) else "cpu"
