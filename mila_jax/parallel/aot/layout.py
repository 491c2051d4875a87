"""One layout: a config, a topology and a step → one result (a dict of plain values, the JSON that `mila plan` writes)."""

import json
import re

from mila_jax.errors import UserError
from mila_jax.parallel.aot import cache, hlo
from mila_jax.parallel.aot.chips import SOURCES, Topology
from mila_jax.parallel.aot.compiler import compile_step
from mila_jax.parallel.aot.figures import GIB, figures
from mila_jax.parallel.aot.flops import model_flops
from mila_jax.parallel.aot.sizes import plan_sizes, with_guide_sizes
from mila_jax.parallel.aot.walk import walk
from mila_jax.views import VIEWS

_UNITS = re.compile(r"\(([\d.]+)([KMGT])\) exceeds")  # "… temporaries (44.18G) exceeds available HBM …"
COMFORTABLE = 0.9  # share of HBM up to which a layout is recommended: a run needs room for the next batch and for saving


def plan_layout(
    config,
    topology: Topology,
    step: str,
    *,
    name: str = "",
    changes: dict | None = None,
    full: bool = False,
    use_cache: bool = True,
    limit: float = 3600.0,
) -> dict:
    """Plans one layout. name: of the config; changes: what the layout changes in it (only written down here).

    status: "planned", or "refused" with a reason when the compiler refuses it. Raises `UserError` for what cannot be planned.
    """  # fmt: skip
    config = with_guide_sizes(config, step)
    sizes = plan_sizes(config, topology.devices, step)
    mode = "full" if full else "fast"
    key = cache.key(config, topology.name, step, full)
    outcome = cache.load(key) if use_cache else None
    cached = outcome is not None
    if outcome is None:
        outcome = compile_step(config, topology.name, step, full=full, limit=limit)
        if use_cache and not outcome.passing:
            cache.save(key, outcome)
    chip, limit_gib = topology.chip, topology.chip.hbm_limit
    result = {
        "status": "planned", "reason": "", "config": name, "config_hash": cache.config_hash(config), "topology": topology.name, "devices": topology.devices,
        "mesh": sizes.mesh, "step": step, "mode": mode, "changes": dict(changes or {}),
        "sizes": {
            "batch": sizes.batch, "views": len(VIEWS), "frames": sizes.frames, "tokens_per_frame": sizes.tokens * len(VIEWS),
            "evaluations": sizes.passes, "width": sizes.dit.width, "depth": sizes.dit.depth, "heads": sizes.dit.heads,
            **({} if sizes.guide is None else {"guide": {"width": sizes.guide.width, "depth": sizes.guide.depth, "heads": sizes.guide.heads}}),
        },
        "hbm": {"limit_gib": limit_gib}, "compile": {"seconds": round(outcome.seconds, 1), "cached": cached}, "versions": cache.versions(),
        "chip": {k: getattr(chip, k) for k in ("name", "peak", "hbm_bandwidth", "hbm_limit", "link", "network", "clock")},
        "sources": [list(line) for line in SOURCES],
    }  # fmt: skip
    if outcome.memory.get("peak"):
        peak = outcome.memory["peak"] / GIB
        result["hbm"] |= {"peak_gib": peak, "share": peak / limit_gib, "fits": peak <= limit_gib, "source": outcome.memory["source"]}
    if outcome.arguments is not None:
        result["hbm"]["state_and_batch_gib"] = outcome.arguments / GIB
    if outcome.failure:
        needed = _UNITS.search(outcome.failure)
        if needed and "peak_gib" not in result["hbm"]:
            peak = float(needed[1]) * {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}[needed[2]]
            result["hbm"] |= {"peak_gib": peak, "share": peak / limit_gib, "source": "what the compiler refuses"}
        result |= {"status": "refused", "reason": outcome.failure}
        result["hbm"]["fits"] = False
        return result
    # Slices lie along the axis data (`parallel.placement`); the program is that of one of them, with sends to the others.
    found = walk(hlo.parse(outcome.text), chip, sizes.mesh | {"data": sizes.mesh["data"] // topology.slices})
    result |= figures(found, chip, model_flops(sizes) / topology.devices, full)
    if step == "train" and tuple(config.train.get("trainable", ("*",))) != ("*",):
        result["warnings"].append("train.trainable freezes parameters, but the model's FLOPs are of a whole backward pass: MFU is too high")
    if not result["hbm"].get("fits", True):
        result["reason"] = f"needs {result['hbm']['peak_gib']:.2f} GiB of {limit_gib} GiB"
    return result


def skipped(topology: Topology, step: str, changes: dict, error: UserError) -> dict:
    """The result of a layout that cannot work, with the reason."""
    return {"status": "skipped", "reason": str(error), "topology": topology.name, "devices": topology.devices, "step": step, "changes": dict(changes)}


def comfortable(result: dict) -> bool:
    """Whether a result fits with room to spare."""
    return result["status"] == "planned" and result["hbm"].get("share", 2.0) <= COMFORTABLE


def to_json(results: list[dict]) -> str:
    """One result as an object, several as a list."""
    return json.dumps(results[0] if len(results) == 1 else results, indent=1)
