"""Run in a child process with the TPU compiler: the train step of a small model, compiled ahead of time.

`python -m tests.aot_step_probe TOPOLOGY MODE REMAT`: splash and (but for kv_gather) fused temporal attention, bfloat16, 2 pairs of blocks, 6 views of 128 tokens, 4 frames, mesh
fsdp 2, context 2. Prints one JSON line: Pallas calls, collectives, and bytes of temporaries on the device and on the host.
"""

import json
import sys

import jax
from jax.experimental import topologies

from mila_jax.model.dit import DiTConfig
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.parallel.logical import rules_of, use_rules
from mila_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from mila_jax.train.state import abstract_state, state_shardings
from mila_jax.train.step import jit_train_step
from tests.parallel_probe import OBJECTIVE, count_collectives, make_clip, recorder

SIZES = dict(b=2, v=6, t=4, h=16, w=32)


def main() -> None:
    topology, mode, remat = sys.argv[1:]
    config = DiTConfig(
        width=256, depth=2, heads=2, in_channels=2, out_channels=2, text_width=6, text_length=3, pred_sigma=False, image_size=(128, 256),
        dtype="bfloat16", attention_kernel="splash", remat=remat, unroll=1, temporal_kernel="xla" if mode == "kv_gather" else "fused",
    )  # fmt: skip
    mesh = make_mesh(dict(data=1, fsdp=2, context=2, tensor=1), topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    rules, (graphdef, _) = rules_of(mode), abstract_model(config)
    with use_rules(**rules):
        shardings, batches = state_shardings(mesh, config, recorder()), batch_sharding(mesh)
    shaped = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    state = jax.tree.map(shaped, abstract_state(config, recorder()), shardings)
    clip = jax.tree.map(lambda a: shaped(a, batches), make_clip(sizes=SIZES))
    key = shaped(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    with jax.set_mesh(mesh):
        step = jit_train_step(shardings, batches, rules=rules, graphdef=graphdef, config=config, prior=None, objective=OBJECTIVE, tx=recorder())
        compiled = step.lower(state, clip, key).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = {
        "kernels": text.count('custom_call_target="tpu_custom_call"'), "collectives": count_collectives(text),
        "temporaries": memory.temp_size_in_bytes, "host": memory.host_temp_size_in_bytes,
    }  # fmt: skip
    print("RESULT" + json.dumps(found))


if __name__ == "__main__":
    main()
