"""Converts weights: `python -m itself_jax.convert SRC DST`, with a report of every array.

SRC is anything that `config.init_from` takes. The ending of DST says what is written: `.pth` or
`.pt` (PyTorch), `.safetensors`, `.npz`; a name without an ending becomes a folder with an Orbax
checkpoint. `--check` reads everything and reports without writing. Exit codes: 0 done; 1 failed,
with one sentence and nothing left behind; 2 flag or DST rejected.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags

from itself_jax import command, converting, dialects
from itself_jax import config as config_lib

_CHECK = flags.DEFINE_bool("check", False, "Print the report; write nothing.")
_FORCE = flags.DEFINE_bool("force", False, "Replace an existing DST.")
_LAYOUT = flags.DEFINE_enum(
    "layout",
    None,
    list(dialects.WRITABLE),
    "Names in a file: of the published ITSELF code [default], or OpenAI's (CLIP's part alone).",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "published"],
    "Number type in a file: float32, or float16 where the published code has it [.pth, .pt].",
)
_ACTIVATION = flags.DEFINE_enum(
    "activation", None, config_lib.ACTIVATIONS, "Overrides what SRC says, or does not say."
)
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "HxW that SRC was trained with, where its positions leave that open."
)
_STRIDE = flags.DEFINE_integer("stride", None, "As --image_size.", lower_bound=1)
_VISION_HEADS = flags.DEFINE_integer(
    "vision_heads", None, "Of SRC, where the width is no multiple of 64.", lower_bound=1
)
_TEXT_HEADS = flags.DEFINE_integer("text_heads", None, "As --vision_heads.", lower_bound=1)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag ends the program with 2 and one sentence."""

    def check(rest: list[str]) -> None:
        wanted = (2, 3) if _CHECK.value else (3,)
        if len(rest) not in wanted:
            raise flags.Error(
                f"SRC{' (and DST, unless --check is given)' if len(rest) < 3 else ' and DST'} "
                f"expected, got {len(rest) - 1} names: python -m itself_jax.convert SRC DST"
            )
        _given()
        if not _CHECK.value:
            try:
                converting.ending(rest[2], layout=_LAYOUT.value, dtype=_DTYPE.value)
            except converting.DestinationError as error:
                raise flags.Error(str(error)) from error

    return command.parsed(argv, check)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    command.run(lambda: _convert(*argv[1:]), debug=_DEBUG.value)


def _convert(source: str, path: str | None = None) -> None:
    examined = converting.examine(source, command.say, _given())
    if _CHECK.value:
        converting.verify(examined, command.say)
        return
    converting.write(
        examined,
        path,
        command.say,
        layout=_LAYOUT.value,
        dtype=_DTYPE.value,
        force=_FORCE.value,
    )


def _given() -> dict[str, Any]:
    """The flags that say something about SRC."""
    given = {
        "model.activation": _ACTIVATION.value,
        "model.image_size": command.picture_size("image_size", _IMAGE_SIZE.value),
        "model.stride": _STRIDE.value,
        "model.vision_heads": _VISION_HEADS.value,
        "model.text_heads": _TEXT_HEADS.value,
    }
    return {key: value for key, value in given.items() if value is not None}


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
