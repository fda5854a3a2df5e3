import contextlib
import os
import signal

import launching
import pytest


@pytest.fixture
def machine(tmp_path):
    machine = launching.Machine(tmp_path)
    yield machine
    for pid in machine.home.glob(".itself_jax/*/pid"):  # a failed test must not leave a job behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
