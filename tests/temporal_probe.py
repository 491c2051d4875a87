"""Run in a child process with the TPU compiler: the fused temporal kernel, forward and backward, for one chip of a topology.

`python -m tests.temporal_probe TOPOLOGY`; 448 places, 28 frames, 9 heads of 128. Prints one JSON line.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.model.layers import rotary_tables
from mila_jax.model.temporal_kernel import fused_attention


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), P())
    array = jax.ShapeDtypeStruct((1, 28, 6, 112, 9 * 128), jnp.bfloat16, sharding=sharding)
    weight = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=sharding)

    def value(q, k, v, q_weight, k_weight):
        return fused_attention(q, k, v, q_weight, k_weight, rotary_tables(28, 128)).astype(jnp.float32).sum()

    compiled = jax.jit(jax.value_and_grad(value, (0, 1, 2, 3, 4))).lower(array, array, array, weight, weight).compile()
    text = compiled.as_text()
    print(
        "RESULT"
        + json.dumps({"kernels": text.count('custom_call_target="tpu_custom_call"'), "temporaries": compiled.memory_analysis().temp_size_in_bytes})
    )


if __name__ == "__main__":
    main()
