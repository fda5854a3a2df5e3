"""Exports both encoders: `python -m itself_jax.export SRC DST`, with a comparison of every file.

SRC is anything that `itself_jax.load` takes: a work directory, `best.pth`, CLIP and so on. DST
becomes a folder with StableHLO and ONNX files and what is needed to use them without this package;
`exporting` describes it. Exit codes: 0 done; 1 failed, with one sentence and nothing left behind;
2 flag or setting rejected.
"""

import signal
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from itself_jax import command, exporting
from itself_jax import config as config_lib

_FORCE = flags.DEFINE_bool("force", False, "Replace an existing export.")
_FORMATS = flags.DEFINE_list("formats", list(exporting.FORMATS), "What to write.")
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "HxW of pictures; positions are resized. Default: as SRC says."
)
_STRIDE = flags.DEFINE_integer("stride", None, "Pixels between patches.", lower_bound=1)
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", None, "Ids of a caption, start and end included.", lower_bound=3
)
_ACTIVATION = flags.DEFINE_enum(
    "activation", None, ["quick_gelu", "gelu"], "Overrides what SRC says, or does not say."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", list(exporting.TOLERANCES), "Compute type; ONNX has float32 only."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag ends the program with 2 and one sentence."""
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) != 3:
            raise flags.Error(
                f"SRC and DST expected, got {len(rest) - 1} names: "
                "python -m itself_jax.export SRC DST"
            )
        formats = _FORMATS.value
        if not formats or set(formats) - set(exporting.FORMATS):
            raise flags.Error(
                f"--formats={','.join(formats)} must be of {','.join(exporting.FORMATS)}"
            )
        if "onnx" in formats and _PRECISION.value != "float32":
            raise flags.Error(f"--precision={_PRECISION.value} needs --formats=stablehlo")
        _options()
        return rest
    except flags.Error as error:
        command.stop(command.REJECTED, error)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        exporting.export(
            argv[1],
            argv[2],
            command.say,
            formats=list(dict.fromkeys(_FORMATS.value)),
            force=_FORCE.value,
            **_options(),
        )
    except KeyboardInterrupt:
        command.stop(command.FAILED, "stopped; nothing was written")
    except config_lib.ConfigError as error:
        command.stop(command.REJECTED, error)
    except Exception as error:
        if _DEBUG.value:
            raise
        command.stop(command.FAILED, error)


def _options() -> dict[str, Any]:
    """The flags that `itself_jax.load` takes."""
    return {
        "image_size": command.picture_size("image_size", _IMAGE_SIZE.value),
        "stride": _STRIDE.value,
        "text_length": _TEXT_LENGTH.value,
        "activation": _ACTIVATION.value,
        "precision": _PRECISION.value,
    }


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
