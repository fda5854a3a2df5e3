"""Runs a launcher where only named programs exist, and records what it calls.

The PATH is one folder: links to the few system programs that launchers use, and stubs. A stub
writes its arguments to a numbered folder and then does what the test says, in bash: `$*` are its
arguments, `$tool` its name, `$call` its number. No test reaches a real gcloud, kubectl, docker or
Slurm.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
_SYSTEM = (
    "bash cat cp dirname env git grep gzip kill ls mkdir mktemp mv nohup rm setsid sleep tail tar"
    " tee tr"
).split()

_STUB = r"""#!/usr/bin/env bash
call=1
until mkdir "{calls}/$call" 2>/dev/null; do call=$((call + 1)); done
tool=${{0##*/}}
printf '%s\0' "$tool" "$@" > "{calls}/$call/new"
mv "{calls}/$call/new" "{calls}/$call/arguments" # a test may look at any time
{behaviour}
"""


class Machine:
    """A PATH of its own, stubs, and the calls they got."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.checkout = ROOT  # whose launchers run
        self.bin = folder / "bin"
        self.calls_folder = folder / "calls"
        self.home = folder / "home"
        for path in (self.bin, self.calls_folder, self.home):
            path.mkdir()
        for name in _SYSTEM:
            (self.bin / name).symlink_to(shutil.which(name))

    def stub(self, *tools: str, does: str = "") -> None:
        """Puts stubs on the PATH: they record their arguments, then run `does`, a piece of bash."""
        for tool in tools:
            path = self.bin / tool
            path.unlink(missing_ok=True)
            path.write_text(_STUB.format(calls=self.calls_folder, behaviour=does))
            path.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "TMPDIR": str(self.folder),
            "LC_ALL": "C.UTF-8",
            **variables,
        }

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.bin / "bash", str(self.checkout / "launch" / script), *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **variables)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever holds the pipes
            raise AssertionError(f"hangs; so far: {process.communicate()}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        """The arguments of every call, the program's name first, in the order of their coming."""
        folders = sorted(self.calls_folder.iterdir(), key=lambda path: int(path.name))
        files = [folder / "arguments" for folder in folders]
        return [f.read_text().removesuffix("\0").split("\0") for f in files if f.exists()]

    def calls_of(self, *words: str) -> list[list[str]]:
        """The calls that begin with `words`, without them."""
        return [c[len(words) :] for c in self.calls() if c[: len(words)] == list(words)]


def printed_commands(output: str) -> list[list[str]]:
    """The words of each printed command, as bash reads them again."""
    read = 'for l in "${lines[@]}"; do eval "w=($l)"; printf "%s\\0" "${w[@]}"; echo; done'
    result = subprocess.run(
        ["bash", "-c", f"mapfile -t lines; {read}"],
        input=output,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    return [
        line.removesuffix("\0").split("\0")
        for line in result.stdout.removesuffix("\n").split("\0\n")
    ]


def only_error(result: subprocess.CompletedProcess) -> str:
    """The one sentence on stderr."""
    (line,) = result.stderr.splitlines()
    return line


PYTHON = sys.executable
