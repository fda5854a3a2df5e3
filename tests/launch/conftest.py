import launching
import pytest


@pytest.fixture
def machine(tmp_path):
    return launching.Machine(tmp_path)
