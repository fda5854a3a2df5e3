"""What all commands have in common: exit codes, plain lines, and the one sentence of an error."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags, logging

from itself_jax import config as config_lib

FAILED, REJECTED, INTERRUPTED = 1, 2, 75  # 0: done
# The second name says that the first one is ours.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "ITSELF_JAX_HUGE_PAGES": "1"}
_UNTOUCHED = 60  # seconds
_KERNEL_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


def with_huge_pages() -> None:
    """Starts this very process again so that large arrays lie in huge pages, on Linux.

    On a CPU, XLA asks for the memory of a program anew at each call, and the kernel hands it out
    and clears it page by page: a fifth of the processor time of a large train step. Only the
    environment in which a process starts can tell the C library (glibc from 2.35) to ask for huge
    pages. Whoever has set GLIBC_TUNABLES keeps it. Call it before anything is imported that takes
    time.
    """
    if HUGE_PAGES.keys() & os.environ.keys() or not sys.executable:  # once, whatever becomes of it
        return
    with contextlib.suppress(OSError):
        if "[madvise]" in pathlib.Path(_KERNEL_SETTING).read_text(encoding="ascii"):
            again = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, again, {**os.environ, **HUGE_PAGES})


def users_environment() -> dict[str, str]:
    """The environment without what `with_huge_pages` added: for programs that are not ours."""
    environment = dict(os.environ)
    if HUGE_PAGES.items() <= environment.items():
        for name in HUGE_PAGES:
            del environment[name]
    return environment


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


def stop(code: int, reason: object) -> NoReturn:
    """Prints the one sentence and exits; None prints nothing."""
    if reason is not None:
        text = " ".join(str(reason).split()) or type(reason).__name__
        expected = isinstance(reason, (ValueError, RuntimeError, OSError, flags.Error, str))
        kind = "" if expected else f"{type(reason).__name__}: "
        print(f"itself_jax: {kind}{text}", file=sys.stderr)
    sys.exit(code)


def parsed(argv: Sequence[str], check: Callable[[list[str]], object]) -> list[str]:
    """Parses the command line; a rejected flag or key ends the program with 2 and one sentence.

    check: takes the program's name and what follows the flags; may raise `flags.Error`.
    """
    try:
        if "config" in flags.FLAGS:
            _check_overrides(argv)
        rest = _parsed(argv)
        check(rest)
        return rest
    except (flags.Error, config_lib.ConfigError) as error:
        stop(REJECTED, error)


def _parsed(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except Exception as error:  # a config file is a program: it may fail in any way
        cause = _of_config_file(error)
        if cause is None:
            raise
        expected = isinstance(cause, (ValueError, RuntimeError, OSError))
        kind = "" if expected and str(cause) else f"{type(cause).__name__}: "
        raise flags.Error(f"--config{_config_file(argv)}: {kind}{cause}") from error


def _config_file(argv: Sequence[str]) -> str:
    """ "=FILE" as the command line names it; "" where it does not."""
    for place, value in reversed(list(enumerate(argv))):
        if found := re.fullmatch(r"--?config(=.*)?", value):
            return found[1] or "".join(f"={following}" for following in argv[place + 1 : place + 2])
    return ""


def _of_config_file(error: BaseException) -> BaseException | None:
    """What a config file raised, as it was; None for an error of the command line itself."""
    if not isinstance(error, flags.Error):
        return error
    # ml_collections raises a ValueError or TypeError anew, with its whole traceback as the text; of
    # a class that takes more than a text, such as JSONDecodeError, that fails once more.
    context = error.__context__
    if context is None or context.__context__ is None:
        return None
    return context.__context__ if _is_from_config_parser(context) else None


def _is_from_config_parser(error: BaseException) -> bool:
    if str(error).startswith("Error whilst parsing config file"):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "config_flags" in traceback.tb_frame.f_code.co_filename


def run(work: Callable[[], object], *, debug: bool) -> None:
    """Runs what writes all or nothing; every way out but success is an exit code and a sentence."""
    logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        stop(FAILED, "stopped; nothing was written")
    except config_lib.ConfigError as error:
        stop(REJECTED, error)
    except Exception as error:
        if debug:
            raise
        stop(FAILED, error)


def picture_size(flag: str, value: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH of a flag; None where it is not given.

    Raises:
      flags.Error: it has another form.
    """
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", value)
    if found is None:
        raise flags.Error(f"--{flag}={value} must be HEIGHTxWIDTH in pixels, e.g. 384x128")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def folders_above(path: pathlib.Path) -> Iterator[None]:
    """Makes the folders above `path`; those that were not there go again if the work fails."""
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # which says nothing of what is wrong
            reason = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, reason, error.filename) from error
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


def move(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a new folder (or file) in place of an old one, which is back if that fails.

    For a moment between there is none: a process that is killed then leaves the old one whole, as
    `.NAME.PID.old`, for `settle`.
    """
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    _remove(old)


def settle(path: pathlib.Path) -> None:
    """Ends what killed processes began: puts back what `move` had put aside, where there is none.

    What else they left goes: it is under the names of `move`, of `.NAME.PID.tmp`, or of
    `.tmp-NAME-PID`. Not another number's that was written to within a minute: on a shared disk, a
    process of another machine may be at it.
    """
    name = re.escape(path.name)
    pattern = re.compile(rf"\.tmp-{name}-(\d{{1,9}})|\.{name}\.(\d{{1,9}})\.(tmp|old)")
    for left in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        found = pattern.fullmatch(left.name)
        if found is None or _is_another_alive(pid := int(found[1] or found[2])):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just settled it
            if found[3] == "old":
                if not path.exists():
                    os.replace(left, path)
                else:
                    _remove(left)
            elif pid == os.getpid() or time.time() - left.stat().st_mtime > _UNTOUCHED:
                _remove(left)


def _is_another_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return pid != os.getpid()  # a killed process had our number: a container starts anew with it


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def configuration(flag: flags.FlagHolder) -> config_lib.Config:
    """What `--config` and its overrides say, checked.

    Raises:
      ConfigError: it says something wrong, or the file cannot be read.
    """
    try:
        return config_lib.from_dict(flag.value)
    except OSError as error:
        raise config_lib.ConfigError(str(error).replace("\n", " ")) from error


def _check_overrides(argv: Sequence[str]) -> None:
    """Whether every `--config.KEY=…` names a setting; before the flags themselves are parsed.

    Raises:
      ConfigError: no such key, or a group of keys.
    """
    known = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
    for argument in argv[1:]:
        override = re.match(r"--?config\.([^=]+)", argument)
        key = override[1] if override else ""
        if key and (group := [name for name in known if name.startswith(f"{key}.")]):
            raise config_lib.ConfigError(
                f"config.{key} is a group of keys; set one of them, e.g. --config.{group[0]}=…"
            )
        if key and key not in known:
            raise config_lib.ConfigError(config_lib.unknown_key(key))
