"""What every command sets up before JAX starts."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib

import jax

from mila_jax.malloc import keep_freed_memory, set_fragments_aside

_GOOGLE, _NETWORK_CARD = "0x1ae0", "0x0042"  # PCI vendor; that vendor's network card, which every cloud machine has

_LONG_COMPILE = 2.0  # seconds; also what is worth keeping on disk

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
    use_chosen_platform()
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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LONG_COMPILE)


def use_chosen_platform() -> None:
    """What a fresh process has to be told of it; flags of compilers are in the environment, which it inherits."""
    platforms = choose_platform()
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)


def runs_on_cpu(root="/") -> bool:
    """Whether JAX will compute on the CPU: it was told to, or there is nothing else."""
    wanted = os.environ.get("JAX_PLATFORMS")
    return wanted == "cpu" if wanted else not tpu_present(root) and not any(pathlib.Path(root).glob("dev/nvidia[0-9]*"))


def setup_cpu() -> None:
    """Settings of malloc and of XLA's compiler that make computing on a CPU faster. Whoever sets a flag in XLA_FLAGS keeps it."""
    keep_freed_memory()
    tidy_after_compiling()
    if importlib.metadata.version("jaxlib").startswith(_CPU_FLAGS_OF):
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{k}={v}" for k, v in _CPU_FLAGS.items() if f"--{k}=" not in flags)]).strip()


@functools.cache  # once in a process
def tidy_after_compiling() -> None:
    """From now on, what the compiler leaves of the heap is put in order whenever it has worked for long (`set_fragments_aside`)."""

    def tidy(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration") and seconds > _LONG_COMPILE:
            set_fragments_aside()

    jax.monitoring.register_event_duration_secs_listener(tidy)


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
