"""What a model can do: encoded and ranked splits, the test, the report, and `--mode=eval`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from itself_jax import (
    checkpoint,
    evaluate,
    files,
    fitting,
    hosts,
    interrupt,
    retrieval,
    sharding,
    splits,
    step,
    watching,
    weights,
    workdir,
)
from itself_jax import config as config_lib
from itself_jax import meter as meter_lib
from itself_jax.data import masks, pipeline, records, remote, synthetic, tokenizer
from itself_jax.models import itself

Log = Callable[[str], None]
ALONE = hosts.Hosts()


class Tested(NamedTuple):
    """A split that was ranked, with what ranked it."""

    split: records.Split
    embeddings: retrieval.Embeddings
    alpha: float


class Run(NamedTuple):
    """What is set up once and then only used."""

    config: config_lib.Config
    workdir: workdir.Workdir
    mesh: jax.sharding.Mesh
    training: step.Training
    tokenizer: tokenizer.Tokenizer
    encoders: tuple[Callable[..., Any], Callable[..., Any]]
    watcher: watching.Watcher | None  # of the split to look at: val in training, else the shown one
    interrupts: interrupt.Interrupts
    ours: hosts.Hosts
    log: Log


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
    is_own = config.init_from is None or started_from(directory, config.init_from)
    if is_own:
        best = weights.of_run(directory.path, log, ours)
    else:
        if config.init_from in weights.SHIPPED:
            log(f"{path} holds no run: the weights that come with the package are tested.")
        best = weights.open_(config.init_from, log, ours)
    fitting.say_replaced(config, best.sizes, best.source, log)
    config = fitting.resolve(config, best, log, training=False)
    mesh = sharding.make_mesh(config)
    test_splits = splits.read_tests(config, log)
    alpha = best.meta.get("best_alpha") if config.eval.alpha is None else config.eval.alpha
    if not config.local.enabled:
        alpha = 1.0
    chooses = alpha is None
    validation_split = None
    if chooses:
        validation_split = splits.read(config, config.dataset, splits.validation_name(config), log)
    ours.agree(splits.facts([*test_splits, *([validation_split] if chooses else [])], best))
    this, variables = ready(config, directory, mesh, best, test_splits[0], interrupts, ours, log)
    ours.barrier("ready to evaluate")
    with interrupts.checked_work():
        if chooses:
            rows, _ = encode_and_rank(this, variables, validation_split, None)
            alpha = retrieval.choose_alpha(rows)
            log(f"The fusion weight α = {alpha:g} is chosen on {splits.validation_name(config)}.")
        log(f"Testing {describe_weights(best)}.")
        protocol = best.protocol or config.eval.protocol
        whose = of_weights(best, None if is_own else config.init_from)
        tested = test(this, variables, alpha, test_splits, protocol, whose)
        watched = _followed(config, directory, log) if is_own else None
        report(this, variables, tested, watched, is_own=is_own)


def started_from(directory: workdir.Workdir, source: str) -> bool:
    """Whether the directory holds a run whose own weights are meant, rather than `source`.

    So of a run from these weights, and of every run where they come with the package: a
    configuration then names them as a start, not as what to test.
    """
    saved = directory.saved_config()
    return saved is not None and (
        source in weights.SHIPPED or saved["config"].get("init_from") == source
    )


def describe_weights(found: weights.Weights) -> str:
    """Which weights are tested, for the log."""
    epoch = found.meta.get("epoch")
    where = f"epoch {epoch} of {found.source}" if epoch is not None else str(found.source)
    if found.protocol is not None:
        return where
    return f"{where} ({found.kind}; who trained it chose the epoch, the published code on test)"


def of_weights(found: weights.Weights, named: str | None) -> dict[str, Any]:
    """Whose weights a result is of, for its file.

    named: as `init_from` names them; None: the weights of the directory's own run.
    """
    return {"source": named, "step": found.meta.get("iteration")}


def variables_of(state: step.TrainState) -> dict[str, Any]:
    """What weights of another run replace."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def encoder_variables(state: step.TrainState) -> dict[str, Any]:
    """What the encoders read: everything but the classifiers."""
    return fitting.encoders_only(variables_of(state))


def facts(config: config_lib.Config) -> dict[str, Any]:
    """Settings and code, which must be the same in every process of a run, by name."""
    own = ("data_root", "num_workers", "distributed.")  # of a machine
    settings = config_lib.flatten(config_lib.to_dict(config))
    found = {f"config.{key}": x for key, x in settings.items() if not key.startswith(own)}
    return found | hosts.code_facts()


def encode(this: Run, variables: dict[str, Any], split: records.Split) -> retrieval.Embeddings:
    """Encodes a split once; checks for signals on the way."""
    config = this.config
    encode_images, encode_captions = this.encoders
    rows = sharding.host_rows(this.mesh)
    batch_size = sharding.eval_batch_size(config, this.mesh)
    return evaluate.encode_corpus(
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


def encode_and_rank(
    this: Run, variables: dict[str, Any], split: records.Split, alpha: float | None
) -> tuple[list[retrieval.Row], retrieval.Embeddings]:
    """Encodes a split once and ranks it in both directions; checks for signals on the way.

    alpha: a fusion weight that must be among the rows, beside the usual ones.
    """
    config = this.config
    embeddings = encode(this, variables, split)
    if config.eval.dump_embeddings and this.ours.leads:
        evaluate.dump_embeddings(this.workdir.path, split, embeddings)
    alphas = retrieval.FUSION_ALPHAS
    if alpha is not None:
        alphas = (*alphas, alpha)
    rows = retrieval.rank(
        embeddings, alphas=alphas, chunk_bytes=config.eval.chunk_mb << 20, mesh=this.mesh
    )
    return rows, embeddings


def watch(
    training: step.Training,
    variables: Any,
    mesh: jax.sharding.Mesh,
    split: records.Split,
    words: tokenizer.Tokenizer,
    interrupts: interrupt.Interrupts,
    truth: masks.Truth | None = None,
) -> watching.Watcher | None:
    """What follows the model's saliency on `split`; None where nothing is to be watched."""
    pairs = training.config.eval.watch
    if not pairs:
        return None
    return watching.Watcher(
        training,
        variables,
        mesh,
        split,
        words,
        truth=truth,
        pairs=pairs,
        should_stop=interrupts.check,
    )


def look(this: Run, variables: dict[str, Any], epoch: int) -> dict[str, float]:
    """Keeps what the model looks at after an epoch; measures it where there are masks."""
    if this.watcher is None:
        return {}
    pairs, measured = this.watcher.look(variables)
    if this.ours.leads:
        watching.save(this.workdir, epoch, pairs)
    return measured


def chosen_row(rows: list[retrieval.Row], alpha: float) -> retrieval.Row:
    """The text→image row of one fusion weight."""
    return next(row for row in rows if row.direction == "t2i" and row.alpha == alpha)


def test(
    this: Run,
    variables: dict[str, Any],
    alpha: float,
    test_splits: Sequence[records.Split],
    protocol: str,
    whose: dict[str, Any],
) -> Tested:
    """Tests on each data set, writes and prints the tables; returns the first one.

    protocol: by which epoch and weight were chosen, whatever the configuration says now.
    whose: what `of_weights` says of them.
    """
    config = this.config
    if not config.local.enabled:
        alpha = 1.0
    first = None
    for split in test_splits:
        extra: dict[str, Any] = {"captions": config.eval.captions, "weights": whose}
        if split.dataset == "synthetic" and config.eval.captions == "all":
            extra["oracle_R1"] = synthetic.oracle_rank1(
                splits.synthetic_folder(config, this.log), "test"
            )
        rows, embeddings = encode_and_rank(this, variables, split, alpha)
        extra["chance_R1"] = evaluate.chance_rank1(split)
        first = first or Tested(split, embeddings, alpha)
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
    return first


def report(
    this: Run,
    variables: dict[str, Any],
    tested: Tested,
    watched: records.Split | None,
    *,
    is_own: bool,
) -> None:
    """Writes `report/`, by the process that writes; what keeps it from that is said in the log.

    watched: the split whose pairs were followed in training, if it is at hand.
    is_own: the weights are those of the directory's own run.
    """
    if this.watcher is None:
        return
    try:
        from itself_jax.reporting import examples, history, writing
    except ImportError as error:  # a machine for training may lack what draws
        missing = str(error)
    else:
        missing = ""
    if not this.ours.all_true(not missing):  # they look at examples together
        reason = missing or "another process lacks what draws it"
        this.log(f"No report ({reason}): requirements.txt has all it needs.")
        return
    material = examples.gather(
        this.config,
        tested.split,
        tested.embeddings,
        tested.alpha,
        lambda split, captions: this.watcher.pairs(variables, split, captions),
        watched,
        should_stop=this.interrupts.check,
    )
    if not this.ours.leads:
        return
    try:
        evaluated = None if is_own else this.config
        path = writing.write(this.workdir.path, material, evaluated=evaluated)
    except history.ReportError as error:
        this.log(f"No report: {error}")
    else:
        this.log(f"Report: {path}")


def has_report(directory: workdir.Workdir) -> bool:
    """Whether `report` has written one there."""
    return (directory.path / "report" / "index.html").exists()


def report_only(path: str | os.PathLike, log: Log) -> files.Path:
    """`python -m itself_jax.report`: writes the report of a directory anew, on one device.

    The test split is shown of a finished run; of another one the split that it validates on, with
    the best weights so far. Without weights or data the report lacks what needs them, and says so;
    of single pictures that cannot be read it lacks them alone.

    Raises:
      ReportError: there is no run in the directory.
      OSError: the report cannot be written.
    """
    from itself_jax.reporting import examples, history, writing

    so_far = history.read(path)
    if so_far.running:  # it has the accelerators
        jax.config.update("jax_platforms", "cpu")
    directory = workdir.Workdir(path, writes=False)
    material, notes = None, ()
    try:
        best = weights.of_run(directory.path, log)
        changes = {"mesh.data": 1, "mesh.model": 1, "sharding": "replicated", "eval.watch": 1}
        changes |= {"precision": so_far.compute_dtype, "attention": "plain"}
        config = config_lib.replace(config_lib.from_dict(so_far.config), changes)
        config = fitting.resolve(config, best, lambda line: None, training=False)
        if so_far.finished:
            shown = splits.read(config, config.dataset, "test", log)
            watched = _followed(config, directory, log)
        else:
            shown = splits.read(config, config.dataset, splits.validation_name(config), log)
            watched = shown
        mesh = sharding.make_mesh(config, jax.local_devices()[:1])
        signals = interrupt.Interrupts()
        this, variables = ready(config, directory, mesh, best, shown, signals, ALONE, log)
        alpha = best.meta["best_alpha"] if config.eval.alpha is None else config.eval.alpha
        shown, embeddings, notes = _encode_readable(this, variables, shown)
        material = examples.gather(
            config,
            shown,
            embeddings,
            alpha if config.local.enabled else 1.0,
            lambda split, captions: this.watcher.pairs(variables, split, captions),
            watched,
        )
    except (
        config_lib.ConfigError,
        records.DataError,
        remote.CopyError,
        weights.WeightsError,
        checkpoint.CheckpointError,
    ) as error:
        notes = (f"No queries, answers and saliency are shown: {error}",)
    return writing.write(directory.path, material, notes=notes)


def _encode_readable(
    this: Run, variables: dict[str, Any], split: records.Split
) -> tuple[records.Split, retrieval.Embeddings, tuple[str, ...]]:
    """Encodes a split without the pictures that cannot be read; what is left, and a note of them.

    Results are of whole splits, which `encode` insists on; a report only shows some of a split.

    Raises:
      DataError: none can be read.
    """
    try:
        return split, encode(this, variables, split), ()
    except records.DataError:
        lost = [index for index in range(len(split.images)) if not _is_readable(this, split, index)]
        kept = sorted(set(range(len(split.images))) - set(lost))
        if not lost or not kept:
            raise
    names = ", ".join(split.image_paths[index] for index in lost[:10])
    note = (
        f"{len(lost)} of {len(split.images)} pictures of {split.dataset} {split.split} cannot be "
        f"read and are no queries and answers here, nor are their captions: {names}"
        f"{', …' if lost[10:] else ''}. Restore the files and write the report again."
    )
    left = split.with_pictures(kept)
    return left, encode(this, variables, left), (note,)


def _is_readable(this: Run, split: records.Split, index: int) -> bool:
    try:
        split.images.load(index, this.config.model.image_size)
    except records.DataError:
        return False
    return True


def _followed(
    config: config_lib.Config, directory: workdir.Workdir, log: Log
) -> records.Split | None:
    """The split whose pairs a training in this directory followed; None where there is none."""
    if not watching.saved(directory.path):
        return None
    try:
        return splits.read(config, config.dataset, splits.validation_name(config), log)
    except (records.DataError, remote.CopyError):  # a machine may have the test pictures alone
        return None


def ready(
    config: config_lib.Config,
    directory: workdir.Workdir,
    mesh: jax.sharding.Mesh,
    best: weights.Weights,
    watched: records.Split,
    interrupts: interrupt.Interrupts,
    ours: hosts.Hosts,
    log: Log,
    truth: masks.Truth | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Compiled encoders, and the weights that they run with; `truth` has `watched`'s masks."""
    words = tokenizer.Tokenizer(config.model.text_length, vocab_size=config.model.vocab_size)
    with interrupts.compilation():
        # Classifiers are not needed, so no data set's identities are.
        training = step.make(config, num_identities=1, steps_per_epoch=(1,) * config.num_epochs)
        template = encoder_variables(step.state_template(training, mesh))
        variables = fitting.fit(best, template, config.model, log)
        encoders = step.compile_encoders(training, template, mesh)
        watcher = watch(training, template, mesh, watched, words, interrupts, truth)
    this = Run(config, directory, mesh, training, words, encoders, watcher, interrupts, ours, log)
    return this, variables
