"""Run in a child process with the TPU compiler: the whole rollout of a guided video, compiled ahead of time.

`python -m tests.aot_rollout_probe TOPOLOGY SECONDS …`: configs/small.py with splash and fused attention in bfloat16, both guidance passes at a
time over `data`, frames over `context`. Prints one JSON line: for each length bytes on a device, seconds of compiling, and Pallas calls.
"""

import json
import sys
import time

import jax
import numpy as np
from jax.experimental import topologies

from mila_jax.config import load_config
from mila_jax.flow.rollout import make_rows, make_tables, start_state
from mila_jax.generate import make_plan, shared_conditions, stage_conditions
from mila_jax.flow.rollout import SamplerOptions
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.model.weights import model_config
from mila_jax.parallel.aot.sizes import data_description
from mila_jax.rollout_program import Layout, Network, Parameters, RolloutProgram, evaluations, generation_mesh, generation_rules
from mila_jax.start import FRAME_RATE, Start
from mila_jax.trajectory import manoeuvre
from tests.parallel_probe import count_collectives


def compile_rollout(config, devices, seconds: float) -> dict:
    """Sizes of the program for a video of this length on these devices, in one call."""
    data, samples = data_description(config), evaluations(config.generate, 1)
    dit = model_config(config, data)
    graphdef, params = abstract_model(dit)
    params = Parameters(params)
    mesh = generation_mesh(config.mesh, samples, devices)
    rows, columns, _ = data["latent_shape"]
    layout = Layout(mesh, generation_rules(config, dit, mesh, samples, config.window.frames, rows * columns // 4), 1)
    plan = make_plan(config, round(seconds * FRAME_RATE), config.window.conditioning)
    text = np.zeros(data["text_shape"], np.float32)
    start = Start(
        first_latents=np.zeros((6, plan.given, *data["latent_shape"]), np.float32), intrinsics=np.ones((6, 4), np.float32),
        extrinsics=np.ones((6, 7), np.float32), trajectory=manoeuvre("straight", seconds + 10), text=text, text_mask=text[:, 0] == 0, description="",
    )  # fmt: skip
    shardings = layout.parameters(params)
    program = RolloutProgram(Network(graphdef, dit, None), config.generate, layout, shardings)
    conditions = {stage: stage_conditions([start], windows) for stage, windows in plan.stages.items()}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    host = (start_state(start.first_latents[None], plan), make_rows(plan, conditions), make_tables(plan, SamplerOptions(config.generate.steps)))
    lowered = program.lower(params, *host, shared_conditions([start], plan.window), key, np.int32(plan.windows))
    began = time.monotonic()
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "windows": plan.windows, "temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "peak": memory.peak_memory_in_bytes, "seconds": time.monotonic() - began, "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": count_collectives(text), "devices": mesh.size,
    }  # fmt: skip


def main() -> None:
    topology, *lengths = sys.argv[1:]
    config = load_config("configs/small.py")
    config.attention.update(kernel="splash", temporal="fused", text="fused")
    config.generate.update(guidance_text=2.0)
    config.mesh.update(data=2, context=4)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    print("RESULT" + json.dumps([compile_rollout(config, devices, float(length)) for length in lengths]))


if __name__ == "__main__":
    main()
