"""Checks a data set and packs it: `python -m itself_jax.prepare --dataset=NAME --root=DIR`.

Prints what the dataset doctor finds and writes it to `doctor.json` in `--out` (without it, in
`--root`; where that cannot be written and nothing is packed, in the current directory). A data set
without errors is then packed below `--out`. Exit codes: 0 done, warnings or not; 1 errors found or
failed, with one sentence; 2 flag rejected; 75 stopped by Ctrl-C or SIGTERM (the same command goes
on).
"""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from etils import epath

from itself_jax import command
from itself_jax.data import datasets, doctor, packed, records, remote

_DATASET = flags.DEFINE_string("dataset", None, f"One of {', '.join(datasets.DATASETS)}.")
_ROOT = flags.DEFINE_string("root", None, "What the config calls data_root.")
_OUT = flags.DEFINE_string("out", None, "Where to write the packed form; default: --root.")
_CHECK_ONLY = flags.DEFINE_bool("check_only", False, "Examine, and do not pack.")
_RESIZE = flags.DEFINE_string(
    "resize", None, "HxW, e.g. 384x128: pack pixels of this size instead of the original files."
)
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", 77, "The model.text_length that captions are checked against.", lower_bound=3
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

_EXAMPLES = {"dataset": "cuhk_pedes", "root": "/data"}
_REPORT = "doctor.json"


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag ends the program with 2 and one sentence."""

    def check(rest: list[str]) -> None:
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}; values with spaces need quotes")
        for name, example in _EXAMPLES.items():
            if not flags.FLAGS[name].value:
                raise flags.Error(f"--{name} is required, e.g. --{name}={example}")
        if _DATASET.value not in datasets.DATASETS:
            raise flags.Error(
                f"--dataset={_DATASET.value} is not known; use one of "
                f"{', '.join(datasets.DATASETS)}"
            )
        command.picture_size("resize", _RESIZE.value)

    # `--check-only` is as good as `--check_only`.
    spelt = [re.sub(r"^--?[\w-]+", _with_underscores, argument) for argument in argv[1:]]
    return command.parsed([argv[0], *spelt], check)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    del argv
    logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # annotations may hold letters the terminal lacks
        stream.reconfigure(errors="backslashreplace")
    try:
        prepare(
            _DATASET.value,
            _ROOT.value,
            out=_OUT.value,
            check_only=_CHECK_ONLY.value,
            resize=command.picture_size("resize", _RESIZE.value),
            text_length=_TEXT_LENGTH.value,
        )
    except KeyboardInterrupt:
        command.stop(command.INTERRUPTED, "stopped; the same command goes on")
    except Exception as error:
        if _DEBUG.value:
            raise
        command.stop(command.FAILED, error)


def prepare(
    dataset: str,
    root: epath.PathLike,
    *,
    out: epath.PathLike | None = None,
    check_only: bool = False,
    resize: tuple[int, int] | None = None,
    text_length: int = 77,
) -> None:
    """Examines a data set, prints and writes the report, then packs.

    Where `root` has no files but a packed form with the original bytes, that is verified and
    examined.

    Raises:
      records.DataError: the data cannot be read, or an error was found; nothing is packed then.
      OSError: the report cannot be written.
    """
    root = remote.path(root)
    if out is not None:
        out = remote.path(out)
    corpus = _read(dataset, root)
    report = doctor.examine(corpus, text_length=text_length, log=command.say)
    command.say(report.table())
    path = _write(report, root, out, check_only)
    command.say(f"Written to {path}.")
    if report.verdict == doctor.ERROR:
        failed = [check.name for check in report.checks if check.verdict == doctor.ERROR]
        raise records.DataError(
            f"{corpus.source} fails {len(failed)} of {len(report.checks)} checks "
            f"({', '.join(failed)}), so it is not packed; see the table, mend it and run again."
        )
    if not check_only:
        target = out or path.parent
        # TFDS takes half a second to import, which an examination need not wait for.
        from itself_jax.data import packing

        packing.pack(corpus, target, resize=resize, log=command.say)
        command.say(f"Train from it with --config.data_root={target}")


def _read(dataset: str, root: epath.Path) -> records.Corpus:
    try:
        return datasets.files(dataset, root)
    except records.MissingError:
        folder = None if root.is_file() else packed.find(root, dataset, None)
        if folder is None:
            raise
    command.say(f"Verifying the checksums of {folder} ...")
    packed.verify(folder)
    return packed.read(folder, dataset)


def _write(
    report: doctor.Report, root: epath.Path, out: epath.Path | None, check_only: bool
) -> epath.Path:
    text = json.dumps(report.to_json(), indent=2) + "\n"
    if out is not None:
        return _write_atomically(out, text)
    try:
        return _write_atomically(root.parent if root.is_file() else root, text)
    except OSError as error:
        if not check_only:
            raise OSError(
                error.errno,
                f"cannot write to --root={root} ({error.strerror or error}); name a writable "
                "folder with --out",
            ) from error
        return _write_atomically(epath.Path(os.getcwd()), text)


def _write_atomically(folder: epath.Path, text: str) -> epath.Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not remote.is_local(folder):  # an object appears when it is complete
        (folder / _REPORT).write_text(text)
        return folder / _REPORT
    temporary = folder / f".{_REPORT}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text)
        return temporary.replace(folder / _REPORT)
    finally:
        temporary.unlink(missing_ok=True)


def _with_underscores(flag: re.Match[str]) -> str:
    dashes = len(flag[0]) - len(flag[0].lstrip("-"))
    return flag[0][:dashes] + flag[0][dashes:].replace("-", "_")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
