"""SIGTERM and SIGINT: stop where nothing is lost, and soon.

What a signal does depends on what it meets. Plain Python, such as the drawing of the data set, gets
an exception. Imports and compilers, which an exception may crash, are left on the spot. Training
and evaluation see a flag where stopping is safe. And a call that does not return to Python, which
runs no signal handler, is abandoned by a watchdog thread that the C-level handler wakes.

Where several processes train as one, stopping alone would leave the others waiting: see `follow`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODE = 75  # the same command goes on
_PATIENCE = 10.0  # seconds from a signal until work that need not be saved is abandoned


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. No `except Exception` swallows it."""


class Interrupts:
    """Whether a signal came, and what it may cut short. Does nothing until `install`."""

    def __init__(self) -> None:
        self.requested = False
        self._exits = False
        self._checks = False
        self._unsaved = False
        self._stop_asked: Callable[[], bool] | None = None

    def install(self) -> None:
        """Takes over both signals of this process; call it once, in the main thread."""
        self._exits = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def follow(self, stop_asked: Callable[[], bool]) -> None:
        """From now on all processes stop together.

        stop_asked: asked at every `check`, equally often in every process; True at the same call in
          all of them when one got SIGTERM. jax has taken that signal over; SIGINT becomes one.
        """
        self._stop_asked = stop_asked

    def imported(self) -> None:
        """All modules are there; until now a signal ends the process on the spot.

        An exception raised by a handler inside an extension module's initialisation is swallowed,
        becomes an ImportError, or aborts the process. Nothing has been written yet.
        """
        self._exits = False

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Inside, a signal ends the process on the spot: nothing may be half-written here."""
        self._exits = True
        try:
            yield
        finally:
            self._exits = False

    @contextlib.contextmanager
    def checked_work(self) -> Iterator[None]:
        """Inside, a signal sets `requested`, for `check`; 10 s without one end the process."""
        self._checks = True
        try:
            yield
        finally:
            self._checks = False

    @contextlib.contextmanager
    def unsaved_work(self) -> Iterator[None]:
        """As `checked_work`, but it is waited for, however long it takes to the next `check`."""
        self.check()
        with self.checked_work():
            self._unsaved = True
            try:
                yield
            finally:
                self._unsaved = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come; in every process at the same call."""
        if self._stop_asked is not None:
            self.requested = self._stop_asked()
        if self.requested:
            raise Interrupted

    def check_here(self) -> None:
        """As `check`, where the other processes may not be: after an error of this one."""
        if self._stop_asked is None:
            self.check()

    def _handle(self, number: int, frame: object) -> None:
        if self._stop_asked is not None:
            signal.raise_signal(signal.SIGTERM)
            return
        if self._exits:
            os._exit(EXIT_CODE)
        first, self.requested = not self.requested, True
        if first and not self._checks:
            raise Interrupted

    def _watch(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)
            if number and number[0] in (signal.SIGTERM, signal.SIGINT):
                break
        # `requested` is left to `_handle`, which has to see that this is the first signal.
        time.sleep(_PATIENCE)
        if self._stop_asked is not None:
            return  # the others decide when, and every call that may hang ends with them
        while self._unsaved:
            time.sleep(0.1)
        # The main thread sits in a call that does not return, such as a compilation.
        sys.stderr.write("Stopped before anything had to be saved; the same command goes on.\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)
