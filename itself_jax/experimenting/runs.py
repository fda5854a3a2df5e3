"""One training of an experiment: a main job in a process of its own, that can go on."""

import hashlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from itself_jax import config as config_lib
from itself_jax import files, interrupt
from itself_jax.experimenting import plans

FORMAT = 1
_BOOTSTRAPS = 1000
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
    """
    before = config_lib.flatten(config_lib.to_dict(base))
    changes = {key: value for key, value in arm.changes.items() if before[key] != value}
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
      ExperimentError: the file is damaged, or of another configuration.
    """
    try:
        record = json.loads(run.record.read_text(encoding="utf-8"))
        before = dict(record["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{run.record} is no record of a run ({error!r}): remove it to train anew."
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
        record = {**results(run), "answers": {}}
        keep(run, record)
    return record


def train(run: Run, log: Log) -> None:
    """Trains and tests, or goes on where that was stopped.

    Raises:
      ExperimentError: it failed; the sentence is the run's own.
      KeyboardInterrupt: the run was stopped by a signal, and is saved.
    """
    if (run.workdir / "finished.json").exists():
        return
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
    if process.returncode:
        lines = said.strip().splitlines()
        raise ExperimentError(
            f"the run in {run.workdir} failed: {lines[-1] if lines else process.returncode}"
        )


def results(run: Run) -> dict[str, Any]:
    """What a finished run says about itself: test rows, validations, and how sure its R@1 is."""
    dataset = run.config.dataset
    found = json.loads((run.workdir / "results" / f"{dataset}-test.json").read_text("utf-8"))
    lines = [
        json.loads(line)
        for line in (run.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    validations = [line for line in lines if "split" in line]
    with np.load(run.workdir / f"embeddings-{dataset}-test.npz") as saved:
        error = bootstrap_error(dict(saved), found["chosen_alpha"], run.seed)
    return {
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
        "bootstrap_error_R1": error,
        "validations": [
            {key: round(x, 5) if isinstance(x, float) else x for key, x in line.items()}
            for line in validations
        ],
    }


def bootstrap_error(arrays: Mapping[str, np.ndarray], alpha: float, seed: int) -> float:
    """Standard error of text→image R@1, in points, over the identities of the test set.

    Identities are drawn with replacement, with all their queries; the gallery stays.
    """
    from itself_jax import retrieval
    from itself_jax.reporting import answers

    fields = {name: arrays.get(name) for name in retrieval.Embeddings._fields}
    found = answers.find(retrieval.Embeddings(**fields), alpha, "t2i", top=1)
    ids, of = np.unique(arrays["text_ids"], return_inverse=True)
    hits = np.bincount(of, weights=found.first_right == 1)
    queries = np.bincount(of)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(ids), (_BOOTSTRAPS, len(ids)))
    return float((100 * hits[drawn].sum(1) / queries[drawn].sum(1)).std(ddof=1))


def keep(run: Run, record: Mapping[str, Any]) -> None:
    """Writes what remains of a run, as a whole."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    files.write(run.record, lambda file: file.write(text.encode()))
