"""What the programs of a run need, and how fast they are.

    python -m itself_jax.bench COMMAND --config=FILE

    train      the train step, as a run compiles it, on generated pairs
    encode     both encoders, on batches of config.eval.batch_size
    eval       the ranking of generated embeddings: --queries, --gallery
    data       reading and augmenting config.dataset
    startup    from the command to the first step, with nothing compiled before and again
    all        these five
    compare    train, encode and eval beside the PyTorch twin, in turn: --mode, --parts
    aot        --topology=v5e:16x16: compiled for machines that are not here, and not run

Each prints a table; `--json=FILE` keeps every figure, under the keys of docs/performance.md.
`--sweep=batch_size=4,8,16` repeats a command for each value, `--profile=DIR` leaves traces for
XProf and Perfetto. Exit codes: 0 done; 1 failed, or a program does not fit its devices, with one
sentence; 2 flag or config rejected.
"""

import ast
import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

from itself_jax import command
from itself_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/cuhk.py.")
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_IDENTITIES = flags.DEFINE_integer(
    "identities", 11003, "Of the data set's train split [CUHK-PEDES].", lower_bound=2
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls that are timed.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 2, "Calls before them.", lower_bound=1)
_QUERIES = flags.DEFINE_integer(
    "queries", 6156, "eval: captions [CUHK-PEDES's test split].", lower_bound=1
)
_GALLERY = flags.DEFINE_integer(
    "gallery", 3074, "eval: pictures [CUHK-PEDES's test split].", lower_bound=1
)
_STREAMED = flags.DEFINE_bool(
    "streamed", False, "eval: text to image alone, pictures made when read; any gallery fits."
)
_SWEEP = flags.DEFINE_string(
    "sweep", None, "A config key, queries or gallery, and its values: batch_size=4,8,16."
)
_PROFILE = flags.DEFINE_string("profile", None, "Folder for traces: train, encode, eval.")
_PARTS = flags.DEFINE_list("parts", ["train", "images", "captions", "eval"], "compare: which ones.")
_MODE = flags.DEFINE_list(
    "mode", ["lean", "published"], "compare: the twin does what is needed, or what was published."
)
_THREADS = flags.DEFINE_integer(
    "threads", None, "compare: of both sides [all processors].", lower_bound=1
)
_TWIN_PYTHON = flags.DEFINE_string("twin_python", "", "compare: a Python with torch [this one].")
_TWIN_COMPILE = flags.DEFINE_bool("twin_compile", False, "compare: the twin by torch.compile.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "aot: devices to compile for: v5e:16x16, v5p:4x4x4, h100:8, cpu:8."
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
    _check_list("programs")
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
    _write_json(document)
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


# --- what is measured here ------------------------------------------------------------------------

_MEASURED = ("train", "encode", "eval", "data", "startup")


class _Value(NamedTuple):
    """One value of a sweep and what it makes of the settings; without a sweep the only one."""

    changed: dict[str, Any]
    config: config_lib.Config
    counts: dict[str, int]  # as `workloads.Settings` names them


def _measured(*names: str) -> Callable[[config_lib.Config], None]:
    """The command that measures these, one after another."""

    def measure(config: config_lib.Config) -> None:
        if _PROFILE.value and set(names).isdisjoint(("train", "encode", "eval")):
            raise flags.Error(
                f"--profile={_PROFILE.value}: {names[0]} runs no program of ours here"
            )
        values = _values(config)
        # Imported late: a bad flag must not wait for jax.
        from itself_jax import workloads

        if not {"data", "startup"}.isdisjoint(names):
            workloads.require_data_libraries()
        profile = pathlib.Path(_PROFILE.value) if _PROFILE.value else None
        rows = []
        for value in values:
            settings = workloads.Settings(**value.counts, streamed=_STREAMED.value)
            with tempfile.TemporaryDirectory(prefix="itself_jax-bench-") as scratch:
                for name in names:
                    jobs = workloads.makers(name, value.config, settings, pathlib.Path(scratch))
                    for make in jobs:
                        row = workloads.measure(
                            make(),
                            repeats=_REPEATS.value,
                            warmup=_WARMUP.value,
                            profile=_folder_of(profile, value),
                        )
                        rows.append({"changed": value.changed, **row})
                        command.say(f"{_title(rows[-1])}: {_seconds(row['seconds'])}")
        _finish(names[0] if len(names) == 1 else "all", config, rows, workloads.table(rows))

    return measure


def _compare(config: config_lib.Config) -> None:
    _check_list("parts")
    _check_list("mode")
    if _PROFILE.value:
        raise flags.Error("--profile: compare writes no traces; train, encode and eval do")
    if _STREAMED.value:
        raise flags.Error("--streamed: the twin holds the whole gallery; use eval")
    values = _values(config)
    from itself_jax import comparing, timing, workloads

    threads = _THREADS.value or timing.cpus()
    if threads > timing.cpus():
        raise flags.Error(f"--threads={threads}: this process may use {timing.cpus()} processors")
    twin = comparing.find_twin(_TWIN_PYTHON.value, _TWIN_COMPILE.value)
    rows = []
    for value in values:
        with tempfile.TemporaryDirectory(prefix="itself_jax-bench-") as scratch:
            for part in _PARTS.value:
                for mode in _MODE.value:
                    row = comparing.compare(
                        value.config,
                        workloads.Settings(**value.counts),
                        part,
                        mode,
                        twin,
                        repeats=_REPEATS.value,
                        warmup=_WARMUP.value,
                        threads=threads,
                        scratch=pathlib.Path(scratch),
                    )
                    rows.append({"changed": value.changed, **row})
                    ratio = row["ratio"]["median"]
                    command.say(f"{_title(rows[-1])}: {ratio:.3f} of the twin's time, mode {mode}")
    _finish("compare", config, rows, comparing.table(rows))


def _values(config: config_lib.Config) -> list[_Value]:
    """What `--sweep` asks for, checked as a whole before the first is measured.

    Raises:
      flags.Error, ConfigError: it is misspelt, or a value does not fit.
    """
    counts = {flag.name: flag.value for flag in (_IDENTITIES, _QUERIES, _GALLERY)}
    if _SWEEP.value is None:
        return [_Value({}, config, counts)]
    key, equals, text = _SWEEP.value.partition("=")
    words = re.findall(r"[(\[][^)\]]*[)\]]|[^,]+", text)
    if not (key and equals and words):
        raise flags.Error(
            f"--sweep={_SWEEP.value}: expected a key and its values, e.g. --sweep=batch_size=4,8,16"
        )
    known = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
    values = []
    for word in words:
        if key in counts:
            if not re.fullmatch(r"[1-9]\d*", word):
                raise flags.Error(f"--sweep={_SWEEP.value}: {word} is no positive number")
            values.append(_Value({key: int(word)}, config, counts | {key: int(word)}))
        elif key in known:
            changed = config_lib.replace(config, {key: _literal(word)})
            value = config_lib.flatten(config_lib.to_dict(changed))[key]
            values.append(_Value({key: value}, changed, counts))
        else:
            raise config_lib.ConfigError(f"--sweep: {config_lib.unknown_key(key)}")
    return values


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _folder_of(profile: pathlib.Path | None, value: _Value) -> pathlib.Path | None:
    if profile is None:
        return None
    return profile.joinpath(*(f"{key}={x}" for key, x in value.changed.items()))


def _title(row: dict[str, Any]) -> str:
    return " ".join([row["name"], *(f"{key}={x}" for key, x in row["changed"].items())])


def _seconds(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.4g} s ({spread['min']:.4g} to {spread['max']:.4g})"


def _finish(name: str, config: config_lib.Config, rows: list[Any], table: list[str]) -> None:
    """Prints the table and writes the document."""
    from itself_jax import timing, workloads

    machine, versions = timing.machine(), timing.versions(*(["torch"] if name == "compare" else []))
    growth = workloads.growth(rows)
    command.say(
        f"\n{name} on {machine['devices']} x {machine['device_kind']} ({machine['cpus']} "
        f"processors), jax {versions['jax']}"
    )
    for line in table:
        command.say(line)
    for found in growth:
        command.say(f"{found['name']}: time grows as {found['key']}^{found['exponent']:.3f}")
    _write_json(
        {
            "schema": workloads.SCHEMA,
            "command": name,
            "machine": machine,
            "versions": versions,
            "config": config_lib.to_dict(config),
            "settings": {
                "repeats": _REPEATS.value,
                "warmup": _WARMUP.value,
                "identities": _IDENTITIES.value,
                "queries": _QUERIES.value,
                "gallery": _GALLERY.value,
                "streamed": _STREAMED.value,
            },
            "rows": rows,
            "growth": growth,
        }
    )


def _write_json(document: dict[str, Any]) -> None:
    if _JSON.value:
        from itself_jax import files

        text = json.dumps(document, indent=1) + "\n"
        files.write(_JSON.value, lambda file: file.write(text.encode()))


def _check_list(name: str) -> None:
    known = list(flags.FLAGS[name].default)
    for value in flags.FLAGS[name].value:
        if value not in known:
            raise flags.Error(f"--{name}={value}: must be some of {', '.join(known)}")


COMMANDS: dict[str, Callable[[config_lib.Config], None]] = {
    **{name: _measured(name) for name in _MEASURED},
    "all": _measured(*_MEASURED),
    "compare": _compare,
    "aot": _aot,
}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag or key ends the program with 2 and one sentence."""

    def check(rest: list[str]) -> None:
        if len(rest) != 2 or rest[1] not in COMMANDS:
            got = " ".join(rest[1:]) or "nothing"
            raise flags.Error(
                f"one command of {', '.join(COMMANDS)} expected, got {got}: "
                "python -m itself_jax.bench train --config=configs/cuhk.py"
            )
        if not flags.FLAGS["config"].present:
            raise flags.Error("--config is required, e.g. --config=configs/cuhk.py")
        if _JSON.value is not None and (not _JSON.value or os.path.isdir(_JSON.value)):
            raise flags.Error(f"--json={_JSON.value}: expected a file, e.g. --json=bench.json")

    return command.parsed(argv, check)


def main(argv: Sequence[str]) -> None:
    """Runs the command; every way out but success is an exit code and a sentence."""
    logging.set_verbosity(logging.WARNING)
    try:
        COMMANDS[argv[1]](command.configuration(_CONFIG))
    except (config_lib.ConfigError, flags.Error) as error:
        command.stop(command.REJECTED, error)
    except Exception as error:
        if _DEBUG.value:
            raise
        command.stop(command.FAILED, error)


if __name__ == "__main__":
    command.with_huge_pages()
    app.run(main, flags_parser=parse_flags)
