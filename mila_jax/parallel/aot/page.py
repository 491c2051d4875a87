"""Results as one HTML file with bars for each layout, everything inside the file."""

import html
import json

from mila_jax.evaluate.report import Report
from mila_jax.parallel.aot.terminal import HEADER, details, label, table_row

_PARTS = (("#1a9e8f", "model FLOPs at peak"), ("#3b82c4", "the rest of the roofline"), ("#e08214", "the rest of the pessimistic model"),
          ("#7b5bb5", "collectives, fully exposed"))  # fmt: skip
_WIDTH, _LEGEND, _ROW, _BAR = 1000, 24, 46, 16  # of a drawing, its legend, a layout (a line of text and a bar), a bar
_NOTES = 290  # room at the right for what is written beside a bar


def _drawing(parts: list[str], height: int) -> str:
    return "".join([f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">', *parts, "</svg>"])


def _name(result: dict) -> str:
    return html.escape(f"{result['topology']} {label(result)}")


def time_bars(results: list[dict]) -> str:
    """SVG: for each planned layout what its modelled step consists of, as shares of it, so that layouts and chips can be compared."""
    planned = [r for r in results if "seconds" in r]
    parts, x = [], 0
    for colour, meaning in _PARTS:
        parts.append(f'<rect x="{x}" y="3" width="10" height="10" fill="{colour}"/><text x="{x + 14}" y="12">{meaning}</text>')
        x += 44 + 6 * len(meaning)
    for k, r in enumerate(planned):
        s, m, y, x = r["seconds"], r["mfu"], _LEGEND + _ROW * k, 0.0
        parts.append(f'<text x="0" y="{y + 16}">{_name(r)}</text>')
        lengths = (s["ideal"], s["roofline"] - s["ideal"], s["pessimistic"] - s["roofline"], s["collectives"])
        for (colour, _), seconds in zip(_PARTS, lengths):
            wide = max(seconds, 0.0) / (s["pessimistic"] + s["collectives"]) * (_WIDTH - _NOTES)
            parts.append(f'<rect x="{x:.1f}" y="{y + 22}" width="{wide:.1f}" height="{_BAR}" fill="{colour}"/>')
            x += wide
        low, high = (1e3 * (s[name] + s["collectives"]) for name in ("roofline", "pessimistic"))
        note = f"MFU {m['pessimistic']:.3f} … {m['roofline']:.3f}, {low:.0f} … {high:.0f} ms a step"
        parts.append(f'<text x="{_WIDTH - _NOTES + 12}" y="{y + 34}">{note}</text>')
    return _drawing(parts, _LEGEND + _ROW * len(planned)) if planned else ""


def memory_bars(results: list[dict]) -> str:
    """SVG: peak HBM of each layout as a share of the limit; the line is 90 %."""
    known = [r for r in results if "share" in r.get("hbm", {})]
    most, parts = 1.15, []
    whole = (_WIDTH - _NOTES) / most  # what is over the limit has a little room, too
    for k, r in enumerate(known):
        y, share = _ROW * k, r["hbm"]["share"]
        parts.append(f'<text x="0" y="{y + 16}">{_name(r)}</text>')
        colour = "#3b82c4" if share <= 0.9 else "#c2467e"
        parts.append(f'<rect x="0" y="{y + 22}" width="{min(share, most) * whole:.1f}" height="{_BAR}" fill="{colour}"/>')
        parts.append(f'<rect x="0.5" y="{y + 22}" width="{whole:.1f}" height="{_BAR}" fill="none" class="axis"/>')
        parts.append(f'<line class="axis" x1="{0.9 * whole:.1f}" x2="{0.9 * whole:.1f}" y1="{y + 19}" y2="{y + 41}" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{_WIDTH - _NOTES + 12}" y="{y + 34}">{r["hbm"]["peak_gib"]:.2f} of {r["hbm"]["limit_gib"]} GiB, {share:.0%}</text>')
    return _drawing(parts, _ROW * len(known)) if known else ""


_HEADER = ("topology", "layout", "HBM GiB", "MFU", "without collectives", "FLOPs / model's", "step ms")


def _cells(result: dict) -> tuple:
    """The cells of `_HEADER`: those of the terminal's table, ranges in one cell, reasons elsewhere."""
    row = dict(zip(HEADER, table_row(result)))
    joined = lambda low, high: f"{low}\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}{high}"  # noqa: E731
    mfu, step, planned = result["status"], "-", result["status"] == "planned"
    if planned:
        mfu, step = joined(row["MFU pessimistic"], row["MFU roofline"]), joined(*row["step ms"].split(" – "))
    memory = f"{row['HBM GiB']} ({row['note']})" if planned and row["note"] else row["HBM GiB"]
    return (row["topology"], row["layout"], memory, mfu, row["without coll."], row["HLO/model"], step)


def write_page(path, results: list[dict], best: dict | None):
    """Writes the page; returns its path. Raises `UserError` if it cannot be written."""
    report = Report("mila plan: modelled layouts")
    report.add_text("Every figure on this page comes from the TPU compiler's program and a model of the chip. Nothing was measured on a TPU.")
    if best is not None and len(results) > 1:
        report.add_text(f"Recommended: {best['topology']} {label(best)}: the best pessimistic MFU of those that fit in 90 % of HBM.")
    report.add_table([_cells(r) for r in results], header=_HEADER)
    for result in results:
        if result["reason"]:
            report.add_text(f"{result['topology']} {label(result)}: {result['reason']}")
    report.add_svg(
        time_bars(results),
        "What a modelled step consists of. MFU is the first part over the whole bar (pessimistic), or over the bar without its third part (roofline).",
    )
    report.add_svg(memory_bars(results), "Peak HBM of a device; the frame is what the compiler allows, the dashed line nine tenths of it.")
    for result in results:
        report.add_heading(f"{result['topology']} {label(result)}")
        report.add_code(details(result))
    said = dict.fromkeys(line for r in results for line in r.get("assumptions", ()))
    report.add_heading("Assumptions")
    report.add_table([(line,) for line in said])
    sources = dict.fromkeys(tuple(line) for r in results for line in r.get("sources", ()))
    report.add_table(list(sources), header=("constant", "source", "confidence"))
    report.add_heading("Everything as JSON")
    report.add_code(json.dumps(results, indent=1))
    return report.write(path)
