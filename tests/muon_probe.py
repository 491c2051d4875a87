"""Run in a child process with eight host devices: one update of Muon, parameters split over fsdp, and the same on one device.

Prints one line of JSON after RESULT: largest difference over largest value, by parameter; collectives of the compiled update.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mila_jax.parallel.logical import spec
from mila_jax.parallel.mesh import make_mesh
from mila_jax.train.muon import muon
from mila_jax.train.optimizer import matrices
from tests.parallel_probe import count_collectives

# Three pairs on four or two devices, so that the stacks are filled up; what Muon leaves to Adam stays out, its updates need no exchange.
LOGICAL = {
    "qkv": ((3, 16, 3, 2, 8), ("layers", "embed", None, "heads", "head_dim")), "proj": ((3, 16, 16), ("layers", "heads", "embed")),
    "fc1": ((3, 16, 64), ("layers", "embed", "mlp")), "fc2": ((3, 64, 16), ("layers", "mlp", "embed")),
}  # fmt: skip


def updates(sizes: dict):
    """(directions of one update on a mesh of these sizes, collectives)."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    r = np.random.default_rng(0)
    tx = muon(0.1, matrices, eps=1e-8, weight_decay=0.0, adam_b2=0.99)
    with jax.set_mesh(mesh):
        laid = {"pairs": {k: NamedSharding(mesh, spec(*names)) for k, (_, names) in LOGICAL.items()}}
        grads = {"pairs": {k: r.normal(size=shape).astype(np.float32) for k, (shape, _) in LOGICAL.items()}}
        params = jax.device_put(jax.tree.map(jnp.zeros_like, grads), laid)
        step = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0], in_shardings=(laid, laid), out_shardings=laid)
        compiled = step.lower(grads, params).compile()
        return jax.tree.map(np.asarray, compiled(jax.device_put(grads, laid), params))["pairs"], count_collectives(compiled.as_text())


def main() -> int:
    """Compares meshes with one device."""
    one, _ = updates(dict(data=1, fsdp=1, context=1, tensor=1))
    told = {}
    for name, sizes in {"fsdp": dict(data=1, fsdp=4, context=2, tensor=1), "tensor": dict(data=2, fsdp=2, context=1, tensor=2)}.items():
        found, collectives = updates(sizes)
        told[name] = {"apart": {k: float(np.abs(found[k] - one[k]).max() / np.abs(one[k]).max()) for k in one}, "collectives": collectives}
    print("RESULT" + json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
