"""Results as text for the terminal."""

from mila_jax.parallel.aot.layout import COMFORTABLE, comfortable


def label(result: dict) -> str:
    """A layout in a few words: what the sweep changed, else its mesh."""
    if result["changes"]:
        return " ".join(f"{key}={value}" for key, value in result["changes"].items())
    return " ".join(f"{axis}={size}" for axis, size in result.get("mesh", {}).items() if size > 1) or "one device"


def _columns(rows: list[tuple]) -> list[str]:
    widths = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


HEADER = ("topology", "layout", "HBM GiB", "of limit", "MFU pessimistic", "MFU roofline", "without coll.", "HLO/model", "coll. ms", "step ms", "note")


def table_row(result: dict) -> tuple:
    """The cells of `HEADER`."""
    hbm, mfu, seconds = result.get("hbm", {}), result.get("mfu"), result.get("seconds")
    memory = (f"{hbm['peak_gib']:.2f}", f"{hbm['share']:.0%}") if "peak_gib" in hbm else ("-", "-")
    if mfu is None:
        return (result["topology"], label(result), *memory, "-", "-", "-", "-", "-", "-", f"{result['status']}: {result['reason']}")
    low, high = seconds["roofline"] + seconds["collectives"], seconds["pessimistic"] + seconds["collectives"]
    note = "" if comfortable(result) else ("does not fit" if not hbm.get("fits", True) else f"over {COMFORTABLE:.0%} of HBM")
    return (
        result["topology"], label(result), *memory, f"{mfu['pessimistic']:.3f}", f"{mfu['roofline']:.3f}", f"{mfu['roofline_without_collectives']:.3f}",
        f"{result['flops']['hlo_over_model']:.3f}", f"{1e3 * seconds['collectives']:.1f}", f"{1e3 * low:.0f} – {1e3 * high:.0f}", note,
    )  # fmt: skip


def overview(results: list[dict]) -> str:
    """One line for each layout. All figures are modelled."""
    return "\n".join(_columns([HEADER, *(table_row(r) for r in results)]))


def details(result: dict) -> str:
    """Everything about one layout."""
    if result["status"] != "planned":
        return f"{result['topology']} {label(result)}: {result['status']}: {result['reason']}"
    s, f, t, c, hbm = result["sizes"], result["flops"], result["traffic"], result["copies"], result["hbm"]
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    lines = [
        f"{result['step']} step of {result['config']} on {result['topology']} ({result['devices']} devices, {mesh}); {result['mode']} mode, modelled",
        f"  batch {s['batch']}, {s['views']} views × {s['frames']} frames, {s['tokens_per_frame']} tokens a frame; {s['evaluations']} evaluation(s)"
        + (f" and one of a guide (width {s['guide']['width']}, {s['guide']['depth']} pairs)" if "guide" in s else ""),
        f"  HBM      {hbm.get('peak_gib', float('nan')):.2f} of {hbm['limit_gib']} GiB a device ({hbm.get('share', float('nan')):.0%}; {hbm.get('source', '')}); "
        f"state and batch {hbm.get('state_and_batch_gib', float('nan')):.2f} GiB",
        f"  FLOPs    model {f['model']:.4g}, program {f['hlo']:.4g} a device: {f['hlo_over_model']:.3f} × the model's (kernels {f['attention_kernels']:.3g})",
        f"  traffic  {t['hbm_gib']:.1f} GiB through HBM, of which {t['prefetch_gib']:.1f} prefetched; {c['count']} layout copies, {c['gib']:.2f} GiB",
        f"  time     {1e3 * result['seconds']['roofline']:.1f} ms roofline, {1e3 * result['seconds']['pessimistic']:.1f} ms pessimistic, "
        f"+ {1e3 * result['seconds']['collectives']:.1f} ms collectives ({1e3 * result['seconds']['collectives_asynchronous']:.1f} of them asynchronous)",
        "           of it " + ", ".join(f"{name} {p['roofline_ms']:.1f} … {p['pessimistic_ms']:.1f} ms" for name, p in result["parts"].items()),
        f"  MFU      {result['mfu']['pessimistic']:.3f} (pessimistic) to {result['mfu']['roofline']:.3f} (roofline), "
        f"without collectives {result['mfu']['pessimistic_without_collectives']:.3f} to {result['mfu']['roofline_without_collectives']:.3f}",
    ]  # fmt: skip
    lines += [f"  ! {warning}" for warning in result["warnings"]] + ([f"  ! {result['reason']}"] if result["reason"] else [])
    if result["collectives"]:
        n = result["collective_count"]
        lines += ["", f"  collectives, per device and step: {n['all']}, of which {n['asynchronous']} asynchronous"]
        rows = [("kind", "axis", "devices", "count", "GiB", "ms", "")]
        rows += [
            (e["kind"], e["axis"], e["devices"], e["count"], f"{e['gib']:.3f}", f"{e['ms']:.2f}", "asynchronous" if e["asynchronous"] else "")
            for e in result["collectives"]
        ]
        lines += ["    " + line for line in _columns(rows)]
    lines += ["", "  costliest instructions"]
    rows = [("pessimistic ms", "roofline ms", "times", "GFLOP", "HBM MiB", "source", "operation")]
    for e in result["costliest"]:
        cells = (f"{e['pessimistic_ms']:.2f}", f"{e['roofline_ms']:.2f}", e["executions"], f"{e['gflop']:.0f}", f"{e['hbm_mib']:.0f}")
        rows.append((*cells, e["source"] or e["instruction"], _short(e["operation"])))
    return "\n".join(lines + ["    " + line for line in _columns(rows)])


def _short(operation: str) -> str:
    """The end of JAX's path, with the pass it belongs to."""
    part = "recompute " if "rematted_computation" in operation else "backward " if "transpose(" in operation else ""
    return part + operation.rpartition("/")[2]


def assumptions(results: list[dict]) -> str:
    """What the figures rest on, said once."""
    said = list(dict.fromkeys(line for r in results for line in r.get("assumptions", ())))
    return "\n".join(["assumptions:", *(f"  - {line}" for line in said)])
