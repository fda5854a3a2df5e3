"""Exports both encoders: `python -m itself_jax.export SRC DST`, with a comparison of every file.

SRC is anything that `itself_jax.load` takes: a work directory, `best.pth`, CLIP and so on. DST
becomes a folder with StableHLO and ONNX files and what is needed to use them without this package;
`exporting` describes it. Exit codes: 0 done; 1 failed, with one sentence and nothing left behind;
2 flag or setting rejected.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags

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
_VISION_HEADS = flags.DEFINE_integer(
    "vision_heads", None, "Of SRC, where it does not say them.", lower_bound=1
)
_TEXT_HEADS = flags.DEFINE_integer("text_heads", None, "As --vision_heads.", lower_bound=1)
_ACTIVATION = flags.DEFINE_enum(
    "activation", None, config_lib.ACTIVATIONS, "Overrides what SRC says, or does not say."
)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", list(exporting.TOLERANCES), "Compute type; ONNX has float32 only."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag ends the program with 2 and one sentence."""

    def check(rest: list[str]) -> None:
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

    return command.parsed(argv, check)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""

    def work() -> None:
        exporting.export(
            argv[1],
            argv[2],
            command.say,
            formats=list(dict.fromkeys(_FORMATS.value)),
            force=_FORCE.value,
            **_options(),
        )

    command.run(work, debug=_DEBUG.value)


def _options() -> dict[str, Any]:
    """The flags that `itself_jax.load` takes."""
    return {
        "image_size": command.picture_size("image_size", _IMAGE_SIZE.value),
        "stride": _STRIDE.value,
        "text_length": _TEXT_LENGTH.value,
        "vision_heads": _VISION_HEADS.value,
        "text_heads": _TEXT_HEADS.value,
        "activation": _ACTIVATION.value,
        "precision": _PRECISION.value,
    }


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
