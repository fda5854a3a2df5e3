"""What all commands have in common."""

import os
import subprocess
import sys

import pytest
import tiny

_PROGRAM = """
import os, pathlib, sys
from itself_jax import command

class Path(type(pathlib.Path())):
    def read_text(self, *args, **kwargs):
        return os.environ["PAGES"]

command.pathlib.Path = Path
print(os.getpid(), flush=True)
command.with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sep="|")
"""


@pytest.mark.parametrize(
    "pages, given, expected, starts",
    (
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1", 2),
        ("always [madvise] never", "", "", 1),
        ("always [madvise] never", "glibc.malloc.tcache_count=1", "glibc.malloc.tcache_count=1", 1),
        ("[always] madvise never", None, "None", 1),  # as it is
        ("always madvise [never]", None, "None", 1),
    ),
)
def test_huge_pages_are_asked_for_by_starting_once_more_as_the_same_process(
    pages, given, expected, starts
):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"PAGES": pages} | ({} if given is None else {"GLIBC_TUNABLES": given})
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


def test_without_linux_s_file_nothing_happens(tmp_path):
    program = _PROGRAM.replace('return os.environ["PAGES"]', "raise FileNotFoundError(str(self))")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tiny.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[1:] == ["None"]
