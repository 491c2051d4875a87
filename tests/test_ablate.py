"""The ablations: what is compared, and how a number and its direction are computed."""

import dataclasses
import json
import types

import numpy as np
import pytest

from data_pipeline.records import read_index
from mila_jax import ablate
from mila_jax.errors import UserError
from mila_jax.evaluate.frechet import Reference, frechet_distance
from mila_jax.flow.rollout import collect
from mila_jax.model.stdit3_weights import create
from mila_jax.model.weights import model_config, save_model
from mila_jax.prepare import describe_data


def test_tables_have_the_papers_rows_and_every_claim_is_made():
    found = ablate.tables(48)
    assert [len(rows) for rows in found.values()] == [2, 3, 6, 5, 4, 2]
    assert [lead for lead, _ in found["Table 4: modules"]] == [
        ["", "", ""],
        ["✓", "", ""],
        ["✓", "GT", ""],
        ["✓", "pseudo", ""],
        ["✓", "pseudo", "✓"],
    ]
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


def test_variants_are_what_they_say_whatever_generate_asks_for(small_config):
    """A bench of a model trained on 2 + 6 frames."""
    bench = object.__new__(ablate.Bench)
    bench.model = types.SimpleNamespace(config=small_config, data={})
    bench.config = small_config.copy_and_resolve_references()
    bench.config.generate.update(conditioning=1, window=4, jdc=False)
    for given, conditioning, frames in ((0, 1, 4), (1, 1, 7), (2, 2, 8), (4, 4, 10)):
        config = bench.settings(dataclasses.replace(ablate.CORRECTED, given=given), 0.5, 0.15, 0.4)
        assert (config.window.conditioning, config.window.frames) == (conditioning, frames)
        assert config.generate.jdc and config.generate.strategy == "coarse_to_refine"


def test_clips_that_overlap():
    clips = [("a", 0.0), ("b", 1.0), ("a", 4.0)]
    assert not ablate.overlapping(clips, 4.0) and ablate.overlapping(clips, 4.5)


def test_an_anchor_farther_off_than_the_shortest_videos_reach(small_config, tmp_path, monkeypatch):
    config = small_config.copy_and_resolve_references()
    config.generate.anchor_stride = 24
    monkeypatch.setattr(ablate, "Bench", lambda *_: types.SimpleNamespace(model=types.SimpleNamespace(config=small_config, data={})))
    monkeypatch.setattr(ablate, "find_clips", lambda *_: ([], []))
    with pytest.raises(UserError, match="generate.anchor_stride=24; set at most 12"):
        ablate.ablate_command(config, tmp_path / "out", extractor=len)


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


def test_ablations_end_in_tables_and_go_on_where_they_stopped(small_config, tmp_path, monkeypatch):
    """Everything but the network: its videos are random, the same for the same clip and settings."""
    config = small_config.copy_and_resolve_references()
    config.model.precondition, config.model.sweep = "none", 0
    data = describe_data(config.data.dir)
    config.generate.weights = str(tmp_path / "model.safetensors")
    save_model(config.generate.weights, create(model_config(config, data))[1], config, data, None, {"steps": 0})
    index = read_index(config.data.dir)
    index.scenes[1].split = "val"  # one to tune on, one to report on
    monkeypatch.setattr(ablate, "read_index", lambda folder: index)
    made = []

    def video(self, start, frames, seed=0, *, anchors=None):
        job = self.job(start, frames, seed, anchors=anchors)
        made.append((start[0].scene, seed, job.plan.strategy, anchors is not None, start[0].waypoints_known, job.plan.conditioning))
        if stop and len(made) == stop:
            raise KeyboardInterrupt
        shape = (job.windows, 1, 6, job.plan.window, *data["latent_shape"])
        return collect(job.plan, np.random.default_rng(len(made)).normal(size=shape).astype(np.float32), anchors), job.plan

    def features(images):
        return np.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images[:, ::2].mean((1, 2, 3))], -1)

    monkeypatch.setattr(ablate.Generator, "__call__", video)
    arguments = dict(clips=2, long_seconds=2.0, resamples=4, extractor=features, progress=False)
    stop = 10
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate_command(config, tmp_path / "out", **arguments)
    stop = 0
    text = ablate.ablate_command(config, tmp_path / "out", **arguments).read_text()
    cells = len(list((tmp_path / "out" / "cells").glob("*.npz")))
    assert made[9] == made[10]  # the one that was cut short is made again, those before it are not
    count = len(made)
    ablate.ablate_command(config, tmp_path / "out", **arguments)
    assert len(made) == count and len(list((tmp_path / "out" / "cells").glob("*.npz"))) == cells
    assert {scene for scene, *_ in made} == {index.scenes[0].name, index.scenes[1].name}
    assert len({(scene, seed) for scene, seed, *_ in made}) == 4  # two clips of each, whose noise is the same for all variants
    assert {"recurrent", "divide_and_conquer", "coarse_to_refine"} == {entry[2] for entry in made} and {1, 2, 4} >= {entry[5] for entry in made}
    assert any(entry[3] for entry in made) and any(not entry[4] for entry in made)
    assert text.count("## Table") == 6 and "## Which of the paper's directions hold here" in text
    record = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert {scene for scene, _ in record["clips"]} == {index.scenes[1].name}
    rows = {tuple(row["row"]): row["multi"] for row in record["tables"]["Table 4: modules"]}
    [true] = [d for d in record["directions"] if d["claim"].startswith("true anchors help")]
    assert true["gain"] == pytest.approx(rows["✓", "", ""][0] - rows["✓", "GT", ""][0])  # lower is better, so a gain is above 0
    for found in record["directions"]:
        assert found["verdict"] == ("holds" if found["low"] > 0 else "the other way round" if found["high"] < 0 else "undecided")
