"""Results as one HTML file with bars for each layout, everything inside the file."""

import html
import json

from mila_jax.evaluate.report import Report
from mila_jax.parallel.aot.terminal import HEADER, details, label, table_row

_PARTS = (("ideal", "#1a9e8f", "model FLOPs at peak"), ("roofline", "#3b82c4", "the rest of the roofline"),
          ("pessimistic", "#e08214", "the rest of the pessimistic model"), ("collectives", "#7b5bb5", "collectives, fully exposed"))


def time_bars(results: list[dict], width: int = 900) -> str:
    """SVG: a stacked bar of modelled milliseconds for each planned layout."""
    planned = [r for r in results if "seconds" in r]
    if not planned:
        return ""
    longest = max(r["seconds"]["pessimistic"] + r["seconds"]["collectives"] for r in planned)
    left, row = 330, 26
    height = 24 + row * len(planned)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    x = 0
    for _, colour, meaning in _PARTS:
        parts.append(f'<rect x="{x}" y="3" width="10" height="10" fill="{colour}"/><text x="{x + 14}" y="12">{meaning}</text>')
        x += 40 + 6 * len(meaning)
    for k, r in enumerate(planned):
        s, y, x = r["seconds"], 24 + row * k, float(left)
        parts.append(f'<text x="0" y="{y + 15}">{html.escape((r["topology"] + " " + label(r))[:52])}</text>')
        lengths = (s["ideal"], s["roofline"] - s["ideal"], s["pessimistic"] - s["roofline"], s["collectives"])
        for (_, colour, _), seconds in zip(_PARTS, lengths):
            wide = max(seconds, 0.0) / longest * (width - left - 70)
            parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="16" fill="{colour}"/>')
            x += wide
        parts.append(f'<text x="{x + 5:.1f}" y="{y + 15}">{1e3 * (s["pessimistic"] + s["collectives"]):.0f} ms</text>')
    return "".join([*parts, "</svg>"])


def memory_bars(results: list[dict], width: int = 900) -> str:
    """SVG: peak HBM of each layout as a share of the limit; the line is 90 %."""
    known = [r for r in results if "share" in r.get("hbm", {})]
    if not known:
        return ""
    left, row = 330, 26
    height = 8 + row * len(known)
    whole = width - left - 150
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for k, r in enumerate(known):
        y, share = 4 + row * k, r["hbm"]["share"]
        parts.append(f'<text x="0" y="{y + 15}">{html.escape((r["topology"] + " " + label(r))[:52])}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{whole}" height="16" fill="none" class="axis"/>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{min(share, 1.15) * whole:.1f}" height="16" fill="{"#3b82c4" if share <= 0.9 else "#c2467e"}"/>')
        note = f"{r['hbm']['peak_gib']:.2f} of {r['hbm']['limit_gib']} GiB"
        parts.append(f'<text x="{left + max(min(share, 1.15), 0.0) * whole + 5:.1f}" y="{y + 15}">{note}</text>')
    parts.append(f'<line class="axis" x1="{left + 0.9 * whole}" x2="{left + 0.9 * whole}" y1="0" y2="{height}" stroke-dasharray="4 3"/></svg>')
    return "".join(parts)


def write_page(path, results: list[dict], best: dict | None):
    """Writes the page; returns its path. Raises `UserError` if it cannot be written."""
    report = Report("mila plan: modelled layouts")
    report.add_text("Every figure on this page comes from the TPU compiler's program and a model of the chip. Nothing was measured on a TPU.")
    if best is not None and len(results) > 1:
        report.add_text(f"Recommended: {best['topology']} {label(best)}: the best pessimistic MFU of those that fit in 90 % of HBM.")
    report.add_table([table_row(r) for r in results], header=HEADER)
    report.add_svg(time_bars(results), "Modelled time of a step. MFU is the first part over the whole bar (pessimistic), or over the bar without its third part (roofline).")
    report.add_svg(memory_bars(results), "Peak HBM of a device; the dashed line is 90 % of what the compiler allows.")
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
