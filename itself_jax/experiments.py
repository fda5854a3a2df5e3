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
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from itself_jax import command

_CONFIG = config_flags.DEFINE_config_file("config", "configs/synthetic.py", "What is varied.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs and tables.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0..N-1.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(argv: Sequence[str]) -> None:
    command.run(lambda: _go_on(argv[1]), debug=_DEBUG.value)


def _check(argv: list[str]) -> None:
    from itself_jax.experimenting import plans

    if len(argv) != 2 or argv[1] not in plans.EXPERIMENTS:
        raise flags.Error(f"give one experiment: {', '.join(plans.EXPERIMENTS)}")
    if _SEEDS.value < 1:
        raise flags.Error(f"--seeds={_SEEDS.value}: at least one seed is needed")
    if not _WORKDIR.value:
        raise flags.Error("--workdir=DIR is needed: runs, records and tables go there")


def _go_on(name: str) -> None:
    from itself_jax import interrupt

    try:
        _run(name)
    except KeyboardInterrupt:
        command.stop(interrupt.EXIT_CODE, "stopped; the same command goes on")


def _run(name: str) -> None:
    # Imported late: a wrong command line must not wait for jax.
    from itself_jax import compile_cache
    from itself_jax.experimenting import plans, questions, runs, summary

    compile_cache.keep(None)
    experiment = plans.EXPERIMENTS[name]
    base = command.configuration(_CONFIG)
    folder = pathlib.Path(_WORKDIR.value)
    # All at once: an arm that the configuration does not allow must not be found after hours.
    planned = [
        [(arm, runs.plan(base, arm, seed, folder)) for arm in experiment.arms]
        for seed in range(_SEEDS.value)
    ]
    records: dict[str, dict[int, dict]] = {arm.name: {} for arm in experiment.arms}
    found = {}
    for seed, of_seed in enumerate(planned):
        for arm, run in of_seed:
            record = runs.finished(run, command.say)
            if experiment.asks and experiment.asks not in record["answers"]:
                runs.train(run, command.say)  # its weights may be elsewhere
                answer = questions.ask(experiment.asks, run, record, command.say)
                record["answers"][experiment.asks] = answer
                runs.keep(run, record)
            records[arm.name][seed] = record
            command.say(f"{arm.name}, seed {seed}: R@1 {summary.chosen(record):.2f}")
        found = summary.summarise(experiment, records)
        summary.write(folder, found)
    command.say(summary.markdown(found))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command.parsed(argv, _check))
