"""What the programs of a run need: `python -m itself_jax.bench COMMAND --config=FILE`.

    aot --topology=v5e:16x16 --config=configs/cuhk.py   compiled for machines that are not here

`aot` prints memory, operations and collectives of the train step and both encoders, at full size;
`--json=FILE` keeps them. Exit codes: 0 done; 1 failed, or a program does not fit its devices, with
one sentence; 2 flag or config rejected.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from itself_jax import command
from itself_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/cuhk.py.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "aot: devices to compile for: v5e:16x16, v5p:4x4x4, h100:8, cpu:8."
)
_IDENTITIES = flags.DEFINE_integer(
    "identities", 11003, "aot: of the data set's train split [CUHK-PEDES].", lower_bound=2
)
_PROGRAMS = flags.DEFINE_list(
    "programs", ["step", "image encoder", "text encoder"], "aot: which ones to compile."
)
_SEARCH = flags.DEFINE_integer(
    "search", 0, "aot: look for the largest batch, with so many compilations.", lower_bound=0
)


def _aot(config: config_lib.Config) -> None:
    if _TOPOLOGY.value is None:
        raise flags.Error("--topology is required, e.g. --topology=v5e:16x16")
    known = list(flags.FLAGS["programs"].default)
    for name in _PROGRAMS.value:
        if name not in known:
            raise flags.Error(f"--programs={name}: must be some of {', '.join(known)}")
    _compile_only(_TOPOLOGY.value)
    # Imported late: the environment above is read when jax is.
    from itself_jax import aot

    topology = aot.find_topology(_TOPOLOGY.value)
    result = aot.plan(config, topology, _IDENTITIES.value, only=_PROGRAMS.value, say=command.say)
    for line in aot.lines(result):
        command.say(line)
    document = aot.to_json(result)
    if _SEARCH.value:
        search = _search(aot, config, topology)
        document["largest_batch"] = search._asdict()
        command.say(
            f"Largest batch_size that fits: {search.fits or 'none found'} "
            f"(next tried that does not: {search.too_large or 'none'}; {search.tries} tries)."
        )
    if _JSON.value:
        path = pathlib.Path(_JSON.value)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if result.failures and not _SEARCH.value:
        name, sentence = next(iter(result.failures.items()))
        raise aot.AotError(
            f"the {name} at batch_size={config.batch_size} on {topology.name} {sentence}; use a "
            "smaller config.batch_size, config.micro_batches, config.remat=block or "
            "config.sharding=fsdp"
        )


def _search(aot, config: config_lib.Config, topology):
    """`aot.largest_batch` with a compilation of the step as its measure."""
    shards = config.mesh.data
    if shards == -1:
        shards = max(1, len(topology.devices) // config.mesh.model)
    unit = shards * config.micro_batches * config.num_instances

    def fits(batch_size: int) -> bool:
        tried = dataclasses.replace(config, batch_size=batch_size)
        result = aot.plan(tried, topology, _IDENTITIES.value, only=["step"])
        good = not result.failures
        if good and topology.chip is not None:
            # Not every compiler refuses what does not fit.
            good = result.programs[0].bytes <= topology.chip.memory
        command.say(f"batch_size={batch_size}: {'fits' if good else 'does not fit'}.")
        return good

    return aot.largest_batch(fits, start=config.batch_size, unit=unit, tries=_SEARCH.value)


def _compile_only(topology: str) -> None:
    """The environment in which jax finds a compiler and no devices but the CPU's."""
    found = re.fullmatch(r"cpu:([1-9]\d*)", topology)
    settings = {
        "JAX_PLATFORMS": "cpu",
        # libtpu would ask Google's metadata server which TPU this is, and lock it.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if found:
        settings["JAX_NUM_CPU_DEVICES"] = found[1]
    if topology.startswith("h100"):
        # Tuning tries kernels on a card.
        settings["XLA_FLAGS"] = " ".join(
            (
                os.environ.get("XLA_FLAGS", ""),
                "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
            )
        ).strip()
    os.environ.update(settings)


COMMANDS: dict[str, Callable[[config_lib.Config], None]] = {"aot": _aot}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag or key ends the program with 2 and one sentence."""
    try:
        command.check_overrides(argv)
        rest = flags.FLAGS(list(argv))
        if len(rest) != 2 or rest[1] not in COMMANDS:
            got = " ".join(rest[1:]) or "nothing"
            raise flags.Error(
                f"one command of {', '.join(COMMANDS)} expected, got {got}: "
                "python -m itself_jax.bench aot --topology=v5e:16x16 --config=configs/cuhk.py"
            )
        if not flags.FLAGS["config"].present:
            raise flags.Error("--config is required, e.g. --config=configs/cuhk.py")
        return rest
    except (flags.Error, config_lib.ConfigError) as error:
        command.stop(command.REJECTED, error)
    except Exception as error:  # a config file is a program: it may fail in any way
        command.stop(command.REJECTED, f"--config: {error}")


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    logging.set_verbosity(logging.WARNING)
    try:
        try:
            config = config_lib.from_dict(_CONFIG.value)
        except OSError as error:  # the file could not be read
            raise config_lib.ConfigError(str(error).replace("\n", " ")) from error
        COMMANDS[argv[1]](config)
    except (config_lib.ConfigError, flags.Error) as error:
        command.stop(command.REJECTED, error)
    except Exception as error:
        if _DEBUG.value:
            raise
        command.stop(command.FAILED, error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
