"""One score with two preprocessings: told apart in a report, and met by its like in another."""

import dataclasses
import json

from mila_jax.preset_report import _table, report_command
from tests.test_evaluate_protocol import CARD


def _rows(*resizes):
    cards = [dataclasses.replace(CARD, score="FVD", preprocessing=resize) for resize in resizes]
    return [{"card": dataclasses.asdict(card), "distance": 10.0 + number, "real halves": 1.0} for number, card in enumerate(cards)]


def test_two_resizes_of_a_score_bear_their_names():
    assert [row["score"] for row in _table(_rows("tf1", "squash"))] == ["FVD (tf1)", "FVD (squash)"]
    assert [row["score"] for row in _table(_rows("tf1"))] == ["FVD"]


def test_one_of_two_is_compared_with_its_like(tmp_path):
    for name, resizes in (("both", ("tf1", "squash")), ("one", ("squash",)), ("other", ("crop",))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps({"scores": _rows(*resizes), "measures": []}))
    lines = report_command(tmp_path / "both", tmp_path / "one").splitlines()
    assert [line for line in lines if "(squash)" in line][0].startswith("FVD multi (squash): 11.00 and 10.00, second is better by 1")
    assert [line for line in lines if "(tf1)" in line] == [f"FVD multi (tf1): only in {tmp_path / 'both'}"]
    assert "NOT comparable, the protocols differ in preprocessing" in report_command(tmp_path / "one", tmp_path / "other")
