"""What every command sets up before JAX starts."""

import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib

import jax

_GOOGLE, _NETWORK_CARD = "0x1ae0", "0x0042"  # PCI vendor; that vendor's network card, which every cloud machine has

# Flags of XLA's CPU compiler, by the jaxlib versions that they were tried with: XLA ends the process on a flag it does not know.
_CPU_FLAGS_OF = "0.10."
_CPU_FLAGS = {
    # Of the two libraries of kernels, only softmax with the products around it goes to YNNPACK; large products are faster in Eigen.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_prefer_vector_width": "512",  # no effect without AVX-512
}


def setup() -> None:
    """Chooses the platform (`choose_platform`) and keeps compiled programs on disk, so that a second start is quick.

    MILA_CACHE: the folder, default ~/.cache/mila_jax; empty = off. Without an accelerator, `setup_cpu`.
    """
    platforms = choose_platform()
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)
    if runs_on_cpu():
        setup_cpu()
    folder = os.environ.get("MILA_CACHE", str(pathlib.Path.home() / ".cache" / "mila_jax"))
    if not folder:
        return
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home is no reason not to run
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


def runs_on_cpu(root="/") -> bool:
    """Whether JAX will compute on the CPU: it was told to, or there is nothing else."""
    wanted = os.environ.get("JAX_PLATFORMS")
    return wanted == "cpu" if wanted else not tpu_present(root) and not any(pathlib.Path(root).glob("dev/nvidia[0-9]*"))


def setup_cpu() -> None:
    """Settings of malloc and of XLA's compiler that make computing on a CPU faster. Whoever sets a flag in XLA_FLAGS keeps it."""
    keep_freed_memory()
    if importlib.metadata.version("jaxlib").startswith(_CPU_FLAGS_OF):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{k}={v}" for k, v in _CPU_FLAGS.items() if f"--{k}=" not in flags)]).strip()


def keep_freed_memory() -> None:
    """Has glibc's malloc keep memory that is freed for the next allocation; elsewhere nothing happens.

    XLA frees the arrays of a step at its end. Given back to the system, every page of them has to be cleared again in the next
    step, which is a good part of a small model's time on a CPU.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # parameters of mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for parameter, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
        mallopt(parameter, value)


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
