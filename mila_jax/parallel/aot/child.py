"""The process that compiles: `python -m mila_jax.parallel.aot.child REQUEST.json`.

The TPU compiler may abort the process it runs in, and fast mode ends it on purpose, so it never runs in the user's process.
What it has to say goes into files of the request's folder, each written whole: `lowered.json`, then `compiled.json` (with
`compiled.txt`, the optimised program) or `failed.json`.
"""

import json
import os
import pathlib
import sys
import threading
import time


def _write(folder: pathlib.Path, name: str, value) -> None:
    partial = folder / f"{name}.partial"
    partial.write_text(value if isinstance(value, str) else json.dumps(value))
    os.replace(partial, folder / name)


def _memory(compiled) -> dict:
    """Bytes of one device as the compiler accounts for them (peak_memory: arguments + temporaries − alias over-reports)."""
    m = compiled.memory_analysis()
    return {
        "peak": m.peak_memory_in_bytes, "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes, "aliased": m.alias_size_in_bytes, "program": m.generated_code_size_in_bytes,
    }  # fmt: skip


def _argument_bytes(program) -> int:
    """Bytes of the arguments on one device, unpadded."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(program.arguments):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        size = leaf.dtype.itemsize
        for n in leaf.sharding.shard_shape(leaf.shape):
            size *= n
        total += size
    return total


def compile_request(request: dict, folder: pathlib.Path) -> None:
    """Compiles what the request says: config (JSON), topology, step, options (of the compiler)."""
    import jax
    import ml_collections
    from jax.experimental import topologies

    from mila_jax.errors import UserError
    from mila_jax.parallel.aot.chips import parse_topology
    from mila_jax.parallel.aot.program import make_program
    from mila_jax.parallel.aot.sizes import plan_sizes
    from mila_jax.parallel.mesh import make_mesh

    config = ml_collections.ConfigDict(json.loads(request["config"]))
    began = time.monotonic()
    try:
        topology = parse_topology(request["topology"])
        several = {"num_slices": topology.slices} if topology.slices > 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **several).devices
    except Exception as error:  # the compiler's own errors have no common type
        raise UserError(f"--topology={request['topology']}: the TPU compiler does not know it ({str(error).splitlines()[0][:200]})") from None
    sizes = plan_sizes(config, len(devices), request["step"])
    mesh = make_mesh(config.mesh, devices)
    program = make_program(config, sizes, mesh)
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
        _write(folder, "lowered.json", {"seconds": time.monotonic() - began, "argument_bytes": _argument_bytes(program)})
        compiled = lowered.compile(compiler_options=request["options"] or None)
    _write(folder, "compiled.txt", compiled.as_text())
    _write(folder, "compiled.json", {"seconds": time.monotonic() - began, "memory": _memory(compiled)})


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, however that ended: nobody would read what it makes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(4)


def main(path: str) -> int:
    """Exit code 0 when compiled, 3 when there is a `failed.json` that says why not, 4 when the parent is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    folder = pathlib.Path(path).parent
    request = json.loads(pathlib.Path(path).read_text())
    from mila_jax.errors import UserError

    try:
        compile_request(request, folder)
    except UserError as error:
        _write(folder, "failed.json", {"kind": "user", "message": str(error)})
        return 3
    except Exception as error:
        # Refused by the compiler (out of memory, unsupported): the reason is a result of the plan. Anything else is a bug, with its traceback.
        if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
            raise
        _write(folder, "failed.json", {"kind": "compiler", "message": str(error)[:20000]})
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
