"""Run in a child process with the TPU compiler: the fused kernel of attention to the text, forward and backward, for one chip of a topology.

`python -m tests.text_probe TOPOLOGY`; 14 frames of 2,688 tokens, 120 words, 9 heads of 128. Prints one JSON line.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mila_jax.model.cross_kernel import fused_text_attention


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), P())
    tokens, words, mask = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((1, 14, 2688, 9 * 128), jnp.bfloat16), ((1, 120, 9 * 128), jnp.bfloat16), ((1, 120), jnp.bool_))
    )

    def value(q, k, v, mask):
        return fused_text_attention(q, k, v, mask, 128).astype(jnp.float32).sum()

    compiled = jax.jit(jax.value_and_grad(value, (0, 1, 2))).lower(tokens, words, words, mask).compile()
    text = compiled.as_text()
    print(
        "RESULT"
        + json.dumps({"kernels": text.count('custom_call_target="tpu_custom_call"'), "temporaries": compiled.memory_analysis().temp_size_in_bytes})
    )


if __name__ == "__main__":
    main()
