"""Experiments over seeds: one table, one figure, one JSON each.

    python -m itself_jax.experiments NAME --workdir=DIR --seeds=N [--config=FILE]

NAME is one of variants, untrained, layers, discard, ats, inference_saliency, mismatch_label,
protocol, early_evidence. Runs are trained in DIR/runs, one after the other, and what remains of
each is a file in DIR/records: what is there is not done again, also for another experiment that
needs the same run. DIR/NAME.md, .png and .json are written after each seed. `--config` is what is
varied [configs/synthetic.py]. Exit codes: 0 done; 1 failed, with one sentence; 2 flag or config
rejected; 75 stopped by a signal: the same command goes on.
"""

import pathlib
import re
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from itself_jax import command

_VARIED = "configs/synthetic.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"What is varied [{_VARIED}].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs and tables.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0..N-1.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a rejected flag or key ends the program with 2 and one sentence."""
    given = any(re.match(r"--?config(=|$)", argument) for argument in argv[1:])
    # A default of the flag would be read where it is defined: out of reach of what explains errors.
    return command.parsed([argv[0], *([] if given else [f"--config={_VARIED}"]), *argv[1:]], _check)


def main(argv: Sequence[str]) -> None:
    command.run(lambda: _go_on(argv[1]), debug=_DEBUG.value)


def _check(argv: list[str]) -> None:
    from itself_jax.data import remote
    from itself_jax.experimenting import plans

    if len(argv) != 2 or argv[1] not in plans.EXPERIMENTS:
        raise flags.Error(f"give one experiment: {', '.join(plans.EXPERIMENTS)}")
    if _SEEDS.value < 1:
        raise flags.Error(f"--seeds={_SEEDS.value}: at least one seed is needed")
    if not _WORKDIR.value:
        raise flags.Error("--workdir=DIR is needed: runs, records and tables go there")
    if not remote.is_local(_WORKDIR.value):
        raise flags.Error(
            f"--workdir={_WORKDIR.value}: experiments are kept in a local directory; give one, and "
            "copy it afterwards"
        )


def _go_on(name: str) -> None:
    from itself_jax import interrupt

    try:
        _run(name)
    except KeyboardInterrupt:
        command.stop(interrupt.EXIT_CODE, "stopped; the same command goes on")


def _run(name: str) -> None:
    # Imported late: a wrong command line must not wait for jax.
    from itself_jax.experimenting import plans, questions, runs, summary

    experiment = plans.EXPERIMENTS[name]
    base = command.configuration(_CONFIG)
    folder = pathlib.Path(_WORKDIR.value)
    # All at once: an arm that the configuration does not allow must not be found after hours.
    planned = [
        [(arm, runs.plan(base, arm, seed, folder)) for arm in experiment.arms]
        for seed in range(_SEEDS.value)
    ]
    # What is there is in the tables from the start: they never lose a seed that is asked for.
    records = [{arm.name: runs.read(run) for arm, run in of_seed} for of_seed in planned]
    question = experiment.asks

    def is_done(record: dict | None) -> bool:
        return record is not None and (not question or question in record["answers"])

    def tables() -> dict:
        done = {seed: r for seed, r in enumerate(records) if all(map(is_done, r.values()))}
        found = summary.summarise(
            experiment,
            {arm.name: {seed: r[arm.name] for seed, r in done.items()} for arm in experiment.arms},
        )
        summary.write(folder, found)
        return found

    found = None
    for seed, of_seed in enumerate(planned):
        missing = [(arm, run) for arm, run in of_seed if not is_done(records[seed][arm.name])]
        for arm, run in missing:
            record = runs.finished(run, command.say)
            if not is_done(record):
                record = runs.asked(run, question, questions.ask, command.say)
            records[seed][arm.name] = record
            command.say(f"{arm.name}, seed {seed}: R@1 {summary.chosen(record):.2f}")
        if missing:
            found = tables()
    command.say(summary.markdown(found or tables()))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
