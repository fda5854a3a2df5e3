"""The main job: train, validate, save, resume, and test the best checkpoint once."""

import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import (
    checkpoint,
    evaluate,
    fitting,
    hosts,
    interrupt,
    retrieval,
    sharding,
    step,
    weights,
    workdir,
)
from itself_jax import config as config_lib
from itself_jax import meter as meter_lib
from itself_jax.data import batch as batch_lib
from itself_jax.data import datasets, pipeline, records, remote, synthetic, tokenizer
from itself_jax.models import itself

Log = Callable[[str], None]
ALONE = hosts.Hosts()


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


class Run(NamedTuple):
    """What is set up once and then only used."""

    config: config_lib.Config
    workdir: workdir.Workdir
    mesh: jax.sharding.Mesh
    training: step.Training
    tokenizer: tokenizer.Tokenizer
    encoders: tuple[Callable[..., Any], Callable[..., Any]]
    interrupts: interrupt.Interrupts
    ours: hosts.Hosts
    log: Log


def run(
    config: config_lib.Config,
    path: str | os.PathLike,
    interrupts: interrupt.Interrupts,
    ours: hosts.Hosts = ALONE,
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
    ours.agree({"--mode": "train", "--workdir": str(path), **facts(config)})
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
        return

    train_split = read_split(config, config.dataset, "train", log)
    validation_split = read_split(config, config.dataset, validation_name(config), log)
    # Read now, used at the end: hours of training must not end at a misspelt folder.
    test_splits = read_test_splits(config, log)
    ours.agree(data_facts([train_split, validation_split, *test_splits], pretrained))
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    stream = pipeline.TrainStream(
        train_split,
        words,
        image_size=config.model.image_size,
        batch_size=config.batch_size,
        num_instances=config.num_instances,
        num_epochs=config.num_epochs,
        seed=config.seed,
        augment_image=config.augment.image,
        augment_caption=config.augment.text,
        augment_pad=config.augment.pad,
        num_workers=config.num_workers,
        shard=sharding.host_rows(mesh),
    )
    # Everything is compiled before the first step, so that no later signal meets a compiler.
    with interrupts.compilation():
        training = step.make(
            config,
            num_identities=train_split.num_identities,
            steps_per_epoch=stream.steps_per_epoch,
        )
        template = step.state_template(training, mesh)
        if pretrained is not None:  # a compiler's minute is too long to wait for a misfit
            fitting.check(pretrained, variables_of(template), config.model)
        ends = np.cumsum(stream.steps_per_epoch)  # the last step of each epoch
        last_step = int(ends[(config.last_epoch or config.num_epochs) - 1])
        log(describe(config, train_split, last_step, template, mesh))
        if mesh.size > 1:
            for line in sharding.describe(
                sharding.place(mesh, template, config.sharding), template
            ):
                log(line)
        encoders = step.compile_encoders(training, encoder_variables(template), mesh)
        train_step = step.compile_step(training, template, mesh)
    this = Run(config, directory, mesh, training, words, encoders, interrupts, ours, log)

    with checkpoint.Checkpoints(directory.checkpoints, log=log, ours=ours) as checkpoints:
        directory.hold(config, compute_dtype)
        with interrupts.compilation():
            state, progress = restore_or_init(this, checkpoints, template, pretrained)
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
                        rows = encode_and_rank(
                            this, encoder_variables(state), validation_split, config.eval.alpha
                        )
                        progress = judge(this, progress, rows, meter.step)
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
        variables = fitting.fit(best, encoder_variables(template), config.model, log)
        test(this, variables, alpha, test_splits, best.protocol)
    directory.finish({"step": last_step, "best_epoch": best.meta["epoch"]})
    log(f"Finished in {meter_lib.clock(time.monotonic() - started)}: {directory.path / 'results'}")


def evaluate_only(
    config: config_lib.Config,
    path: str | os.PathLike,
    interrupts: interrupt.Interrupts,
    ours: hosts.Hosts = ALONE,
) -> None:
    """`--mode=eval`: tests the best checkpoint of `path`, or the weights of `config.init_from`.

    The sizes of the model are those of the weights. The fusion weight is `eval.alpha`, else the one
    chosen in training, else (weights of other programs do not say) chosen here as `eval.protocol`
    says.

    Raises:
      ConfigError, DataError, WorkdirError, WeightsError, WeightFileError, CheckpointError: one
        sentence each.
      Interrupted: a signal came.
    """
    log = meter_lib.print_line if ours.leads else lambda line: None
    directory = workdir.Workdir(path, writes=ours.leads)
    ours.agree({"--mode": "eval", "--workdir": str(path), **facts(config)})
    if config.init_from is None or started_from(directory, config.init_from):
        best = weights.of_run(directory.path, log, ours)
    else:
        best = weights.open_(config.init_from, log, ours)
    fitting.say_replaced(config, best.sizes, best.source, log)
    config = fitting.resolve(config, best, log, training=False)
    mesh = sharding.make_mesh(config)
    test_splits = read_test_splits(config, log)
    alpha = best.meta.get("best_alpha") if config.eval.alpha is None else config.eval.alpha
    if not config.local.enabled:
        alpha = 1.0
    chooses = alpha is None
    if chooses:
        validation_split = read_split(config, config.dataset, validation_name(config), log)
    ours.agree(data_facts([*test_splits, *([validation_split] if chooses else [])], best))
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    with interrupts.compilation():
        # Classifiers are not needed, so no data set's identities are.
        training = step.make(config, num_identities=1, steps_per_epoch=(1,) * config.num_epochs)
        template = encoder_variables(step.state_template(training, mesh))
        variables = fitting.fit(best, template, config.model, log)
        encoders = step.compile_encoders(training, template, mesh)
    this = Run(config, directory, mesh, training, words, encoders, interrupts, ours, log)
    ours.barrier("ready to evaluate")
    with interrupts.checked_work():
        if chooses:
            alpha = retrieval.choose_alpha(encode_and_rank(this, variables, validation_split, None))
            log(f"The fusion weight α = {alpha:g} is chosen on {validation_name(config)}.")
        log(f"Testing {describe_weights(best)}.")
        test(this, variables, alpha, test_splits, best.protocol or config.eval.protocol)


def started_from(directory: workdir.Workdir, source: str) -> bool:
    """Whether the directory holds a run from these weights, whose own are then meant."""
    saved = directory.saved_config()
    return saved is not None and saved["config"].get("init_from") == source


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


def describe_weights(found: weights.Weights) -> str:
    """Which weights are tested, for the log."""
    epoch = found.meta.get("epoch")
    where = f"epoch {epoch} of {found.source}" if epoch is not None else str(found.source)
    if found.protocol is not None:
        return where
    return f"{where} ({found.kind}; who trained it chose the epoch, the published code on test)"


def read_split(config: config_lib.Config, dataset: str, split: str, log: Log) -> records.Split:
    """One split; the embedded data set is generated when its cache folder is not there yet.

    Query captions are all of a picture's, or its first one with `eval.captions="single"`; training
    always uses all.
    """
    root = config.data_root
    if dataset == "synthetic":
        root = synthetic_folder(config, log)
    elif root is None:
        raise config_lib.ConfigError(
            f"config.data_root is not set: dataset {dataset!r} needs the folder that holds the "
            "benchmark's own folder (jsonl: the file of own data or its folder)."
        )
    found = datasets.read(
        dataset,
        root,
        split,
        image_size=config.model.image_size,
        # The reference, which validates on test, holds nobody out.
        train_on_all=config.train_on_all or holds_nobody_out(config, dataset),
    )
    single = split != "train" and config.eval.captions == "single"
    return found.single_caption() if single else found


def holds_nobody_out(config: config_lib.Config, dataset: str) -> bool:
    """Whether the identities that would become `val` are trained on, as by the reference."""
    return config.eval.protocol == "paper" and dataset == "icfg_pedes"


def read_test_splits(config: config_lib.Config, log: Log) -> list[records.Split]:
    """The test splits of the run's own and the further data sets."""
    names = dict.fromkeys((config.dataset, *config.eval_datasets))
    return [read_split(config, name, "test", log) for name in names]


def synthetic_folder(config: config_lib.Config, log: Log) -> pathlib.Path:
    """The embedded data set's cache folder, under `data_root` or the user's cache folder."""
    root = pathlib.Path(config.data_root) if config.data_root else remote.user_cache()
    return synthetic.ensure(
        root.expanduser(),
        seed=config.synthetic.seed,
        identities=config.synthetic.identities,
        images_per_identity=config.synthetic.images_per_identity,
        log=log,
    )


def validation_name(config: config_lib.Config) -> str:
    """The split that chooses epoch and fusion weight; the reference chooses them on test."""
    return "test" if config.eval.protocol == "paper" else "val"


def how_chosen(config: config_lib.Config) -> str:
    """How the tested epoch came about, for the log."""
    if config.eval.protocol == "paper":
        return "chosen on the test split itself, as the reference does"
    if config.train_on_all:
        return "the last one: nothing was left to validate on"
    return "the best on val"


def variables_of(state: step.TrainState) -> dict[str, Any]:
    """What weights of another run replace."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def encoder_variables(state: step.TrainState) -> dict[str, Any]:
    """What the encoders read: everything but the classifiers."""
    return fitting.encoders_only(variables_of(state))


def restore_or_init(
    this: Run,
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
            fresh = variables_of(state)
            model = this.config.model
            fitted = fitting.fit(pretrained, variables_of(template), model, this.log, fresh=fresh)
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


def facts(config: config_lib.Config) -> dict[str, Any]:
    """Settings and code, which must be the same in every process of a run, by name."""
    own = ("data_root", "num_workers", "distributed.")  # of a machine
    settings = config_lib.flatten(config_lib.to_dict(config))
    found = {f"config.{key}": x for key, x in settings.items() if not key.startswith(own)}
    return found | hosts.code_facts()


def data_facts(
    splits: Sequence[records.Split], pretrained: weights.Weights | None
) -> dict[str, Any]:
    """What every process must have read alike, by name."""
    found = {}
    for split in splits:
        people = zlib.crc32(np.ascontiguousarray(split.caption_ids, np.int64).tobytes())
        words = zlib.crc32("\n".join(split.captions).encode())
        found[f"data {split.dataset} {split.split}"] = (
            f"{len(split.captions)} captions, {len(split.images)} pictures, checksum "
            f"{words ^ people:08x}"
        )
    if pretrained is not None:
        checksum = 0
        for name, array in sorted(pretrained.arrays.items()):
            checksum = zlib.crc32(f"{name} {array.shape}".encode(), checksum)
            if name.endswith(("projection", "skip/kernel")):  # of megabytes, and trained
                checksum = zlib.crc32(np.ascontiguousarray(array.read()).tobytes(), checksum)
        found["checksum of the weights"] = f"{checksum:08x}"
    return found


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


def encode_and_rank(
    this: Run, variables: dict[str, Any], split: records.Split, alpha: float | None
) -> list[retrieval.Row]:
    """Encodes a split once and ranks it in both directions; checks for signals on the way.

    alpha: a fusion weight that must be among the rows, beside the usual ones.
    """
    config = this.config
    encode_images, encode_captions = this.encoders
    rows = sharding.host_rows(this.mesh)
    batch_size = sharding.eval_batch_size(config, this.mesh)
    embeddings = evaluate.encode_corpus(
        lambda pixels: encode_images(variables, pixels),
        lambda ids: encode_captions(variables, ids),
        pipeline.image_batches(
            split,
            image_size=config.model.image_size,
            batch_size=batch_size,
            shard=rows,
        ),
        pipeline.caption_batches(
            split,
            this.tokenizer,
            batch_size=batch_size,
            lengths=itself.caption_lengths(config.model, config.local),
            shard=rows,
        ),
        split=split,
        should_stop=this.interrupts.check,
        place=lambda batch: sharding.shard_batch(this.mesh, batch),
    )
    if config.eval.dump_embeddings and this.ours.leads:
        evaluate.dump_embeddings(this.workdir.path, split, embeddings)
    alphas = retrieval.FUSION_ALPHAS
    if alpha is not None:
        alphas = (*alphas, alpha)
    return retrieval.rank(
        embeddings, alphas=alphas, chunk_bytes=config.eval.chunk_mb << 20, mesh=this.mesh
    )


def judge(this: Run, progress: Progress, rows: list[retrieval.Row], at: int) -> Progress:
    """Writes the validation line and decides whether this epoch is the best so far."""
    alpha = this.config.eval.alpha
    if alpha is None or len(rows) == 2:  # without a local branch there is nothing to weigh
        alpha = retrieval.choose_alpha(rows)
    metrics = chosen_row(rows, alpha).metrics
    record = {"step": at, "epoch": progress.epoch, "split": validation_name(this.config)}
    names = evaluate.METRICS
    this.workdir.write_metrics(
        record | {name: getattr(metrics, name) for name in names} | {"alpha": alpha}
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


def chosen_row(rows: list[retrieval.Row], alpha: float) -> retrieval.Row:
    """The text→image row of one fusion weight."""
    return next(row for row in rows if row.direction == "t2i" and row.alpha == alpha)


def test(
    this: Run,
    variables: dict[str, Any],
    alpha: float,
    splits: Sequence[records.Split],
    protocol: str,
) -> None:
    """Tests on each data set, writes and prints the tables.

    protocol: by which epoch and weight were chosen, whatever the configuration says now.
    """
    config = this.config
    if not config.local.enabled:
        alpha = 1.0
    for split in splits:
        extra = {"captions": config.eval.captions}
        if split.dataset == "synthetic" and config.eval.captions == "all":
            extra["oracle_R1"] = synthetic.oracle_rank1(synthetic_folder(config, this.log), "test")
        rows = encode_and_rank(this, variables, split, alpha)
        summary = evaluate.results(
            rows,
            dataset=split.dataset,
            split="test",
            queries=len(split.captions),
            gallery=len(split.image_paths),
            protocol=protocol,
            chosen_alpha=alpha,
            extra=extra,
        )
        if this.ours.leads:
            evaluate.write_results(this.workdir.path, summary)
        this.log(evaluate.format_table(summary))


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
