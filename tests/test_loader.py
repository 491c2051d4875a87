"""The loader: the same global batches for any number of hosts, epochs that are permutations, and resume by step number."""

import grain
import numpy as np
import pytest

from data_pipeline.loader import make_loader
from mila_jax.errors import UserError


class Numbers:
    """A source of 37 items that know their own number."""

    def __len__(self):
        return 37

    def __getitem__(self, i):
        return {"number": np.int64(i), "values": np.full((2, 3), i, np.float32)}


def batches(count, **options):
    """The first `count` batches of a host as lists of numbers."""
    iterator = iter(make_loader(Numbers(), **options))
    return [next(iterator)["number"].tolist() for _ in range(count)]


def test_the_global_batch_does_not_depend_on_the_hosts():
    one = batches(8, batch_size=8, seed=3)
    for hosts in (2, 4):
        parts = [batches(8, batch_size=8, seed=3, rows=range(8 // hosts * p, 8 // hosts * (p + 1))) for p in range(hosts)]
        for step in range(8):
            assert sum((part[step] for part in parts), []) == one[step]


def test_any_rows():
    assert [[b[1], b[6]] for b in batches(5, batch_size=8, seed=3)] == batches(5, batch_size=8, seed=3, rows=[1, 6])


def test_epochs_are_different_permutations_of_everything():
    numbers = np.array(batches(37 * 2, batch_size=1, seed=0)).ravel()
    assert sorted(numbers[:37]) == sorted(numbers[37:]) == list(range(37))
    assert list(numbers[:37]) != list(numbers[37:]) and list(numbers[:37]) != list(range(37))
    assert batches(3, batch_size=4, seed=0) == batches(3, batch_size=4, seed=0) != batches(3, batch_size=4, seed=1)


def test_the_order_stays_what_it_is():
    """A run that goes on under another version of a library must see the clips that it would have seen."""
    assert batches(2, batch_size=5, seed=3) == [[21, 0, 16, 1, 2], [10, 35, 12, 14, 15]]


def test_without_shuffle_in_order():
    assert batches(2, batch_size=20, seed=0, shuffle=False) == [list(range(20)), [*range(20, 37), 0, 1, 2]]


def test_resume_by_step_number_even_on_another_number_of_hosts():
    straight = batches(9, batch_size=4, seed=5)
    iterator = iter(make_loader(Numbers(), batch_size=4, seed=5))
    grain.experimental.set_next_index(iterator, 6)
    assert [next(iterator)["number"].tolist() for _ in range(3)] == straight[6:]
    assert grain.experimental.get_next_index(iterator) == 9
    found = []
    for host in range(2):
        iterator = iter(make_loader(Numbers(), batch_size=4, seed=5, rows=[2 * host, 2 * host + 1]))
        grain.experimental.set_next_index(iterator, 6)
        found += next(iterator)["number"].tolist()
    assert found == straight[6]


def test_batches_are_stacked():
    batch = next(iter(make_loader(Numbers(), batch_size=4, seed=0)))
    assert batch["values"].shape == (4, 2, 3) and np.all(batch["values"][:, 0, 0] == batch["number"])


def test_a_batch_of_nothing():
    with pytest.raises(UserError, match="train.batch"):
        make_loader(Numbers(), batch_size=0, seed=0)


def test_a_negative_seed_is_told_before_anything_is_read():
    with pytest.raises(UserError, match="seed=-1 must not be negative"):
        make_loader(Numbers(), batch_size=4, seed=-1)
