"""What `bench` measures: the very programs of a run, on generated input, as calls to be repeated.

A `Job` is ready: compiled, its input in place. `measure` times it and returns a row of the document
that docs/performance.md describes.
"""

import contextlib
import dataclasses
import importlib
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import aot, command, files, fitting, retrieval, sharding, step, timing
from itself_jax import config as config_lib
from itself_jax.data import batch as batch_lib
from itself_jax.models import itself

# Words of a caption of CUHK-PEDES as its authors describe the set: 23.5 on average, 96 at most.
_WORDS, _MOST_WORDS = 23.5, 96
_SIGMA = 0.35  # of the logarithm: captions of half and of twice the average are rare
_BATCHES = 4  # of the pipeline in one measurement: it works ahead, so that a single one may be free
# The same epoch length for every size, so that a schedule counted in epochs does not change.
STEPS_PER_EPOCH = 1000
_BATCHES_OF_CAPTIONS = 8  # so that short and long ones come in shares like those of a data set
_START_SECONDS = 1800


class WorkloadError(RuntimeError):
    """Something that is needed is not there, or a program that was started failed."""


class Settings(NamedTuple):
    """What is measured beside the configuration.

    identities: classes of the identity heads. queries, gallery: captions and pictures ranked.
    streamed: captions rank pictures that are made when they are read, and not the reverse.
    """

    identities: int = 11003
    queries: int = 6156
    gallery: int = 3074
    streamed: bool = False


class Job(NamedTuple):
    """A call to be repeated.

    unit, amount: what one call works through. devices: that share it. flops, accessed: operations
    and bytes of one call on all of them together; None: not known. counted: who says so.
    temporary: bytes a device needs beside input and output. peak: most memory held by whoever does
    the work.
    """

    name: str
    unit: str
    amount: int
    call: Callable[[], Any]
    dtype: str | None = None
    flops: float | None = None
    accessed: float | None = None
    counted: str | None = None
    temporary: int | None = None
    compile_seconds: float | None = None
    warmup: int | None = None  # None: as asked for
    devices: int = 1
    traced: bool = True  # whether a trace of this process shows the work
    peak: Callable[[], int | None] = timing.peak_resident_bytes


Maker = Callable[[], Job]
SCHEMA = 1  # of the documents; raised when a key changes its meaning


def measure(
    job: Job, *, repeats: int, warmup: int, profile: pathlib.Path | None = None
) -> dict[str, Any]:
    """Times a job: one row of the document. `profile`: folder for a trace of two further calls."""
    machine = {"float32": timing.matmul_gflops("float32")}
    if job.dtype not in (None, "float32"):
        machine[job.dtype] = timing.matmul_gflops(job.dtype)
    timing.reset_peak()
    seconds = timing.measure(
        job.call, repeats=repeats, warmup=warmup if job.warmup is None else job.warmup
    )
    row = row_of(job, seconds, machine, job.peak(), timing.peak_device_bytes())
    if profile is not None and job.traced:
        # After the timed calls, which tracing would slow down.
        with timing.trace(profile / job.name.replace(" ", "-")):
            for _ in range(2):
                jax.block_until_ready(job.call())
    return row


def row_of(
    job: Job,
    seconds: timing.Spread,
    machine: dict[str, float],
    peak_resident: int | None,
    peak_device: int | None,
) -> dict[str, Any]:
    """A row of the document, from what was measured.

    machine: the matmul GFLOP/s of one device by number type; float32 and the job's own at least.
    """
    device = jax.devices()[0]
    chip = aot.chip_of(device.device_kind)
    # Virtual devices of a CPU share its cores, on all of which its product was measured.
    devices = 1 if device.platform == "cpu" else job.devices
    gflops = None if job.flops is None else job.flops / seconds.median / 1e9
    peak_flops = None if chip is None else chip.flops * devices
    return {
        "name": job.name,
        "unit": job.unit,
        "amount": job.amount,
        "devices": job.devices,
        "seconds": {**seconds._asdict(), "samples": list(seconds.samples)},
        "per_second": job.amount / seconds.median,
        "compile_seconds": job.compile_seconds,
        "peak_resident_bytes": peak_resident,
        "peak_device_bytes": peak_device,
        "temporary_bytes": job.temporary,
        "flops": job.flops,
        "bytes_accessed": job.accessed,
        "flops_counted_by": job.counted,
        "dtype": job.dtype,
        "gflops": gflops,
        "matmul_gflops": machine,
        "share_of_matmul": (
            None if gflops is None else gflops / (devices * machine[job.dtype or "float32"])
        ),
        "peak_flops": peak_flops,
        "mfu": None if gflops is None or peak_flops is None else gflops * 1e9 / peak_flops,
    }


def makers(
    name: str, config: config_lib.Config, settings: Settings, scratch: pathlib.Path
) -> list[Maker]:
    """What makes the jobs of a command, one after another: each holds a model in memory."""
    if name == "train":
        return [lambda: training(config, settings)]
    if name == "encode":
        return [
            lambda: encoder(config, settings, "images"),
            lambda: encoder(config, settings, "captions"),
        ]
    if name == "eval":
        return [lambda: ranking(config, settings)]
    if name == "data":
        return reading(config)
    if name == "startup":
        return starting(config, scratch)
    raise ValueError(f"no jobs for {name!r}")


def require_data_libraries() -> None:
    """Raises WorkloadError where what reads pictures is not installed."""
    try:
        importlib.import_module("itself_jax.data.pipeline")
    except ImportError as error:
        raise WorkloadError(
            f"reading data needs the data libraries, and {error.name or error} is not installed: "
            "pip install -r requirements.txt"
        ) from error


def growth(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the time of each job grew over the values of a sweep: {name, key, exponent}.

    Empty without a sweep over numbers. 1 is linear; of a comparison, our side.
    """
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        name = row["name"] + (f", mode {row['mode']}" if "mode" in row else "")
        for key, value in row["changed"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                seconds = row.get("ours", row)["seconds"]["median"]
                series.setdefault((name, key), []).append((float(value), seconds))
    found = []
    for (name, key), points in series.items():
        slope = timing.exponent([x for x, _ in points], [y for _, y in points])
        if slope is not None:
            found.append({"name": name, "key": key, "exponent": slope})
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as aligned lines; what is not known is a dash."""
    header = ("what", "median", "min", "max", "n", "rate", "resident", "device", "TFLOP")
    lines = [(*header, "GFLOP/s", "matmul", "share", "MFU")]
    for row in rows:
        seconds = row["seconds"]
        matmul = row["matmul_gflops"][row["dtype"] or "float32"]
        changed = (f"{key}={value}" for key, value in row["changed"].items())
        lines.append(
            (
                " ".join([row["name"], *changed]),
                *(f"{seconds[x]:.4g} s" for x in ("median", "min", "max")),
                str(seconds["count"]),
                f"{row['per_second']:.4g} {row['unit']}/s",
                shown(row["peak_resident_bytes"], "{:.2f} GB", 1e9),
                shown(row["peak_device_bytes"], "{:.2f} GB", 1e9),
                shown(row["flops"], "{:.4g}", 1e12),
                shown(row["gflops"], "{:.4g}"),
                f"{matmul:.4g}",
                shown(row["share_of_matmul"], "{:.0%}"),
                shown(row["mfu"], "{:.1%}"),
            )
        )
    return timing.aligned(lines)


def shown(value: float | None, form: str, unit: float = 1) -> str:
    """A number in a unit; a dash for None."""
    return "-" if value is None else form.format(value / unit)


# --- generated input ------------------------------------------------------------------------------


def random_batch(config: config_lib.Config, identities: int, *, seed: int = 0) -> batch_lib.Batch:
    """Random pictures and captions of realistic lengths, `num_instances` pairs of an identity.

    Raises:
      ConfigError: fewer identities than a batch holds.
    """
    b, people = config.batch_size, config.batch_size // config.num_instances
    if identities < people:
        raise config_lib.ConfigError(
            f"--identities={identities}: config.batch_size={b} holds {people} identities; give at "
            "least as many, or a smaller batch"
        )
    random = np.random.default_rng(seed)
    pids = np.repeat(random.permutation(identities)[:people], config.num_instances)
    return batch_lib.Batch(
        images=random_pixels(config, b, random),
        erase=np.zeros((b, 4), np.int32),
        captions=random_captions(config, b, random),
        pids=pids.astype(np.int32),
        epoch=np.array(1, np.int32),
    )


def random_pixels(config: config_lib.Config, rows: int, random: np.random.Generator) -> np.ndarray:
    """(rows, H, W, 3) uint8."""
    return random.integers(0, 256, (rows, *config.model.image_size, 3), dtype=np.uint8)


def random_captions(
    config: config_lib.Config, rows: int, random: np.random.Generator
) -> np.ndarray:
    """(rows, t) int32: SOT, random words as many as captions of pedestrians have, EOT, pads."""
    model = config.model
    ids = np.zeros((rows, model.text_length), np.int32)
    start, end = model.vocab_size - 2, model.vocab_size - 1
    mean = math.log(_WORDS) - _SIGMA**2 / 2  # of a lognormal distribution with this average
    counts = random.lognormal(mean, _SIGMA, rows).round().astype(int)
    for row, count in zip(ids, counts.clip(1, _MOST_WORDS), strict=True):
        count = min(count, model.text_length - 2)
        row[: count + 2] = [start, *random.integers(1, start, count), end]
    return ids


def random_embeddings(config: config_lib.Config, settings: Settings) -> retrieval.Embeddings:
    """Of widths `model.embed_dim` and `local.dim`; three pictures of an identity.

    Every caption has a picture, as in the benchmarks, and every picture one, if there are enough.
    """
    random, q, g = np.random.default_rng(0), settings.queries, settings.gallery
    image_ids = np.arange(g) // 3
    text_ids = random.permutation(np.arange(q) % (image_ids[-1] + 1))

    def of_width(rows: int, width: int) -> np.ndarray:
        return random.standard_normal((rows, width), np.float32)

    def of_pictures(width: int, seed: int) -> Any:
        return _Generated(g, width, seed) if settings.streamed else of_width(g, width)

    embed, local = config.model.embed_dim, config.local.dim
    has_local = config.local.enabled
    return retrieval.Embeddings(
        text_global=of_width(q, embed),
        text_local=of_width(q, local) if has_local else None,
        image_global=of_pictures(embed, 1),
        image_local=of_pictures(local, 2) if has_local else None,
        text_ids=text_ids,
        image_ids=image_ids,
    )


class _Generated:
    """Random rows that are made when a slice of them is read: any number of them, in no memory."""

    _ROWS = 4096  # of one seed

    def __init__(self, rows: int, width: int, seed: int):
        self.shape, self._seed = (rows, width), seed

    def __getitem__(self, chosen: slice) -> np.ndarray:
        start, stop, _ = chosen.indices(self.shape[0])
        first, last = start // self._ROWS, -(-stop // self._ROWS)
        made = [
            np.random.default_rng([self._seed, i]).standard_normal(
                (self._ROWS, self.shape[1]), np.float32
            )
            for i in range(first, last)
        ]
        rows = made[0] if len(made) == 1 else np.concatenate(made)
        return rows[start - first * self._ROWS : stop - first * self._ROWS]


# --- programs -------------------------------------------------------------------------------------


def make_training(
    config: config_lib.Config, settings: Settings
) -> tuple[step.Training, jax.sharding.Mesh, step.TrainState]:
    """What a run sets up: programs, devices, and shapes and places of the state."""
    training = step.make(
        config,
        num_identities=settings.identities,
        steps_per_epoch=(STEPS_PER_EPOCH,) * config.num_epochs,
    )
    mesh = sharding.make_mesh(config)
    return training, mesh, step.state_template(training, mesh)


def training(
    config: config_lib.Config, settings: Settings, batch: batch_lib.Batch | None = None
) -> Job:
    """The train step, its state donated from call to call; returns the step's metrics.

    batch: of NumPy arrays; None: a random one.
    """
    if batch is None:
        batch = random_batch(config, settings.identities)
    made, mesh, template = make_training(config, settings)
    compiled, seconds = _compiled(lambda: step.compile_step(made, template, mesh))
    program = _program("train step", compiled, mesh, config.batch_size, template.params)
    state = step.init_state(made, template, config.seed)
    placed = sharding.shard_batch(mesh, batch)

    def call() -> step.StepMetrics:
        nonlocal state
        with jax.transfer_guard("disallow"):
            state, metrics = compiled(state, placed)
            # The state too: metrics are ready before the last parameters are.
            jax.block_until_ready(state)
        return metrics

    return _job("train step", "pairs", config.batch_size, call, config, program, mesh, seconds)


def encoder(
    config: config_lib.Config, settings: Settings, side: str, inputs: np.ndarray | None = None
) -> Job:
    """An encoder as evaluation calls it; returns the embeddings of each batch.

    side: "images" or "captions". inputs: pixels or token ids of `encoder_rows`; None: random ones.
    """
    made, mesh, template = make_training(config, settings)
    b = sharding.eval_batch_size(config, mesh)
    if inputs is None:
        generate = random_pixels if side == "images" else random_captions
        inputs = generate(config, encoder_rows(side, b), np.random.default_rng(0))
    places = _encoder_variables(template)

    def compile_it(length: int | None) -> Any:
        if length is None:
            return step.compile_image_encoder(made, places, mesh)
        return step.compile_text_encoder(made, places, mesh, length)

    groups: list[tuple[int | None, np.ndarray]] = [(None, inputs)]
    if side == "captions":
        lengths = itself.caption_lengths(config.model, config.local)
        found = batch_lib.group_captions(inputs, lengths, b)
        groups = [(group.length, inputs[group.rows, : group.length]) for group in found]
    compiled, seconds = _compiled(lambda: {length: compile_it(length) for length, _ in groups})
    variables = jax.jit(
        lambda: _encoder_variables(made.init(config.seed)),
        out_shardings=jax.tree.map(lambda x: x.sharding, places),
    )()
    batches = [
        (compiled[length], sharding.shard_batch(mesh, rows[start : start + b]))
        for length, rows in groups
        for start in range(0, len(rows), b)
    ]
    # Of one call: all batches, one after another.
    counts = {length: -(-len(rows) // b) for length, rows in groups}
    programs = {
        length: _program(f"encode {side}", x, mesh, b, template.params)
        for length, x in compiled.items()
    }

    def call() -> list[itself.Embedding]:
        with jax.transfer_guard("disallow"):
            return [encode(variables, rows) for encode, rows in batches]

    unit = "pictures" if side == "images" else "captions"
    program = max(programs.values(), key=lambda program: program.temporary)

    def total(name: str) -> float | None:
        each = [(counts[length], getattr(one, name)) for length, one in programs.items()]
        return None if any(x is None for _, x in each) else sum(n * x for n, x in each)

    program = dataclasses.replace(program, flops=total("flops"), accessed=total("accessed"))
    return _job(f"encode {side}", unit, len(inputs), call, config, program, mesh, seconds)


def encoder_rows(side: str, batch_size: int) -> int:
    """Rows of one measurement: a batch of pictures, as they are all alike; more of captions."""
    return batch_size * (_BATCHES_OF_CAPTIONS if side == "captions" else 1)


def ranking(
    config: config_lib.Config,
    settings: Settings,
    embeddings: retrieval.Embeddings | None = None,
) -> Job:
    """`retrieval.rank` under every fusion weight, both directions unless streamed; its rows."""
    if embeddings is None:
        embeddings = random_embeddings(config, settings)
    mesh = sharding.make_mesh(config)

    directions = retrieval.DIRECTIONS[: 1 if settings.streamed else 2]

    def call() -> list[retrieval.Row]:
        return retrieval.rank(
            embeddings,
            directions=directions,
            chunk_bytes=config.eval.chunk_mb << 20,
            mesh=mesh,
        )

    width = config.model.embed_dim + (config.local.dim if config.local.enabled else 0)
    return Job(
        "evaluate",
        "queries",
        settings.queries + (0 if settings.streamed else settings.gallery),
        call,
        dtype="float32",
        devices=mesh.size,
        # The compiler counts one block. Only the similarities of each direction multiply. A call
        # that makes its pictures, for each reading anew, does much else.
        flops=None
        if settings.streamed
        else 2.0 * len(directions) * settings.queries * settings.gallery * width,
        counted=None if settings.streamed else "similarity products",
    )


def _encoder_variables(state: step.TrainState) -> dict[str, Any]:
    return fitting.encoders_only({"params": state.params, "batch_stats": state.batch_stats})


def _compiled(compile_it: Callable[[], Any]) -> tuple[Any, float]:
    before = time.perf_counter()
    return compile_it(), time.perf_counter() - before


def _program(name: str, compiled: Any, mesh: Any, batch_size: int, params: Any) -> aot.Program:
    return aot.measure(name, compiled, devices=mesh.size, batch_size=batch_size, weights=params)


def _job(
    name: str,
    unit: str,
    amount: int,
    call: Callable[[], Any],
    config: config_lib.Config,
    program: aot.Program,
    mesh: jax.sharding.Mesh,
    compile_seconds: float,
) -> Job:
    def everywhere(count: float | None) -> float | None:
        return None if count is None else float(count) * mesh.size

    return Job(
        name,
        unit,
        amount,
        call,
        dtype=step.compute_dtype(config.precision).name,
        flops=everywhere(program.flops),
        accessed=everywhere(program.accessed),
        counted=None if program.flops is None else "compiler",
        temporary=program.temporary,
        devices=mesh.size,
        compile_seconds=compile_seconds,
    )


# --- reading data ---------------------------------------------------------------------------------


def reading(config: config_lib.Config) -> list[Maker]:
    """The pipeline of a run: training batches, augmented; and the test pictures of an evaluation.

    Raises:
      WorkloadError, ConfigError, DataError: no libraries, no data.
    """
    require_data_libraries()
    # Imported late: no other job needs the data libraries.
    from itself_jax import splits
    from itself_jax.data import pipeline, tokenizer

    def quiet(line: str) -> None:
        del line

    model = config.model

    def batches() -> Job:
        split = splits.read(config, config.dataset, "train", quiet)
        words = tokenizer.Tokenizer(model.text_length, vocab_size=model.vocab_size)
        stream = splits.stream(config, split, words)
        return _endless("train batches", "pairs", config.batch_size, stream.batches)

    def pictures() -> Job:
        split = splits.read(config, config.dataset, "test", quiet)
        size = min(config.eval.batch_size, len(split.images))

        def start() -> Iterator[Any]:
            return pipeline.image_batches(split, image_size=model.image_size, batch_size=size)

        return _endless("test pictures", "pictures", size, start)

    return [batches, pictures]


def _endless(name: str, unit: str, rows: int, start: Callable[[], Iterator[Any]]) -> Job:
    """A job that takes the next batches of an iterator, and starts it anew at its end."""
    iterator = start()

    def following() -> Any:
        nonlocal iterator
        try:
            return next(iterator)
        except StopIteration:
            iterator = start()
            return next(iterator)

    def call() -> int:
        for _ in range(_BATCHES):
            following()
        return _BATCHES

    return Job(name, unit, _BATCHES * rows, call, traced=False)


# --- starting -------------------------------------------------------------------------------------


def starting(config: config_lib.Config, scratch: pathlib.Path) -> list[Maker]:
    """The command of a run, from its start to the first step's metrics on the disk.

    First with no compiled program kept anywhere, then with those of the last first start. The data
    set is there already: generating it is no part of starting.

    Raises:
      WorkloadError, ConfigError, DataError: no libraries, no data.
    """
    require_data_libraries()
    from itself_jax import splits

    def quiet(line: str) -> None:
        del line

    splits.read(config, config.dataset, "train", quiet)
    settings = config_lib.flatten(config_lib.to_dict(config)) | {"log_every": 1}
    program = scratch / "started.py"
    program.write_text(
        "from itself_jax import config as config_lib\n\n\ndef get_config():\n"
        "    config = config_lib.default()\n    with config.ignore_type():\n"
        f"        config.update_from_flattened_dict({settings!r})\n    return config\n",
        encoding="utf-8",
    )
    cache = scratch / "compiled"

    def job(name: str, first: bool) -> Job:
        peaks: list[int | None] = []

        def start() -> None:
            if first:
                shutil.rmtree(cache, ignore_errors=True)
            workdir = scratch / "run"
            try:
                peaks.append(_first_step(program, workdir, cache))
            finally:
                files.remove(workdir)

        def peak() -> int | None:
            return max((peak for peak in peaks if peak is not None), default=None)

        return Job(name, "starts", 1, start, warmup=0, traced=False, peak=peak)

    return [lambda: job("first start", True), lambda: job("second start", False)]


def _first_step(config: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path) -> int | None:
    """Runs the command until a step's metrics are written; returns its peak resident bytes."""
    program = [sys.executable, "-m", "itself_jax.main", f"--config={config}"]
    said, metrics = config.with_suffix(".log"), workdir / "metrics.jsonl"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*program, f"--workdir={workdir}", f"--compile_cache={cache}"],
            env=command.users_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers end with it
        )
        deadline, peak = time.monotonic() + _START_SECONDS, None
        try:
            while not _has_line(metrics) and process.poll() is None:
                if time.monotonic() > deadline:
                    raise WorkloadError(f"the run made no step within {_START_SECONDS} s")
                time.sleep(0.01)
            peak = timing.peak_resident_bytes(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                # Not politely: it would save a checkpoint first.
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    if not _has_line(metrics):
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise WorkloadError(
            f"`{' '.join(program[1:3])}` made no step (exit code {code}): "
            f"{lines[-1] if lines else 'it said nothing'}"
        )
    return peak


def _has_line(path: pathlib.Path) -> bool:
    try:
        return b"\n" in path.read_bytes()
    except FileNotFoundError:
        return False
