"""How glibc's malloc serves programs that XLA runs on a CPU: they allocate and free the same large arrays in every step.

Elsewhere (another C library) every function here does nothing.
"""

import ctypes
import functools
import threading

_SMALLEST, _LARGEST = 1 << 11, 1 << 30  # bytes of a piece that is set aside; smaller ones are found at once, by lists of their own size


@functools.cache
def _libc():
    """The functions of glibc that are used here, or None."""
    try:
        libc = ctypes.CDLL(None)
        malloc, free, sbrk, _, _ = libc.malloc, libc.free, libc.sbrk, libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        return None
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
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


def set_fragments_aside() -> int:
    """Takes the free pieces between used ones off the heap, so that what follows is served from its end; returns how many bytes.

    The compiler leaves hundreds of MiB in ten thousands of pieces of all sizes. Every malloc of a step then searches them, and every
    thread waits for it. Pages of a piece go back to the system first: what is taken is addresses, not memory. Pieces set aside by an
    earlier call are given back before, so that calls do not add up.
    """
    libc = _libc()
    if libc is None:
        return 0
    with _one_at_a_time:
        while _aside:
            libc.free(_aside.pop())
        libc.malloc_trim(0)
        end, taken, size = libc.sbrk(0), 0, _LARGEST
        while size >= _SMALLEST:
            piece = libc.malloc(size)
            if piece and piece + size <= end:
                _aside.append(piece)
                taken += size
            else:  # cut from the end of the heap: no free piece is as large
                libc.free(piece)
                size = size * 7 // 8
    return taken
