"""Attention kernels (Pallas) in a compiled program: the compiler knows nothing of their inside, so their work comes from their shapes."""

import math
import re

from mila_jax.parallel.aot.chips import OWN_KERNELS
from mila_jax.parallel.aot.costs import Work, operand_arrays
from mila_jax.parallel.aot.hlo import Computation, Instruction

TARGET = "tpu_custom_call"

# Matmuls of q·s·e multiply-adds each in a kernel: the forward pass has two (scores, values); a fused backward pass five (scores again,
# dv, dp, dk, dq); of split ones, that for k and v has four and that for q three.
MATMULS = {"forward": 2, "backward": 5, "backward_kv": 4, "backward_q": 3}


def custom_call_target(i: Instruction) -> str:
    """The target of a custom call, "" for anything else."""
    found = re.search(r'custom_call_target="([^"]*)"', i.attributes) if i.opcode == "custom-call" else None
    return found[1] if found else ""


def _inputs(i: Instruction, computation: Computation):
    return [a for a in operand_arrays(i, computation) if a.dtype in ("bf16", "f32") and len(a.dims) >= 3]


def kernel_part(i: Instruction, computation: Computation) -> str:
    """Which of `MATMULS` a kernel is, from its name; a kernel for k and v that also returns dq is a fused one."""
    name = f"{i.name} {i.op_name}".lower()
    if "dkv" in name:
        # Results of the rank of q: dk and dv, and dq if the kernel is a fused one; scratch buffers have an axis less.
        rank = max((len(a.dims) for a in _inputs(i, computation)[:1]), default=3)
        return "backward" if sum(len(a.dims) >= rank for a in i.out) >= 3 else "backward_kv"
    if "dq" in name:
        return "backward_q"
    if "bwd" in name or "backward" in name:
        return "backward"
    return "forward"


def own_kernel(i: Instruction) -> str:
    """Which of our own kernels an instruction is (`chips.OWN_KERNELS`, by the names that they are given), "" for others."""
    return next((name for name in OWN_KERNELS if name in i.name or name in i.op_name), "")


def kernel_work(i: Instruction, computation: Computation, unit: int = 128) -> Work:
    """Work of an attention kernel with operands q [..., q, e] and k [..., s, e] (the first two float arrays of three or more axes).

    The kernel of temporal attention has frames before places: [b, t, n, k·e]. Nothing if there are no such operands. padded: with the
    head width filled up to the matrix unit; vector: elements of q, for our own kernels, whose time `chips.Chip.own` has.
    """
    inputs = _inputs(i, computation)
    if len(inputs) < 2:
        return Work()
    own = own_kernel(i)
    q, k = inputs[0].dims, inputs[1].dims
    matmuls = MATMULS[kernel_part(i, computation)]
    flops = 2.0 * matmuls * k[-3 if own.startswith("temporal") else -2] * math.prod(q)
    # A head narrower than 128 lanes still takes all of them; the matrix unit's own side matters less, the kernel's rate includes it.
    return Work(flops, flops * -(-q[-1] // 128) * 128 / q[-1], math.prod(q) if own else 0.0)
