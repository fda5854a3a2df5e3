"""What all commands have in common."""

import os
import subprocess
import sys

import pytest
import tiny

from itself_jax import command

_PROGRAM = """
import os, sys
from itself_jax import command
command._KERNEL_SETTING = os.environ["PAGES"]
print(os.getpid(), flush=True)
command.with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|")
"""
_ON_REQUEST = "always [madvise] never\n"


@pytest.mark.parametrize(
    "pages, given, expected, starts",
    (
        (_ON_REQUEST, {}, "glibc.malloc.hugetlb=1", 2),
        (_ON_REQUEST, {"GLIBC_TUNABLES": ""}, "", 1),
        (_ON_REQUEST, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0", 1),
        (_ON_REQUEST, {"ITSELF_JAX_HUGE_PAGES": "1"}, "None", 1),  # something took the other away
        ("[always] madvise never\n", {}, "None", 1),  # as it is
        ("always madvise [never]\n", {}, "None", 1),
        (None, {}, "None", 1),  # no Linux, or one without them
    ),
)
def test_huge_pages_are_asked_for_by_starting_once_more_as_the_same_process(
    tmp_path, pages, given, expected, starts
):
    file = tmp_path / "enabled"
    if pages is not None:
        file.write_text(pages)
    environment = {k: v for k, v in os.environ.items() if k not in command.HUGE_PAGES}
    environment |= {"PAGES": str(file)} | given
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "--a=b c", "", "*"],
        cwd=tiny.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *pids, last = done.stdout.splitlines()
    assert done.stderr == "" and last == f"{expected}|--a=b c||*"
    assert len(pids) == starts and len(set(pids)) == 1
