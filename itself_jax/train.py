"""The main job: train, validate, save, resume, and test the best checkpoint once."""

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import (
    assessment,
    checkpoint,
    evaluate,
    fitting,
    hosts,
    interrupt,
    retrieval,
    sharding,
    splits,
    step,
    weights,
    workdir,
)
from itself_jax import config as config_lib
from itself_jax import meter as meter_lib
from itself_jax.data import batch as batch_lib
from itself_jax.data import records, tokenizer

Log = Callable[[str], None]


class Progress(NamedTuple):
    """Where a run stands beside its arrays; saved with every checkpoint."""

    epoch: int = 0  # completed epochs
    validated: bool = True  # whether the last completed epoch was validated
    score: float | None = None  # R@1 of that validation (with `train_on_all` the epoch)
    best_score: float | None = None
    best_epoch: int = 0
    best_alpha: float = 1.0
    protocol: str = "val"  # how epoch and weight are chosen


class Start(NamedTuple):
    """What a run starts from.

    config: with all sizes.
    pretrained: the weights of `init_from`; None: there are none, or the run goes on without them.
    sizes_from_weights: keys of `weights.SIZES` that the weights decided; the others are settings of
      the run like all others.
    """

    config: config_lib.Config
    pretrained: weights.Weights | None = None
    sizes_from_weights: tuple[str, ...] = ()


def run(
    config: config_lib.Config,
    path: str | os.PathLike,
    interrupts: interrupt.Interrupts,
    ours: hosts.Hosts = assessment.ALONE,
) -> None:
    """Trains `config` in directory `path`, or goes on where an earlier call stopped.

    Order of the loop: validate → save (state + data position) → next batch → step → log the
    previous step's metrics.

    Every process of a run does the same; process 0 writes what is not a checkpoint.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError, NonFiniteLossError, HostsError: one
        sentence each.
      Interrupted: a signal came; everything is saved.
    """
    log = meter_lib.print_line if ours.leads else lambda line: None
    directory = workdir.Workdir(path, writes=ours.leads)
    ours.agree({"--mode": "train", "--workdir": str(path), **assessment.facts(config)})
    try:
        _run(config, directory, interrupts, ours, log)
    finally:
        directory.release()


def _run(
    config: config_lib.Config,
    directory: workdir.Workdir,
    interrupts: interrupt.Interrupts,
    ours: hosts.Hosts,
    log: Log,
) -> None:
    started = time.monotonic()
    config, pretrained, sizes_from_weights = start_from(config, directory, log)
    mesh = sharding.make_mesh(config)
    compute_dtype = step.compute_dtype(config.precision).name
    directory.claim(config, compute_dtype, log)
    check_shared(directory, ours)
    if finished := directory.finished():
        log(f"{directory.path} is finished (best epoch {finished['best_epoch']}): see results/.")
        if config.eval.watch and not assessment.has_report(directory):
            log(f"Its report was not written: python -m itself_jax.report {directory.path}")
        return

    train_split = splits.read(config, config.dataset, "train", log)
    validation_split = splits.read(config, config.dataset, splits.validation_name(config), log)
    # Read now, used at the end: hours of training must not end at a misspelt folder.
    test_splits = splits.read_tests(config, log)
    truth = splits.masks_of(config, validation_split, log) if config.eval.watch else None
    ours.agree(splits.facts([train_split, validation_split, *test_splits], pretrained, truth))
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    stream = splits.stream(config, train_split, words, shard=sharding.host_rows(mesh))
    # Everything is compiled before the first step, so that no later signal meets a compiler.
    with interrupts.compilation():
        training = step.make(
            config,
            num_identities=train_split.num_identities,
            steps_per_epoch=stream.steps_per_epoch,
        )
        template = step.state_template(training, mesh)
        if pretrained is not None:  # a compiler's minute is too long to wait for a misfit
            fitting.check(pretrained, assessment.variables_of(template), config.model)
        ends = np.cumsum(stream.steps_per_epoch)  # the last step of each epoch
        last_step = int(ends[(config.last_epoch or config.num_epochs) - 1])
        log(describe(config, train_split, last_step, template, mesh))
        if mesh.size > 1:
            for line in sharding.describe(
                sharding.place(mesh, template, config.sharding), template
            ):
                log(line)
        encoders = step.compile_encoders(training, assessment.encoder_variables(template), mesh)
        watcher = assessment.watch(
            training,
            assessment.encoder_variables(template),
            mesh,
            validation_split,
            words,
            interrupts,
            truth,
        )
        train_step = step.compile_step(training, template, mesh)
    this = assessment.Run(
        config, directory, mesh, training, words, encoders, watcher, interrupts, ours, log
    )

    with checkpoint.Checkpoints(
        directory.checkpoints, log=log, ours=ours, keep_scored=config.keep_epochs
    ) as checkpoints:
        directory.hold(config, compute_dtype)
        with interrupts.compilation():
            state, progress = restore_or_init(this, checkpoints, template, pretrained)
            step.give_back_memory()  # of files that were read
        # Last of all that may fail at the start: until then another configuration may try again.
        directory.describe(config, compute_dtype, sizes_from_weights)
        saved = (int(state.step), progress.validated)
        meter = meter_lib.Meter(
            config,
            directory,
            stream,
            start=int(state.step),
            total=last_step,
            shows=ours.leads,
        )

        def save() -> None:
            nonlocal saved
            if saved != (meter.step, progress.validated):
                # A score belongs to the end of its epoch, not to steps after it.
                at_end = progress.epoch > 0 and meter.step == ends[progress.epoch - 1]
                meta = progress._replace(score=progress.score if at_end else None)
                checkpoints.save(meter.step, state, meta._asdict())
                saved = (meter.step, progress.validated)

        ours.barrier("ready to train")
        with interrupts.unsaved_work():
            batches = stream.batches(meter.step)
            try:
                while True:
                    if not progress.validated:
                        variables = assessment.encoder_variables(state)
                        rows, _ = assessment.encode_and_rank(
                            this, variables, validation_split, config.eval.alpha
                        )
                        measured = assessment.look(this, variables, progress.epoch)
                        progress = judge(this, progress, rows, measured, meter.step)
                        save()
                    if meter.step == last_step:
                        break
                    meter.restart_clock()
                    with jax.transfer_guard("disallow"):
                        while meter.step < ends[progress.epoch]:
                            interrupts.check()
                            batch = sharding.shard_batch(mesh, next_batch(batches, interrupts))
                            state, metrics = train_step(state, batch)
                            meter.record(metrics)
                    meter.flush()
                    if stream.replaced:
                        log(
                            f"{len(stream.unreadable)} unreadable pictures, replaced "
                            f"{stream.replaced} times since the start of this process."
                        )
                    progress = progress._replace(
                        epoch=progress.epoch + 1, validated=False, score=None
                    )
            except interrupt.Interrupted:
                meter.flush()
                save()
                checkpoints.wait()
                log(f"Stopped by a signal at step {meter.step}, saved; the same command goes on.")
                raise
            finally:
                meter.close()
                batches.close()
            checkpoints.wait()

    ours.barrier("saved")  # the best checkpoint may be the last one, which process 0 completes
    best = weights.of_run(directory.path, log, ours)
    alpha = best.meta["best_alpha"] if config.eval.alpha is None else config.eval.alpha
    log(f"Testing epoch {best.meta['epoch']}, {how_chosen(config)}.")
    with interrupts.checked_work():
        variables = fitting.fit(best, assessment.encoder_variables(template), config.model, log)
        whose = assessment.of_weights(best, None)
        tested = assessment.test(this, variables, alpha, test_splits, best.protocol, whose)
        directory.finish({"step": last_step, "best_epoch": best.meta["epoch"]})
        assessment.report(this, variables, tested, validation_split, is_own=True)
    log(f"Finished in {meter_lib.clock(time.monotonic() - started)}: {directory.path / 'results'}")


def start_from(config: config_lib.Config, directory: workdir.Workdir, log: Log) -> Start:
    """The weights of `init_from`, and the configuration with their sizes.

    A run that goes on has its sizes in its `config.json` and needs no file any more. Those that the
    weights did not decide (the local width of a branch that they lack, a chosen activation) must be
    given again as they were, like every setting of a run.
    """
    if config.init_from is None:
        activation = config.model.activation or config_lib.CLIP_ACTIVATION
        return Start(config_lib.replace(config, {"model.activation": activation}))
    saved = directory.saved_config()
    if saved is not None and saved["config"].get("init_from") == config.init_from:
        # The first runs do not say what came from the weights: all of it did, nearly always.
        from_weights = saved.get(workdir.FROM_WEIGHTS, weights.SIZES)
        before = config_lib.flatten(saved["config"])
        sizes = {key: before[key] for key in weights.SIZES if key in from_weights and key in before}
        if config.model.activation is not None:
            sizes.pop("model.activation", None)  # a chosen one is compared like every setting
        fitting.say_replaced(config, sizes, directory.path, log)
        return Start(config_lib.replace(config, sizes), None, tuple(from_weights))
    found = weights.open_(config.init_from, log)
    fitting.say_replaced(config, found.sizes, found.source, log)
    resolved = fitting.resolve(config, found, log, training=True)
    from_weights = tuple(
        key
        for key in weights.SIZES
        if found.sizes[key] is not None
        and not (key == "model.activation" and config.model.activation is not None)
    )
    return Start(resolved, found, from_weights)


def how_chosen(config: config_lib.Config) -> str:
    """How the tested epoch came about, for the log."""
    if config.eval.protocol == "paper":
        return "chosen on the test split itself, as the reference does"
    if config.train_on_all:
        return "the last one: nothing was left to validate on"
    return "the best on val"


def restore_or_init(
    this: assessment.Run,
    checkpoints: checkpoint.Checkpoints,
    template: step.TrainState,
    pretrained: weights.Weights | None,
) -> tuple[step.TrainState, Progress]:
    """The newest intact checkpoint with its metrics, or a fresh start (from `pretrained`)."""
    restored = checkpoints.restore_latest(template)
    if restored is None:
        this.workdir.cut_metrics(0, validated=False)
        state = step.init_state(this.training, template, this.config.seed)
        if this.config.init_from is not None:
            # A run that was killed before it saved anything has `config.json` but no checkpoint.
            pretrained = pretrained or weights.open_(this.config.init_from, this.log)
            fresh = assessment.variables_of(state)
            model = this.config.model
            fitted = fitting.fit(
                pretrained, assessment.variables_of(template), model, this.log, fresh=fresh
            )
            state = state._replace(**fitted)
        elif this.config.dataset != "synthetic":
            this.log(
                "WARNING: config.init_from is not set, so the encoders start from random numbers. "
                "The published settings and results need CLIP's weights: set config.init_from to "
                "ViT-B-16.pt of github.com/openai/CLIP, or a CLIP of Hugging Face or open_clip."
            )
        return state, Progress(protocol=this.config.eval.protocol)
    progress = Progress(**{name: restored.meta[name] for name in Progress._fields})
    this.workdir.cut_metrics(restored.step, validated=progress.validated)
    this.log(f"Going on at step {restored.step}, after epoch {progress.epoch}.")
    return restored.state, progress


def check_shared(directory: workdir.Workdir, ours: hosts.Hosts) -> None:
    """Every process must see one and the same directory: checkpoints are written by all of them.

    Raises:
      HostsError: some do not see what process 0 writes there.
    """
    if ours.count == 1:
        return
    token = ours.from_first(directory.token() if ours.leads else None)
    seen = directory.sees(token)
    everyone = ours.all_true(seen)
    if ours.leads:
        (directory.path / token).unlink()
    if not everyone:
        raise hosts.HostsError(
            f"--workdir={directory.path} is not the same directory for all processes"
            + ("" if seen else " (this one does not see what process 0 wrote there)")
            + ": use a disk that every machine mounts, or a bucket."
        )


def next_batch(batches: Any, interrupts: interrupt.Interrupts) -> batch_lib.Batch:
    """The next batch. Ctrl-C also reaches worker processes: their death is then no error."""
    try:
        return next(batches)
    except Exception:
        interrupts.check_here()
        raise


def judge(
    this: assessment.Run,
    progress: Progress,
    rows: list[retrieval.Row],
    measured: dict[str, float],
    at: int,
) -> Progress:
    """Writes the validation line and decides whether this epoch is the best so far."""
    alpha = this.config.eval.alpha
    if alpha is None or len(rows) == 2:  # without a local branch there is nothing to weigh
        alpha = retrieval.choose_alpha(rows)
    metrics = assessment.chosen_row(rows, alpha).metrics
    record = {"step": at, "epoch": progress.epoch, "split": splits.validation_name(this.config)}
    names = evaluate.METRICS
    this.workdir.write_metrics(
        record | {name: getattr(metrics, name) for name in names} | {"alpha": alpha} | measured
    )
    # Where validation people were trained on, their R@1 says nothing: the last epoch counts.
    everyone = this.config.train_on_all and this.config.eval.protocol == "val"
    score = float(progress.epoch) if everyone else metrics.R1
    progress = progress._replace(validated=True, score=score)
    better = progress.best_score is None or score > progress.best_score
    if better:
        progress = progress._replace(best_score=score, best_epoch=progress.epoch, best_alpha=alpha)
    this.log(
        f"epoch {progress.epoch}: {record['split']} R@1 {metrics.R1:.2f}  R@5 {metrics.R5:.2f}  "
        f"R@10 {metrics.R10:.2f}  mAP {metrics.mAP:.2f}  (α {alpha:g})" + ("  best" * better)
    )
    return progress


def describe(
    config: config_lib.Config,
    split: records.Split,
    last_step: int,
    template: step.TrainState,
    mesh: jax.sharding.Mesh,
) -> str:
    """One line on what is about to be trained on what."""
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(template.params)) / 1e6
    return (
        f"{split.dataset}: {len(split.captions)} pairs of {split.num_identities} identities; "
        f"{size:.1f} M parameters in {step.compute_dtype(config.precision).name}; "
        f"{last_step} steps of {config.batch_size} pairs on {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s)."
    )
