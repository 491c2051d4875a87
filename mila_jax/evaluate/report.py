"""One HTML file that shows a run: pictures, videos, curves and tables, all inside the file.

Nothing is fetched when it is opened: pictures and videos are data URIs, curves are inline SVG, and there is no script. It
follows the reader's light or dark setting. Videos grow by a third inside; keep the sum under about 50 MB, or browsers open it
slowly (`Report.write` warns on the terminal beyond that).
"""

import base64
import html
import io
import math
import os
import pathlib
import sys

import numpy as np
from PIL import Image

from mila_jax.errors import UserError
from mila_jax.evaluate.video import atomic_path

_LARGE_BYTES = 50_000_000
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d0d7de; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --line: #3a4149; --soft: #1f242a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; } figure img, figure video, figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; opacity: 0.85; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.7rem; text-align: left; } th { background: var(--soft); }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; } svg .axis { stroke: currentColor; } svg .grid { stroke: var(--line); }
"""
# Distinguishable without red against green, on light and dark paper.
_COLOURS = ("#3b82c4", "#e08214", "#7b5bb5", "#1a9e8f", "#c2467e", "#8a8a2b")


def _number(value):
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _ticks(low, high, log):
    """Round numbers from low to high (data values), about five; whole powers of ten on a log axis."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        inside = [10.0**p for p in powers if low <= 10.0**p <= high]
        return inside if len(inside) >= 2 else [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curve_svg(series, log_y=False, width=720, height=300):
    """Line chart as SVG text.

    series: dict name -> list of (x, y). Points that are not finite (or not positive with log_y) are left out. Raises
    `ValueError` if no point is left.
    """
    clean = {}
    for name, points in series.items():
        kept = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
        if kept:
            clean[name] = kept
    if not clean:
        raise ValueError("nothing to draw: no finite points")
    xs = [x for points in clean.values() for x, _ in points]
    ys = [y for points in clean.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_low == y_high:
        y_low, y_high = (y_low / 2, y_high * 2) if log_y else (y_low - 0.5, y_high + 0.5)
    left, right, top, bottom = 64, 12, 12 + 16 * len(clean), 32
    rise = math.log10 if log_y else float

    def at(x, y):
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        up = height - bottom - (rise(y) - rise(y_low)) / (rise(y_high) - rise(y_low)) * (height - top - bottom)
        return f"{across:.1f}", f"{up:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">']
    for tick in _ticks(y_low, y_high, log_y):
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:.4g}</text>')
    for tick in _ticks(x_low, x_high, False):
        x, _ = at(tick, y_low)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    for index, (name, points) in enumerate(clean.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(",".join(at(x, y)) for x, y in points)
        if len(points) == 1:
            x, y = at(*points[0])
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        else:
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        y = 12 + 16 * index
        parts.append(f'<line x1="{left}" x2="{left + 20}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 26}" y="{y}" dominant-baseline="middle">{html.escape(name)}</text>')
    parts.append("</svg>")
    return "".join(parts)


class Report:
    """Collects parts in order; `write` makes the file. All text is escaped, so any string may be passed."""

    def __init__(self, title):
        self.title = title
        self._parts = []

    def add_heading(self, text):
        """A section heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def add_text(self, text):
        """Paragraphs; an empty line starts a new one."""
        for paragraph in text.split("\n\n"):
            self._parts.append(f"<p>{html.escape(paragraph.strip())}</p>")

    def add_table(self, rows, header=None, caption=""):
        """rows: list of sequences, or of dicts with the same keys (then the keys are the header). Floats get four digits."""
        if rows and isinstance(rows[0], dict):
            header = list(rows[0]) if header is None else header
            rows = [[row[key] for key in header] for row in rows]
        lines = []
        if header is not None:
            lines.append("<tr>" + "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header) + "</tr>")
        for row in rows:
            lines.append("<tr>" + "".join(f"<td>{html.escape(_number(cell))}</td>" for cell in row) + "</tr>")
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(f'<div class="scroll"><table>{title}{"".join(lines)}</table></div>')

    def add_image(self, image, caption=""):
        """image: uint8 array [H, W, 3] (stored as PNG) or the path of a PNG or JPEG file; `UserError` if it cannot be read."""
        if isinstance(image, (str, os.PathLike)):
            data = self._read(image)
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg" if data.startswith(b"\xff\xd8") else None
            if kind is None:
                raise UserError(f"{image}: neither a PNG nor a JPEG file; pass one of these to the report")
        else:
            buffer = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(buffer, format="PNG", optimize=True)
            data, kind = buffer.getvalue(), "png"
        self._figure(f'<img alt="{html.escape(caption)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">', caption)

    def add_video(self, path, caption=""):
        """path: an mp4 file, put into the report whole; `UserError` if it cannot be read."""
        data = base64.b64encode(self._read(path)).decode()
        self._figure(f'<video controls loop muted playsinline src="data:video/mp4;base64,{data}"></video>', caption)

    def add_curve(self, series, caption="", log_y=False):
        """series: dict name -> list of (x, y); see `curve_svg`."""
        self._figure(curve_svg(series, log_y), caption)

    def add_svg(self, svg, caption=""):
        """svg: SVG text made by this package (it is not escaped); nothing is added if it is empty."""
        if svg:
            self._figure(svg, caption)

    def add_code(self, text, caption=""):
        """Preformatted text, such as a configuration."""
        self._figure(f"<pre>{html.escape(text)}</pre>", caption)

    def _figure(self, body, caption):
        note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{body}{note}</figure>")

    @staticmethod
    def _read(path):
        try:
            return pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read for the report ({error.strerror or error}); check the path") from error

    def write(self, path):
        """Writes the HTML file, whole or not at all; returns its path. Raises `UserError` if it cannot be written."""
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        body = "\n".join(self._parts)
        head = f'<html lang="en"><head>{head}<style>{_STYLE}</style></head>'
        data = f"<!DOCTYPE html>\n{head}\n<body><h1>{title}</h1>\n{body}\n</body></html>\n".encode()
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        if len(data) > _LARGE_BYTES:
            print(f"{path}: {len(data) / 1e6:.0f} MB; browsers open large reports slowly, shorter videos help", file=sys.stderr)
        return pathlib.Path(path)
