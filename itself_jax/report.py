"""Writes the report of a run anew, also of one that is still running.

    python -m itself_jax.report WORKDIR

WORKDIR/report/index.html opens from disk, with nothing else at hand. A run writes its report at its
end, and `--mode=eval` after the tables; this command is for one that is running, was stopped, or is
from before. Exit codes: 0 done; 1 failed, with one sentence; 2 the command line is wrong.
"""

from collections.abc import Sequence

from absl import app, flags, logging

from itself_jax import command

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def _check(argv: list[str]) -> None:
    if len(argv) != 2:
        raise flags.Error("give one work directory: python -m itself_jax.report WORKDIR")


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    command.run(lambda: _write(argv[1]), debug=_DEBUG.value)


def _write(path: str) -> None:
    # Imported late: a wrong command line must not wait for jax.
    from itself_jax import assessment, compile_cache

    compile_cache.keep(None)
    command.say(f"Report: {assessment.report_only(path, command.say)}")


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command.parsed(argv, _check))
