"""Run in a child process with the TPU compiler: attention kernels compiled ahead of time for chips that are not there.

`python -m tests.aot_probe TOPOLOGY HEADS HEAD_WIDTH TOKENS KERNEL`: value and gradients under a mesh of the topology's devices, context 2.
Prints one JSON line: how many calls of Pallas kernels the program holds, and its collectives.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mila_jax.model.attention import SPATIAL, attend_spatially
from mila_jax.parallel.logical import rules_of, spec, use_rules
from mila_jax.parallel.mesh import make_mesh
from tests.parallel_probe import count_collectives


def main() -> None:
    topology, heads, head, tokens = sys.argv[1], *map(int, sys.argv[2:5])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(dict(data=-1, fsdp=1, context=2, tensor=1), devices)
    with jax.set_mesh(mesh), use_rules(**rules_of("context")):
        sharding = NamedSharding(mesh, spec(*SPATIAL.queries))
        array = jax.ShapeDtypeStruct((mesh.shape["data"], 4, tokens, heads, head), jnp.bfloat16, sharding=sharding)

        def value(q, k, v):
            return attend_spatially(q, k, v, "splash").astype(jnp.float32).sum()

        compiled = jax.jit(jax.value_and_grad(value, (0, 1, 2))).lower(array, array, array).compile()
    text = compiled.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(
        "RESULT"
        + json.dumps({"kind": devices[0].device_kind, "kernels": kernels, "temporaries": temporaries, "collectives": count_collectives(text)})
    )


if __name__ == "__main__":
    main()
