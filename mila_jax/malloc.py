"""How glibc's malloc serves programs that XLA runs on a CPU: they allocate and free the same large arrays in every step.

Elsewhere (another C library) every function here does nothing.
"""

import ctypes
import functools
import mmap
import threading

_PAGE = mmap.PAGESIZE
# Bytes. Free pieces below the first are found at once, by lists of their own size; those from the second on are few and worth keeping.
_SMALLEST, _LARGE, _LARGEST = 1 << 11, 1 << 20, 1 << 30


@functools.cache
def _libc():
    """The functions of glibc that are used here, or None."""
    try:
        libc = ctypes.CDLL(None)
        malloc, free, madvise, _, _ = libc.malloc, libc.free, libc.madvise, libc.mallopt, libc.gnu_get_libc_version
    except (AttributeError, OSError):
        return None
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    libc.malloc_usable_size.restype, libc.malloc_usable_size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def keep_freed_memory() -> None:
    """Memory that is freed stays for the next allocation, and all threads share one heap.

    XLA frees the arrays of a step at its end. Given back to the system, every page of them has to be cleared again in the next
    step, which is a good part of a small model's time on a CPU.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # parameters of mallopt(3)
    libc = _libc()
    if libc is not None:
        for parameter, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
            libc.mallopt(parameter, value)


_aside: list[int] = []  # addresses of the pieces that are set aside
_one_at_a_time = threading.Lock()
_DONTNEED = 4  # of madvise(2)


def set_fragments_aside() -> int:
    """Takes the small free pieces between used ones off the heap; returns how many bytes they have.

    The compiler leaves hundreds of MiB in ten thousands of pieces of all sizes. Every malloc of a step then searches them, and every
    thread waits for it. Their pages go back to the system: what is taken is addresses, not memory. Pieces set aside by an earlier call
    are given back before, so that calls do not add up.
    """
    libc = _libc()
    if libc is None:
        return 0
    with _one_at_a_time:
        while _aside:
            libc.free(_aside.pop())
        end = libc.malloc(4 * _LARGEST)  # larger than any free piece, so that it lies where the heap's last, open piece begins
        if end is None:
            return 0
        libc.free(end)
        large, small, behind = [], [], set()  # behind: where pieces begin that follow on those of `large`
        for piece, size in _pieces(libc, end):
            if size >= _LARGE or piece in behind:  # the rest of a large piece belongs to it
                large.append(piece)
                behind.add(piece + libc.malloc_usable_size(piece) + ctypes.sizeof(ctypes.c_size_t))
            else:
                small.append((piece, size))
        for piece, size in small:
            first, last = -(-piece // _PAGE) * _PAGE, (piece + size) // _PAGE * _PAGE
            if first < last:
                libc.madvise(first, last - first, _DONTNEED)
        _aside.extend(piece for piece, _ in small)
        for piece in large:
            libc.free(piece)
        return sum(size for _, size in small)


def _pieces(libc, end: int):
    """Allocates what is free before `end`: yields (address, size), sizes falling; within a free piece from its beginning on."""
    size = _LARGEST
    while size >= _SMALLEST:
        piece = libc.malloc(size)
        if piece and piece < end:
            yield piece, size
        else:  # nothing free is as large
            libc.free(piece)
            size = size * 7 // 8
