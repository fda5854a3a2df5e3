"""Trains or evaluates: `python -m itself_jax.main --config=configs/NAME.py --workdir=DIR`.

Flags become a config, then `train.run` or `assessment.evaluate_only`. Exit codes: 0 done, 1 failed
with one sentence, 2 flag or config rejected, 75 stopped by a signal after saving, or by the loss of
another process.
"""

import traceback
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from itself_jax import command, interrupt
from itself_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/synthetic.py or configs/cuhk.py:baseline."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing one goes on.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train and test, or evaluate only.")
_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder for compiled programs [~/.cache/itself_jax/compiled, or JAX_COMPILATION_CACHE_DIR]; "
    "empty: keep none.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

_INTERRUPTS = interrupt.Interrupts()
_EXAMPLES = {"config": "configs/synthetic.py", "workdir": "/tmp/synthetic"}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag or key ends the program with 2 and one sentence."""

    def check(rest: list[str]) -> None:
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}; values with spaces need quotes")
        for name in ("config", "workdir"):
            if not flags.FLAGS[name].present:
                raise flags.Error(f"--{name} is required, e.g. --{name}={_EXAMPLES[name]}")

    return command.parsed(argv, check)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    del argv
    logging.set_verbosity(logging.WARNING)  # jax reports each accelerator that is not there
    try:
        config = command.configuration(_CONFIG)
        # Imported late: a signal or a bad flag must not wait for jax.
        from itself_jax import assessment, compile_cache, hosts, train

        _INTERRUPTS.imported()
    except config_lib.ConfigError as error:
        command.stop(command.REJECTED, error)
    except Exception as error:
        if _DEBUG.value:
            raise
        command.stop(command.FAILED, error)
    ours = hosts.Hosts()
    try:
        compile_cache.keep(_CACHE.value)
        ours.start(config.distributed)
        if ours.count > 1:
            _INTERRUPTS.follow(ours.stop_asked)
        run = train.run if _MODE.value == "train" else assessment.evaluate_only
        run(config, _WORKDIR.value, _INTERRUPTS, ours)
        ours.finish()
    except interrupt.Interrupted:
        ours.finish()
        raise
    except config_lib.ConfigError as error:
        ours.fail(command.REJECTED, error)
    except Exception as error:
        ours.explain(error)
        if _DEBUG.value:
            traceback.print_exc()
        ours.fail(command.FAILED, error)


if __name__ == "__main__":
    command.with_huge_pages()
    try:
        _INTERRUPTS.install()
        app.run(main, flags_parser=parse_flags)
    except interrupt.Interrupted:
        command.stop(interrupt.EXIT_CODE, None)
