"""From a compiled program to figures: bytes, operations, modelled seconds, and the range that the utilisation is expected in.

Two models of time, both simple enough to say in a line (`ASSUMPTIONS`), so that the truth is likely to lie between them:

- roofline: every instruction takes the larger of its matmul time at peak and its HBM time. Without collectives no program is faster than that.
- pessimistic: matmuls take what the compiler estimates (full mode) or, filled up to the matrix unit, 85 % of the peak and
  their HBM time on top (fast mode), attention kernels the rate of their instruction count, everything else the larger of HBM time and twice its vector time.

In both, collectives stop everything else (no overlap at all), although the schedule may hide some; the figures without them stand beside.
"""

import collections

from mila_jax.parallel.aot.chips import OWN_KERNELS, Chip
from mila_jax.parallel.aot.walk import Row, Walk

GIB = 1 << 30
COSTLIEST = 10
# Without the compiler's cycles. Chosen once, so that all matmuls of the 1.2 B parameter training step on v5p together take what the
# compiler estimates for them (within 2 %; single ones differ by up to a factor of three, small batched ones most).
FAST_MATMUL_RATE = 0.85

COMMON = (
    "modelled, not measured: no figure here was checked on a TPU",
    "MFU counts the model's matmuls without recomputation, at the chip's bf16 peak",
    "collectives: bidirectional rings at the link bandwidth, between slices at the network's, fully exposed, no latency or contention",
    "roofline: per instruction the larger of matmul time at peak and HBM time; prefetches into on-chip memory overlap",
    "HBM bytes are tile-padded sizes of what each instruction reads and writes there",
)
PESSIMISTIC = {
    True: "pessimistic: matmuls by the compiler's estimated cycles, attention kernels by instruction counts without stalls, the rest by the larger "
    "of HBM time and vector time at half rate",
    False: "pessimistic (fast mode, without the compiler's cycles): matmuls at 85 % of the peak with operands filled up to the matrix unit and no "
    "overlap with their own HBM traffic, attention kernels by instruction counts without stalls, the rest by the larger of HBM time and vector time at half rate; "
    "--full uses the compiler's estimates",
}


def roofline_seconds(row: Row, chip: Chip) -> float:
    """One execution, at best."""
    return 0.0 if row.prefetch else max(row.work.flops / chip.peak, (row.read + row.written) / chip.hbm_bandwidth)


def pessimistic_seconds(row: Row, chip: Chip, cycles: bool) -> float:
    """One execution by the pessimistic model; cycles: whether the compiler's estimates are there."""
    if row.prefetch:
        return 0.0
    memory = (row.read + row.written) / chip.hbm_bandwidth
    if row.kernel in OWN_KERNELS:
        return max(memory, row.work.flops / chip.peak, row.work.vector / 1024 * chip.own[OWN_KERNELS.index(row.kernel)] / chip.clock)
    if row.kernel:
        share = chip.kernel[0 if row.kernel == "forward" else 1]
        return max(memory, row.work.padded / (chip.peak * min(share, 1.0)))
    vector = 2 * row.work.vector / (chip.vector * chip.clock)
    if not row.work.flops:
        # The compiler's estimates of what is not a matmul are several times above its own schedule: not used.
        return 0.0 if row.collective else max(memory, vector)
    if cycles and row.cycles:
        return max(memory, row.work.flops / chip.peak, row.cycles / chip.clock)
    return max(row.work.padded / (FAST_MATMUL_RATE * chip.peak) + memory, vector)


def part_of(row: Row) -> str:
    """What a row's time is spent on: attention kernels, matmuls (with what the compiler merged into them), layout copies, other."""
    return "attention kernels" if row.kernel else "matmuls" if row.work.flops else "layout copies" if row.copy else "other"


def parts(rows: list[Row], chip: Chip, cycles: bool) -> dict:
    """Milliseconds by `part_of`: {part: {"roofline_ms": …, "pessimistic_ms": …}}."""
    found = {name: {"roofline_ms": 0.0, "pessimistic_ms": 0.0} for name in ("attention kernels", "matmuls", "layout copies", "other")}
    for row in rows:
        found[part_of(row)]["roofline_ms"] += 1e3 * row.times * roofline_seconds(row, chip)
        found[part_of(row)]["pessimistic_ms"] += 1e3 * row.times * pessimistic_seconds(row, chip, cycles)
    return found


def collective_table(rows: list[Row]) -> list[dict]:
    """One entry for each kind, axis and way, costliest first: executions, GiB a device and modelled milliseconds of a step."""
    total = collections.defaultdict(lambda: [0, 0, 0.0])
    for row in rows:
        c = row.collective
        if c:
            entry = total[c.kind, c.axis, c.size, c.asynchronous]
            entry[0] += row.times
            entry[1] += row.times * c.bytes
            entry[2] += row.times * c.seconds
    ordered = sorted(total.items(), key=lambda item: -item[1][2])
    return [
        {"kind": k, "axis": axis, "devices": size, "asynchronous": way, "count": n, "gib": b / GIB, "ms": 1e3 * s}
        for (k, axis, size, way), (n, b, s) in ordered
    ]


def costliest(rows: list[Row], chip: Chip, cycles: bool) -> list[dict]:
    """The instructions that take most of the pessimistic time, a collective's own time included; equal ones of one source line together."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.source, row.op_name, row.opcode, row.type].append(row)
    entries = []
    for (source, op_name, opcode, _), members in groups.items():
        network = sum(r.times * r.collective.seconds for r in members if r.collective)
        entries.append({
            "instruction": members[0].name, "opcode": opcode, "source": source, "operation": op_name, "executions": sum(r.times for r in members),
            "roofline_ms": 1e3 * (network + sum(r.times * roofline_seconds(r, chip) for r in members)),
            "pessimistic_ms": 1e3 * (network + sum(r.times * pessimistic_seconds(r, chip, cycles) for r in members)),
            "gflop": sum(r.times * r.work.flops for r in members) / 1e9,
            "hbm_mib": sum(r.times * (r.read + r.written) for r in members) / 2**20,
        })  # fmt: skip
    return sorted(entries, key=lambda e: -e["pessimistic_ms"])[:COSTLIEST]


def figures(found: Walk, chip: Chip, model_flops: float, full: bool) -> dict:
    """The result of one layout, everything for one device and one step. model_flops: of one device.

    Keys: flops, traffic, copies, seconds, mfu, parts, collectives, collective_count, costliest, assumptions, warnings.
    """
    rows = found.rows

    def total(value):
        return float(sum(value(r) * r.times for r in rows))

    hlo = total(lambda r: r.work.flops)
    network = total(lambda r: r.collective.seconds if r.collective else 0.0)
    hidden = total(lambda r: r.collective.seconds if r.collective and r.collective.asynchronous else 0.0)
    hbm = total(lambda r: r.read + r.written)
    best = max(total(lambda r: roofline_seconds(r, chip)), hbm / chip.hbm_bandwidth, 1e-12)  # never 0, whatever the program
    worst = max(total(lambda r: pessimistic_seconds(r, chip, full)), best)
    ideal = model_flops / chip.peak
    warnings = []
    if found.unknown_loops:
        warnings.append(f"{len(found.unknown_loops)} loops without a known number of iterations are counted once: the figures are too good")
    return {
        "flops": {
            "model": model_flops, "hlo": hlo, "hlo_over_model": hlo / model_flops, "attention_kernels": total(lambda r: r.work.flops if r.kernel else 0),
        },
        "traffic": {"hbm_gib": hbm / GIB, "prefetch_gib": total(lambda r: (r.read + r.written) * r.prefetch) / GIB},
        "copies": {"count": int(total(lambda r: r.copy)), "gib": total(lambda r: (r.read + r.written) * r.copy) / GIB},
        "seconds": {"ideal": ideal, "roofline": best, "pessimistic": worst, "collectives": network, "collectives_asynchronous": hidden},
        "mfu": {
            "roofline": ideal / (best + network), "pessimistic": ideal / (worst + network),
            "roofline_without_collectives": ideal / best, "pessimistic_without_collectives": ideal / worst,
        },
        "parts": parts(rows, chip, full),
        "collectives": collective_table(rows),
        "collective_count": {
            "all": int(total(lambda r: r.collective is not None)), "asynchronous": int(total(lambda r: bool(r.collective and r.collective.asynchronous))),
        },
        "costliest": costliest(rows, chip, full),
        "assumptions": [*COMMON, PESSIMISTIC[full]],
        "warnings": warnings,
    }  # fmt: skip
