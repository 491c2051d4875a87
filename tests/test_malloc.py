"""glibc's malloc as XLA on a CPU needs it. Each test is a process of its own, since settings of malloc cannot be undone."""

import pathlib
import subprocess
import sys


def run(code: str) -> list[int]:
    """The numbers that `code` prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_is_kept():
    """Large arrays are no longer mapped and unmapped one by one."""
    [faults] = run("""
import resource
from mila_jax.malloc import keep_freed_memory
keep_freed_memory()
b'x' * (1 << 27); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): b'x' * (1 << 27)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""")
    assert faults < (1 << 27) / 4096  # one array's pages; each of the five would need them all


def test_fragments_are_set_aside_and_what_lies_between_them_stays():
    """Every second of many pieces is freed: new arrays that would fit into a gap come from the heap's end, and the rest is untouched."""
    freed, taken, again, inside, inside_before, intact = run("""
from mila_jax.malloc import keep_freed_memory, set_fragments_aside
keep_freed_memory()
sizes = [5_000 + 4_000 * (i % 61) for i in range(2_000)]
pieces = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
lowest, highest = min(map(id, pieces)), max(map(id, pieces))
def fill():
    new = [bytes(20_000) for _ in range(500)]
    return sum(lowest < id(x) < highest for x in new)
kept = {i: pieces[i] for i in range(0, 2_000, 2)}
del pieces
before = fill()
taken = set_fragments_aside()
inside = fill()
again = set_fragments_aside()
intact = all(x == bytes([i % 251]) * sizes[i] for i, x in kept.items())
print(sum(sizes[1::2]), taken, again, inside, before, int(intact))
""")
    assert taken > 0.9 * freed and 0.9 < again / taken < 1.1
    assert inside == 0 < inside_before
    assert intact


def test_large_free_pieces_stay_in_use():
    """An array's place, with what lies behind it kept, serves the next one of its size: none of its pages is cleared again."""
    [faults] = run("""
import resource
from mila_jax.malloc import keep_freed_memory, set_fragments_aside
keep_freed_memory()
array, behind = b'x' * (1 << 27), bytes(100_000)
del array
set_fragments_aside()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
array = b'x' * (1 << 27)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""")
    assert faults < 1_000
