"""Which instants of a recorded scene frames at 12 Hz are."""

import numpy as np
import pytest

from mila_jax.start import instants_at


@pytest.mark.parametrize("missing", [(), (7, 8, 15)])
def test_instants_are_found_by_time_where_some_are_missing(missing):
    numbers = np.array([n for n in range(40) if n not in missing])
    scene, given = {"times": numbers / 12 + 0.001}, 3
    found = instants_at(scene, np.arange(given + 1, len(numbers)), np.arange(1, 20))
    assert np.abs(numbers[found] - (given + np.arange(1, 20))).max() <= (1 if missing else 0)
    assert (numbers[found] == given + np.arange(1, 20)).sum() == 19 - len(missing)
    assert instants_at(scene, np.arange(given + 1, len(numbers)), np.array([36])) == len(numbers) - 1
    assert instants_at(scene, np.arange(given + 1, len(numbers)), np.array([90])) == len(numbers) - 1  # the last there is


def test_latents_in_chunks_are_counted():
    scene = {"times": np.arange(40) * 0.3, "chunks": object()}
    assert instants_at(scene, np.arange(5, 40), np.array([1, 4])).tolist() == [5, 8]
