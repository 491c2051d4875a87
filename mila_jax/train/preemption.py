"""Leaving early and in order: SIGTERM (what a cloud sends before it takes a machine away) and Ctrl-C.

With several processes, JAX's coordinator passes the notice of any one of them on to all and finds a step that none of them has begun
yet; there all save and leave. With one process the next step is that step.
"""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # exit code: saved, start the same command again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # exit code after Ctrl-C, as of any command


class Notice:
    """Whether this process was told to leave; a context manager that listens while a block runs.

    `reached(count)`: to be asked before every step, by every process, with 1, 2, 3 …; True once, at the same count for all of them. A second
    Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self.signal: int | None = None

    def _note(self, number, frame):
        del frame
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @contextlib.contextmanager
    def listening(self):
        """Takes SIGTERM and SIGINT over for the block. With several processes SIGTERM is left to JAX's coordinator, which listens itself."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may; a notebook's worker is not told
            yield self
            return
        numbers = [signal.SIGINT] + ([signal.SIGTERM] if jax.process_count() == 1 else [])
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reached(self, count: int) -> bool:
        """Whether to save and leave before this start's step number `count`.

        Counted from each start, not from the run's: the coordinator takes whoever has not asked yet to stand at 0, so that a notice during
        start-up asks them to leave at 1; a count that begins beyond that would miss it.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        if self.signal == signal.SIGINT:  # Ctrl-C in one terminal: the others are told as by SIGTERM
            self.signal = None
            signal.raise_signal(signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(count)

    @property
    def code(self) -> int:
        """The exit code that says why."""
        return INTERRUPTED if self.signal == signal.SIGINT else PREEMPTED
