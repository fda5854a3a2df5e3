"""SIGTERM and SIGINT: stop where nothing is lost, and soon.

Three things can be interrupted: work that has to be saved first (training steps), work that can be
dropped at once (start-up, data generation, an evaluation after its state is saved), and a call into
a compiler, during which Python runs no signal handler at all. Hence a flag, an exception and, for
the last case, a watchdog thread that the C-level signal handler wakes.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 75  # the same command goes on
_PATIENCE = 10.0  # seconds from a signal until work that need not be saved is abandoned


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. No `except Exception` swallows it."""


class Interrupts:
    """Whether a signal came, and what it may cut short. Does nothing until `install`."""

    def __init__(self) -> None:
        self.requested = False
        self._importing = False
        self._unsaved = False

    def install(self) -> None:
        """Takes over both signals of this process; call it once, in the main thread."""
        self._importing = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def imported(self) -> None:
        """All modules are there; until now a signal ends the process on the spot.

        An exception raised by a handler inside an extension module's initialisation is swallowed,
        becomes an ImportError, or aborts the process. Nothing has been written yet.
        """
        self._importing = False

    @contextlib.contextmanager
    def unsaved_work(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; call `check` where stopping is safe."""
        self.check()
        self._unsaved = True
        try:
            yield
        finally:
            self._unsaved = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: object) -> None:
        if self._importing:
            os._exit(EXIT_CODE)
        first, self.requested = not self.requested, True
        if first and not self._unsaved:
            raise Interrupted

    def _watch(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)
            if number and number[0] in (signal.SIGTERM, signal.SIGINT):
                break
        # `requested` is left to `_handle`, which has to see that this is the first signal.
        time.sleep(_PATIENCE)
        while self._unsaved:
            time.sleep(0.1)
        # The main thread sits in a call that does not return, such as a compilation.
        sys.stderr.write("Stopped before anything had to be saved; the same command goes on.\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)
