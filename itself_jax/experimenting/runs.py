"""One training of an experiment: a main job in a process of its own, that can go on.

What is asked of its weights is asked in another such process, so that the one that leads them never
holds the accelerators which they need.
"""

import hashlib
import json
import multiprocessing
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from itself_jax import config as config_lib
from itself_jax import files, interrupt
from itself_jax.experimenting import plans

FORMAT = 2
_FIELDS = ("settings", "seed", "chosen_alpha", "test", "hits", "validations", "answers")
Log = Callable[[str], None]


class ExperimentError(RuntimeError):
    """An experiment cannot go on; the message is one sentence for the user."""


class Run(NamedTuple):
    """Settings and seed, its work directory, and the file that remains of it."""

    config: config_lib.Config
    seed: int
    workdir: pathlib.Path
    record: pathlib.Path


def plan(base: config_lib.Config, arm: plans.Arm, seed: int, folder: pathlib.Path) -> Run:
    """The run of an arm and a seed below `folder`; arms that change the same share it.

    The seed is that of the new layers, of sampling and of the order of data; the data set, and the
    checkpoint that the run starts from, stay what they are.

    Raises:
      ConfigError: the configuration does not allow what the arm changes, or chooses epoch and
        fusion weight elsewhere than on val, as all tables take them to be.
    """
    if base.eval.protocol != "val" or base.train_on_all or base.eval.alpha is not None:
        raise config_lib.ConfigError(
            "experiments choose epoch and fusion weight on val: eval.protocol must be 'val', "
            "train_on_all False and eval.alpha None, "
            f"not {base.eval.protocol!r}, {base.train_on_all} and {base.eval.alpha}."
        )
    before = config_lib.flatten(config_lib.to_dict(base))
    depth = base.model.vision_depth
    wanted = {key: value(depth) if callable(value) else value for key, value in arm.changes.items()}
    changes = {key: value for key, value in wanted.items() if _plain(before[key]) != _plain(value)}
    config = config_lib.replace(
        base,
        {
            **changes,
            "seed": seed,
            "keep_epochs": True,
            "eval.dump_embeddings": True,
            "eval.watch": 0,
        },
    )
    key = hashlib.sha256(json.dumps(sorted(changes.items()), default=list).encode())
    name = f"{slug(changes)}-{key.hexdigest()[:6]}"
    return Run(
        config,
        seed,
        folder / "runs" / name / f"seed-{seed}",
        folder / "records" / name / f"seed-{seed}.json",
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def slug(changes: Mapping[str, Any]) -> str:
    """A readable folder name of some changes."""
    parts = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(changes.items())]
    text = ",".join(parts) or "itself"
    return "".join(c if c.isalnum() or c in "=,._-" else "_" for c in text)


def settings(config: config_lib.Config) -> dict[str, Any]:
    """What must agree between a record and the run that is asked for."""
    flat = config_lib.flatten(config_lib.to_dict(config))
    own = (
        "data_root",
        "log_every",
        "num_workers",
        "mesh.",
        "distributed.",
        "eval.dump",
        "eval.chunk",
    )
    return {key: value for key, value in flat.items() if not key.startswith(own)}


def read(run: Run) -> dict[str, Any] | None:
    """What an earlier call left of this run; None where it left nothing.

    Raises:
      ExperimentError: the file is damaged, or of another format or configuration.
    """
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ExperimentError(
                f"{run.record} has format {record['format']!r}, not {FORMAT}: remove it, and it is "
                "made anew from its run, or that trained anew."
            )
        before = dict({name: record[name] for name in _FIELDS}["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{run.record} is no record of a run ({error!r}): remove it, and it is made anew."
        ) from error
    now = settings(run.config)
    different = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if different:
        raise ExperimentError(
            f"{run.record} is of another configuration ({'; '.join(different[:4])}): give another "
            "--workdir, or the configuration that it was made with."
        )
    return record


def finished(run: Run, log: Log) -> dict[str, Any]:
    """The record of a run, which is trained and tested where there is none yet.

    Raises:
      ExperimentError: as `read` and `train`.
      KeyboardInterrupt: as `train`.
    """
    record = read(run)
    if record is None:
        train(run, log)
        record = alone(run, results, run)
        keep(run, record)
    return record


def asked(run: Run, question: str, ask: Callable[..., dict[str, Any]], log: Log) -> dict[str, Any]:
    """The record of a run with the answer to a question about its weights, kept.

    The record is made anew if it is not of the weights that are there: those may have been trained
    again, on another machine.

    Raises:
      ExperimentError: as `read`, `train` and `alone`.
      KeyboardInterrupt: as `train`.
    """
    train(run, log)
    before, record = read(run), alone(run, results, run)
    if before is not None and {**before, "answers": {}} == record:
        record = before
    answer = alone(run, ask, question, run, record, log)
    now = read(run)  # another experiment may have asked the same run meanwhile
    if now is not None and {**now, "answers": {}} == {**record, "answers": {}}:
        record = now
    record = {**record, "answers": {**record["answers"], question: answer}}
    keep(run, record)
    return record


def alone(run: Run, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns of a run, in a process of its own, which ends with it.

    Raises:
      ExperimentError: that process was killed.
      KeyboardInterrupt: this one was told to stop; the other is ended.
    """
    pool = futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for this process
    )
    try:
        with pool:
            try:
                return pool.submit(_with_cache, call, *arguments).result()
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except futures.process.BrokenProcessPool as error:
        raise ExperimentError(
            f"the process that evaluates {run.workdir} was killed, perhaps for want of memory; the "
            "same command goes on."
        ) from error


def _with_cache(call: Callable[..., Any], *arguments: Any) -> Any:
    from itself_jax import compile_cache

    compile_cache.keep(None)
    return call(*arguments)


def train(run: Run, log: Log) -> None:
    """Trains and tests, or goes on where that was stopped; a finished run is found to be finished.

    Raises:
      ExperimentError: it failed, or what is there is of another configuration; the sentence is the
        run's own.
      KeyboardInterrupt: the run was stopped by a signal, and is saved.
    """
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    program = run.workdir.parent / f"{run.workdir.name}.config.py"
    flat = config_lib.flatten(config_lib.to_dict(run.config))
    files.write(
        program,
        lambda file: file.write(
            (
                "from itself_jax import config as config_lib\n\n\ndef get_config():\n"
                "    config = config_lib.default()\n    with config.ignore_type():\n"
                f"        config.update_from_flattened_dict({flat!r})\n    return config\n"
            ).encode()
        ),
    )
    if not (run.workdir / "finished.json").exists():
        log(f"Training {run.workdir} …")
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "itself_jax.main"),
            *(f"--config={program}", f"--workdir={run.workdir}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which then asks the run to save
    ) as process:
        try:
            _, said = process.communicate()
        except KeyboardInterrupt:
            process.terminate()
            process.communicate()
            raise
    if process.returncode == interrupt.EXIT_CODE:
        raise KeyboardInterrupt
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise ExperimentError(
            f"the run in {run.workdir} was ended by {name}, perhaps for want of memory; the same "
            "command goes on."
        )
    if process.returncode:
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        raise ExperimentError(f"the run in {run.workdir} failed: {lines[-1]}")


def results(run: Run) -> dict[str, Any]:
    """The record of a finished run, without answers: test rows, validations, the people found.

    Raises:
      ExperimentError: a file of it is gone or damaged.
    """
    try:
        return _results(run)
    except (OSError, ValueError, KeyError) as error:
        raise gone(run, error) from error


def gone(run: Run, error: Exception) -> ExperimentError:
    """What to do where files of a finished run cannot be used any more."""
    return ExperimentError(
        f"the finished run in {run.workdir} is not whole ({error}): remove that directory, and the "
        "same command trains it anew."
    )


def _results(run: Run) -> dict[str, Any]:
    dataset = run.config.dataset
    found = json.loads((run.workdir / "results" / f"{dataset}-test.json").read_text("utf-8"))
    lines = [
        json.loads(line)
        for line in (run.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    validations = [line for line in lines if "split" in line]
    with np.load(run.workdir / f"embeddings-{dataset}-test.npz") as saved:
        hits = found_first(dict(saved), found["chosen_alpha"])
    record = {
        "format": FORMAT,
        "settings": settings(run.config),
        "seed": run.seed,
        "chosen_alpha": found["chosen_alpha"],
        "best_epoch": json.loads((run.workdir / "finished.json").read_text("utf-8"))["best_epoch"],
        "test": {
            f"{row['direction']} {row['similarity']}": {
                name: round(row[name], 4) for name in ("R1", "R5", "R10", "mAP", "mINP")
            }
            for row in found["rows"]
        },
        "oracle_R1": found.get("oracle_R1"),
        "chance_R1": found["chance_R1"],
        "hits": hits,
        "validations": [
            {key: round(x, 5) if isinstance(x, float) else x for key, x in line.items()}
            for line in validations
        ],
        "answers": {},
    }
    return json.loads(json.dumps(record))  # as it will be read: lists for tuples


def found_first(arrays: Mapping[str, np.ndarray], alpha: float) -> dict[str, list[int]]:
    """Of each identity, in order, its text queries and how many have a right first answer."""
    from itself_jax import retrieval
    from itself_jax.reporting import answers

    fields = {name: arrays.get(name) for name in retrieval.Embeddings._fields}
    found = answers.find(retrieval.Embeddings(**fields), alpha, "t2i", top=1)
    _, of = np.unique(arrays["text_ids"], return_inverse=True)
    hits = np.bincount(of, weights=found.first_right == 1)
    return {"found": hits.astype(int).tolist(), "queries": np.bincount(of).tolist()}


def keep(run: Run, record: Mapping[str, Any]) -> None:
    """Writes what remains of a run, as a whole."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    files.write(run.record, lambda file: file.write(text.encode()))
