"""The ablations: what is compared, and how a number and its direction are computed."""

import numpy as np
import pytest

from mila_jax import ablate
from mila_jax.errors import UserError
from mila_jax.evaluate.frechet import Reference, frechet_distance


def test_tables_have_the_papers_rows_and_every_claim_is_made():
    found = ablate.tables(48)
    assert [len(rows) for rows in found.values()] == [2, 3, 6, 5, 4, 2]
    assert [lead for lead, _ in found["Table 4: modules"]] == [["", "", ""], ["✓", "", ""], ["✓", "GT", ""], ["✓", "pseudo", ""], ["✓", "pseudo", "✓"]]
    assert all(len(ablate.HEADS[title[6]]) == len(lead) for title, rows in found.items() for lead, _ in rows)
    assert [v.strategy for _, v in found["Table 2: long videos"]] == ["recurrent", "divide_and_conquer", "coarse_to_refine"]
    known = {v for rows in found.values() for _, v in rows}
    assert all({better, worse} <= known and better != worse for *_, better, worse in ablate.directions(48))


def test_scores_are_over_the_chosen_clips_and_lower_is_better():
    rng = np.random.default_rng(0)
    real = [{"features": rng.standard_normal((ablate.PICTURES, 6, 4))} for _ in range(3)]
    near = [{"features": r["features"] + 0.1, "flicker": 0.9} for r in real]
    far = [{"features": r["features"] + 1.0, "flicker": 0.8} for r in real]
    for number in ("multi", "front", "flicker"):
        assert (ablate.scores(number, near, real, [[1, 2, 0], [1, 1, 1]]) < ablate.scores(number, far, real, [[1, 2, 0], [1, 1, 1]])).all()
    expected = frechet_distance(*(np.concatenate([x[i]["features"][:, 1] for i in (2, 0, 0)]) for x in (far, real)))
    assert ablate.scores("front", far, real, [[2, 0, 1]])[0] == pytest.approx(expected)
    # Longer clips count with as many instants.
    longer = [{"features": np.repeat(x["features"], 4, 0)} for x in far]
    assert ablate.scores("front", longer, real, [[1, 1, 1]])[0] == pytest.approx(ablate.scores("front", far, real, [[1, 1, 1]])[0])


@pytest.mark.parametrize("long", [float("nan"), float("inf"), 0.5])
def test_lengths_that_make_no_sense(small_config, tmp_path, long):
    with pytest.raises(UserError, match="--long"):
        ablate.ablate_command(small_config, tmp_path / "out", long_seconds=long)
    assert not (tmp_path / "out").exists()


def test_cells_are_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"features": np.ones(3)}

    assert np.array_equal(ablate._kept(tmp_path / "a.npz", make)["features"], ablate._kept(tmp_path / "a.npz", make)["features"]) and len(made) == 1


def test_a_reference_gives_the_same_distance():
    rng = np.random.default_rng(1)
    for n in (3, 40):
        a, b = rng.standard_normal((n, 6)), rng.standard_normal((30, 6))
        assert Reference(b).distance(a) == pytest.approx(frechet_distance(a, b))
