"""Signals: what is cut short at once, what is finished first, and what no handler can reach."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tiny

from itself_jax import interrupt

HEAD = """
import itself_jax.interrupt as interrupt, time, sys
i = interrupt.Interrupts()
i.install()
"""


def start(body: str) -> subprocess.Popen:
    """A process that prints "ready" when the signal may come."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(body)],
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen) -> tuple[int, str, str, float]:
    sent = time.monotonic()
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - sent


NUMBERS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def test_without_a_signal_nothing_happens():
    interrupts = interrupt.Interrupts()
    with interrupts.unsaved_work():
        interrupts.check()
    assert not interrupts.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # nothing is taken over unasked


def test_a_request_is_raised_where_it_is_checked_and_no_except_clause_swallows_it():
    interrupts = interrupt.Interrupts()
    interrupts.requested = True
    with pytest.raises(interrupt.Interrupted):
        try:
            interrupts.check()
        except Exception:
            pytest.fail("swallowed")
    with pytest.raises(interrupt.Interrupted), interrupts.unsaved_work():
        pytest.fail("work that has to be saved was begun after a signal")


@NUMBERS
def test_work_that_need_not_be_saved_is_cut_short(number):
    process = start("""
        i.imported()
        try:
            print("ready", flush=True)
            for _ in range(400):
                time.sleep(0.05)
        except interrupt.Interrupted:
            sys.exit(interrupt.EXIT_CODE)
    """)
    process.send_signal(number)
    code, _, err, seconds = finish(process)
    assert (code, err) == (75, "")
    assert seconds < 3


@NUMBERS
def test_a_signal_during_imports_ends_the_process_on_the_spot(number):
    # An exception would be swallowed here, as it is in some extension modules.
    process = start("""
        while True:
            try:
                print("ready", flush=True)
                time.sleep(20)
            except BaseException:
                pass
    """)
    process.send_signal(number)
    code, _, err, seconds = finish(process)
    assert (code, err) == (75, "")
    assert seconds < 3


@NUMBERS
def test_unsaved_work_goes_on_to_its_check_whatever_number_of_signals_comes(number):
    process = start("""
        i.imported()
        with i.unsaved_work():
            print("ready", flush=True)
            while not i.requested:
                time.sleep(0.01)
            time.sleep(1)  # a second signal arrives here
            print("step finished and saved", flush=True)
            try:
                i.check()
            except interrupt.Interrupted:
                sys.exit(interrupt.EXIT_CODE)
    """)
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    code, out, err, _ = finish(process)
    assert (code, out, err) == (75, "step finished and saved\n", "")


def test_a_call_during_which_no_handler_runs_is_abandoned_within_15_seconds():
    # As in a compiler: another thread takes the signal, the main one never returns to Python.
    process = start("""
        import ctypes, signal
        i.imported()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        library = ctypes.CDLL(None)
        print("ready", flush=True)
        library.sleep(60)
    """)
    time.sleep(1)  # until it sleeps: between two Python instructions the handler would run
    process.send_signal(signal.SIGTERM)
    code, _, err, seconds = finish(process)
    assert (code, err) == (
        75,
        "Stopped before anything had to be saved; the same command goes on.\n",
    )
    assert seconds < 15
