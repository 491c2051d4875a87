"""The environment of a child process with several devices on the CPU."""

import os


def host_devices(count: int, optimized: bool = False) -> dict:
    """This process's environment, with `count` devices on the CPU.

    optimized: without it machine code is as the compiler first writes it, which it does in half the time; what is split how, and which
    collectives there are, is decided before.
    """
    flags = f"--xla_force_host_platform_device_count={count}" + ("" if optimized else " --xla_backend_optimization_level=0")
    # Devices share a pool with a thread for each, and a thread waits in a collective until all devices have come. A device takes independent
    # collectives in any order, so that with no thread to spare two can wait for each other for good.
    threads = {"NPROC": str(2 * count)} if count > 1 else {}
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | threads


def chosen_slow(request) -> bool:
    """Whether slow tests of the file whose fixture asks are among those that run."""
    return any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items)
