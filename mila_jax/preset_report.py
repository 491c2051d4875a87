"""The page of `mila evaluate --preset`, and `mila report A B`, which compares two of them score by score."""

import collections
import dataclasses
import json
import math
import pathlib

from mila_jax.errors import UserError
from mila_jax.evaluate import protocol
from mila_jax.evaluate.report import Report
from mila_jax.preset_measures import LOWER
from mila_jax.scores import check_file


def _twice(cards) -> set[tuple]:
    """Score, views and window of those that one record has more than once, with different preprocessing."""
    found = collections.Counter((card["score"], card["views"], card["window"]) for card in cards)
    return {key for key, count in found.items() if count > 1}


def _named(card: dict, twice: set[tuple]) -> str:
    """The score, and its preprocessing where there are several."""
    key = (card["score"], card["views"], card["window"])
    return f"{card['score']} ({card['preprocessing']})" if key in twice else card["score"]


def _table(rows) -> list[dict]:
    """Rows of one table, with all columns in each."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "card"))
    windows = any(row["card"]["window"] for row in rows)
    twice = _twice([row["card"] for row in rows])

    def head(card):
        named = {"score": _named(card, twice), "views": card["views"]}
        return named | ({"seconds": card["window"] or "all"} if windows else {})

    return [head(row["card"]) | {key: row.get(key, "") for key in columns} for row in rows]


def write_report(out: pathlib.Path, record: dict, shown: list[pathlib.Path]) -> pathlib.Path:
    """report.html of a `record` (scores.json) in `out`, with some videos; returns its path."""
    report = Report(f"Scores, {record['preset']}")
    guide, _, scale = record.get("made_by", "").partition("+")[2].partition("@")
    guided = f", guided by {guide[:12]} (scale {scale})" if guide else ""
    report.add_text(f"{record['rule']}. Weights {record['weights_sha256'][:12]}{guided}. Clips that could not be had: {record['dropped'] or 'none'}.")
    report.add_table(
        _table(record["scores"]), caption="Distances, lower is better; beside them what halves of the real clips and broken real clips have"
    )
    curves, twice = collections.defaultdict(list), _twice([row["card"] for row in record["scores"]])
    for row in record["scores"]:
        if row["card"]["window"]:
            middle = sum(map(float, row["card"]["window"].split("-"))) / 2
            curves[f"{_named(row['card'], twice)} {row['card']['views']}"].append((middle, row["distance"]))
    for name, points in curves.items():
        if len(points) > 1:
            report.add_curve({name: sorted(points)}, f"{name} by the middle of its window, seconds after the last given frame")
    caption = "Beside each generated value: the recorded video's, and those of videos that are known to be bad"
    report.add_table(_table(record["measures"]), caption=caption)
    if any(row["card"]["score"].startswith("following") for row in record["measures"]):
        report.add_text(
            "Following: motion is read from the pictures; the recorded row is the reader's own error on this data, so only what exceeds it is the "
            "model's. Nothing else is claimed where the reader has not been checked against true motion."
        )
    for score, why in record["left_out"].items():
        report.add_text(f"Left out: {score}, {why}.")
    for row in record["scores"] + record["measures"]:
        report.add_code(protocol.Card(**row["card"]).text(), "Protocol")
    for video in shown:
        report.add_video(video, "Generated (left half of each picture) and recorded (right half).")
    return report.write(out / "report.html")


def _read(folder) -> list[dict]:
    """All rows of a folder's scores.json. Raises `UserError` naming the file."""
    path = pathlib.Path(folder) / "scores.json"
    try:
        record = json.loads(path.read_text())
        rows = [row | {"card": protocol.Card(**row["card"])} for row in record["scores"] + record.get("measures", [])]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not there or not readable ({error}); mila evaluate --preset=NAME --out={folder} writes it") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of mila evaluate --preset ({type(error).__name__}: {error}); write it again") from None
    if not rows:
        raise UserError(f"{path} holds no scores; mila evaluate --preset=NAME --out={folder} writes them")
    return rows


def _by_key(rows, twice) -> dict[tuple, dict]:
    """Rows by score, views and window, and by preprocessing for those that are in `twice`."""
    out = {}
    for row in rows:
        card = row["card"]
        key = (card.score, card.views, card.window)
        out[(*key, card.preprocessing) if key in twice else key] = row
    return out


def _verdict(a: dict, b: dict) -> str:
    """Which of two comparable rows is better, and by how much."""
    if "distance" in a or a.get("better") == LOWER:
        x, y = (row.get("distance", row.get("generated")) for row in (a, b))
        if math.isclose(x, y):
            text = "equal"
        else:
            text = f"{'first' if x < y else 'second'} is better by {abs(x - y):.4g}"
        beside = f"halves of the real clips: {a.get('real halves', math.nan):.2f}" if "distance" in a else ""
        beside = f"recorded: {a['recorded']:.4g}" if "recorded" in a else beside
        return text + (f" ({beside})" if beside else "")
    x, y = (abs(row["generated"] - row["recorded"]) for row in (a, b))
    recorded = f" ({a['recorded']:.4g})" if math.isclose(a["recorded"], b["recorded"]) else f" ({a['recorded']:.4g} and {b['recorded']:.4g})"
    return ("equally near to" if math.isclose(x, y) else f"{'first' if x < y else 'second'} is nearer to") + " the recorded value" + recorded


def report_command(first, second, out=None) -> str:
    """`mila report A B`: two folders of `mila evaluate --preset`, score by score; returns the text, and writes it to `out` as a page.

    Scores whose protocol cards differ are shown apart, with what differs: they cannot be compared. Raises `UserError` for a folder without scores and
    for an `out` that cannot be written.
    """
    if out:
        check_file(out)
    lines, table = [], []
    found = [_read(folder) for folder in (first, second)]
    # One with a single preprocessing meets its like in the other's two.
    twice = set().union(*(_twice([dataclasses.asdict(row["card"]) for row in rows]) for rows in found))
    a, b = (_by_key(rows, twice) for rows in found)
    for key in sorted(a.keys() | b.keys()):
        name = " ".join(key[:2]) + (f" {key[2]} s" if key[2] else "") + (f" ({key[3]})" if len(key) > 3 else "")
        if key not in a or key not in b:
            lines.append(f"{name}: only in {first if key in a else second}")
            continue
        different = a[key]["card"].differences(b[key]["card"])
        values = [row.get("distance", row.get("generated")) for row in (a[key], b[key])]
        digits = 2 if "distance" in a[key] else 4
        text = f"{name}: {values[0]:.{digits}f} and {values[1]:.{digits}f}"
        if different:
            text += f"; NOT comparable, the protocols differ in {', '.join(different)}"
        else:
            text += f", {_verdict(a[key], b[key])}"
        lines.append(text)
        comparable = "no: " + ", ".join(different) if different else "yes"
        table.append({"score": name, str(first): values[0], str(second): values[1], "comparable": comparable})
    if out:
        report = Report("Two evaluations")
        report.add_table(table, caption="Distances are better when lower; the other scores as the lines below say")
        for line in lines:
            report.add_text(line)
        report.write(out)
    return "\n".join(lines)
