"""Our programs beside those of the PyTorch twin: same weights, same input, same threads, in turn.

Each side is a process of its own that waits for its turn. In one process the two would disturb each
other: OpenMP's threads go on spinning for a while after torch has finished, on the cores that ours
then need, and memory could not be told apart. The process that asks them does nothing meanwhile.

    python -m itself_jax.comparing       our side: reads what to do from its input, as the twin does
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from itself_jax import command as command_lib
from itself_jax import config as config_lib
from itself_jax import dialects, retrieval, step, timing, workloads

PARTS = ("train", "images", "captions", "eval")
MODES = ("lean", "published")
_OURS = "ours"
# Relative, of the first call's losses, norms or mAP: more is another computation, not rounding.
_SAME = {"float32": 1e-2, "bfloat16": 1e-1}


class Twin(NamedTuple):
    """Where the other side is: `folder` holds `twin.py`; `python` runs it; compiled or not."""

    folder: pathlib.Path
    python: str = sys.executable
    compile: bool = False


def find_twin(python: str = "", compile_: bool = False) -> Twin:
    """The twin of this checkout; it is no part of the package.

    Raises:
      WorkloadError: it is not there, or `python` (default: this one) has no torch.
    """
    folder = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "twin.py").is_file():
        raise workloads.WorkloadError(
            f"{folder / 'twin.py'} is missing: compare needs a checkout of the project, since the "
            "twin is no part of the package"
        )
    python = python or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", "import importlib.util as u; print(u.find_spec('torch') is not None)"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except OSError as error:
        raise workloads.WorkloadError(f"{python} cannot be started: {error.strerror}") from error
    if done.stdout.strip() != "True":
        raise workloads.WorkloadError(
            f"{python} has no torch: pip install 'itself_jax[bench]', or name another Python with "
            "--twin_python"
        )
    return Twin(folder, python, compile_)


def compare(
    config: config_lib.Config,
    settings: workloads.Settings,
    part: str,
    mode: str,
    twin: Twin,
    *,
    repeats: int,
    warmup: int,
    threads: int,
    scratch: pathlib.Path,
) -> dict[str, Any]:
    """Times one part, ours and the twin's in turn: one row of the document.

    The side that begins changes with every repeat; before each timed call comes one that does not
    count. `scratch` is a folder for this configuration: it keeps the weights for the next part.

    Raises:
      ConfigError: settings that the twin does not have.
      WorkloadError: a side failed, or the two computed different things.
    """
    spec = _spec(config, settings, part, mode, twin, threads, scratch)
    with (
        _Side([sys.executable, "-m", "itself_jax.comparing"], _OURS, scratch) as ours,
        _Side([twin.python, str(twin.folder / "twin_worker.py")], "the twin", scratch) as theirs,
    ):
        # Ours first: it writes the weights.
        prepared = ours.ask(spec)
        spec |= prepared  # platform, precision, matmul_size
        facts = theirs.ask(spec)
        first = [side.ask({})["check"] for side in (ours, theirs)]
        difference = _difference(*first)
        if not difference <= _SAME[prepared["precision"]]:
            raise workloads.WorkloadError(
                f"{part}, mode {mode}: the two sides compute different things ({first[0][:3]} and "
                f"{first[1][:3]}), so that no ratio would mean anything"
            )
        for _ in range(warmup - 1):
            for side in (ours, theirs):
                side.ask({})
        samples: dict[_Side, list[float]] = {ours: [], theirs: []}
        for turn in range(repeats):
            for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                side.ask({})  # what the other one left of caches and free memory is no part of it
                answer = side.ask({})
                samples[side].append(answer["seconds"])
                side.peak = answer["peak"]
        row = ours.ask({"row": samples[ours]})["row"]
    seconds = timing.spread(samples[theirs])
    ratios = timing.spread([a / b for a, b in zip(*samples.values(), strict=True)])
    return {
        "name": row["name"],
        "mode": mode,
        "threads": threads,
        "ours": row,
        "twin": {
            "seconds": _plain(seconds),
            "per_second": row["amount"] / seconds.median,
            "peak_resident_bytes": theirs.peak,
            "matmul_gflops": {"float32": facts["matmul_gflops"]},
            "compiled": twin.compile,
            "torch": facts["torch"],
        },
        "ratio": _plain(ratios),
        "difference": difference,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as aligned lines; quartiles of the ratio in brackets."""
    header = ("what", "mode", "ours", "twin", "ours/twin", "(quartiles)", "n")
    lines = [(*header, "ours resident", "twin resident", "matmul, ours", "twin's", "share")]
    for row in rows:
        ours, theirs, ratio = row["ours"], row["twin"], row["ratio"]
        changed = (f"{key}={value}" for key, value in row["changed"].items())
        lines.append(
            (
                " ".join([row["name"], *changed]),
                row["mode"],
                f"{ours['seconds']['median']:.4g} s",
                f"{theirs['seconds']['median']:.4g} s",
                f"{ratio['median']:.3f}",
                f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})",
                str(ratio["count"]),
                f"{ours['peak_resident_bytes'] / 1e9:.2f} GB",
                f"{theirs['peak_resident_bytes'] / 1e9:.2f} GB",
                f"{ours['matmul_gflops']['float32']:.4g} GFLOP/s",
                f"{theirs['matmul_gflops']['float32']:.4g} GFLOP/s",
                workloads.shown(ours["share_of_matmul"], "{:.0%}"),
            )
        )
    return timing.aligned(lines)


def _plain(spread: timing.Spread) -> dict[str, Any]:
    return {**spread._asdict(), "samples": list(spread.samples)}


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative one; infinite where there are not equally many numbers."""
    a, b = np.array(ours), np.array(theirs)
    if a.shape != b.shape:
        return float("inf")
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-12)))


class _Side:
    """One of the two processes: answers each line of JSON with one."""

    def __init__(self, command: Sequence[str], name: str, scratch: pathlib.Path):
        self.peak: int | None = None
        self._name, self._log = name, scratch / f"{name.replace(' ', '-')}.log"
        package = str(pathlib.Path(__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ) if name == _OURS else command_lib.users_environment()
        self._errors = self._log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join(paths),
                # Two processes share one card.
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
        )

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *error: object) -> None:
        # Not asked politely: an error may have come in the middle of a long call.
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        line = ""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            text = self._log.read_text(encoding="utf-8", errors="replace").strip()
            last = text.splitlines()[-1] if text else "it said nothing"
            raise workloads.WorkloadError(f"{self._name} ended with exit code {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise workloads.WorkloadError(f"{self._name} failed: {answer['error']}")
        return answer


# --- what both are told ---------------------------------------------------------------------------


def _spec(
    config: config_lib.Config,
    settings: workloads.Settings,
    part: str,
    mode: str,
    twin: Twin,
    threads: int,
    scratch: pathlib.Path,
) -> dict[str, Any]:
    method, sizes, training = _as_the_twin_has_it(config, settings)
    # A process of one device: the twin knows no mesh.
    config = config_lib.replace(config, {"mesh.data": 1, "mesh.model": 1})
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    inputs = scratch / "inputs.npz"
    np.savez(inputs, **_inputs(config, settings, part))
    return {
        "part": part,
        "mode": mode,
        "cpus": (allowed or list(range(threads)))[:threads],
        "config": config_lib.to_dict(config),
        "settings": settings._asdict(),
        "inputs": str(inputs),
        "weights": str(scratch / "weights.npz"),
        "method": method,
        "sizes": sizes,
        "training": training,
        "image_mean": step.IMAGE_MEAN,
        "image_std": step.IMAGE_STD,
        "alphas": _alphas(config),
        "batch_size": config.eval.batch_size,
        "block_bytes": config.eval.chunk_mb << 20,
        "compile": twin.compile,
    }


def _alphas(config: config_lib.Config) -> list[float]:
    """The weights of `retrieval.rank`'s rows, in its order."""
    return [1.0, 0.0, *retrieval.FUSION_ALPHAS] if config.local.enabled else [1.0]


def _as_the_twin_has_it(
    config: config_lib.Config, settings: workloads.Settings
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The twin's `Settings`, `Sizes` and `Trainer` arguments.

    Raises:
      ConfigError: a setting that it does not have.
    """
    published = config_lib.Loss()
    for key, value, only in (
        ("loss.temperature", config.loss.temperature, published.temperature),
        ("loss.margin", config.loss.margin, published.margin),
        ("freeze_layers", config.freeze_layers, 0),
        ("local.ats_per_epoch", config.local.ats_per_epoch, False),
    ):
        if value != only:
            raise config_lib.ConfigError(
                f"config.{key}={value!r}: the twin has {only!r} only, so compare needs it too"
            )
    for key in ("saliency", "inference_saliency"):
        if getattr(config.local, key).startswith("min_"):
            raise config_lib.ConfigError(
                f"config.local.{key}={getattr(config.local, key)!r}: the twin does not have it"
            )
    local, model = config.local, config.model
    horizon = step.horizon_steps(
        local.ats_horizon_steps, (workloads.STEPS_PER_EPOCH,) * config.num_epochs
    )
    method = {
        "local": local.enabled,
        "saliency": local.saliency,
        "inference_saliency": local.inference_saliency,
        "mars_layers": local.mars_layers,
        "mars_discard": local.mars_discard,
        "ats": local.ats,
        "ats_horizon_steps": horizon,
        "ratio_start": local.ratio_start,
        "ratio_end": local.ratio_end,
        "ratio": local.ratio,
        "mismatch_label": config.loss.mismatch_label,
    }
    names = ("patch_size", "image_size", "text_length", "vocab_size", "embed_dim")
    towers = [f"{tower}_{x}" for tower in ("vision", "text") for x in ("width", "depth", "heads")]
    sizes = {name: getattr(model, name) for name in (*names, *towers)}
    sizes |= {
        "stride": model.stride or model.patch_size,
        "local_dim": local.dim,
        "num_identities": settings.identities,
        "activation": model.activation or config_lib.CLIP_ACTIVATION,
    }
    training = {
        "learning_rate": config.optim.learning_rate,
        "local_learning_rate": config.optim.local_learning_rate,
        "weight_decay": config.optim.weight_decay,
        "eps": config.optim.eps,
        "num_epochs": config.num_epochs,
        "warmup_epochs": config.warmup_epochs,
    }
    return method, sizes, training


def _inputs(
    config: config_lib.Config, settings: workloads.Settings, part: str
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if part == "train":
        return workloads.random_batch(config, settings.identities)._asdict()
    if part in ("images", "captions"):
        rows = workloads.encoder_rows(part, config.eval.batch_size)
        generate = workloads.random_pixels if part == "images" else workloads.random_captions
        return {part: generate(config, rows, random)}
    found = workloads.random_embeddings(config, settings)._asdict()
    return {name: x for name, x in found.items() if x is not None}


# --- our side -------------------------------------------------------------------------------------


class _Array(NamedTuple):
    """A weight as `dialects.write` takes it."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self) -> np.ndarray:
        return self.values


def write_weights(
    config: config_lib.Config, settings: workloads.Settings, path: pathlib.Path
) -> None:
    """The weights with which a run of this seed begins, under the published names, as npz."""
    made, _, _ = workloads.make_training(config, settings)

    def fresh() -> dict[str, Any]:
        state = made.init(config.seed)
        return {"params": state.params, "batch_stats": state.batch_stats}

    arrays = {
        "/".join(key.key for key in path): _Array(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(fresh)())
    }
    named, _ = dialects.write(arrays, dialects.ITSELF)
    np.savez(path, **{name: array.read() for name, array in named.items()})


def prepare(spec: Mapping[str, Any]) -> workloads.Job:
    """Our job of a part, on the inputs that the twin gets too."""
    config = config_lib.from_dict(spec["config"])
    settings = workloads.Settings(**spec["settings"])
    with np.load(spec["inputs"]) as archive:
        arrays = {name: archive[name] for name in archive.files}
    part = spec["part"]
    if part == "eval":
        fields = retrieval.Embeddings._fields
        found = retrieval.Embeddings(**{name: arrays.get(name) for name in fields})
        return workloads.ranking(config, settings, found)
    if not (weights := pathlib.Path(spec["weights"])).exists():
        write_weights(config, settings, weights)
    if part == "train":
        return workloads.training(config, settings, workloads.batch_lib.Batch(**arrays))
    return workloads.encoder(config, settings, part, arrays[part])


def _check(part: str, output: Any) -> list[float]:
    """A call's result in few numbers, as the twin gives them."""
    if part == "train":
        return [float(output.loss)]
    if part == "eval":
        return [row.metrics.mAP for row in output]
    # Of all batches together: their order and their bounds may differ.
    joined = jax.tree.map(lambda *parts: np.concatenate([np.asarray(x) for x in parts]), *output)
    return [float(np.linalg.norm(x.astype(np.float32))) for x in jax.tree.leaves(joined)]


def main(read: Callable[[], str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers one line after another, until there is no more."""
    spec = json.loads(read())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec["cpus"])  # XLA makes as many threads, when it starts
    config = config_lib.from_dict(spec["config"])
    machine = {"float32": timing.matmul_gflops("float32")}
    precision = step.compute_dtype(config.precision).name
    if precision != "float32":
        machine[precision] = timing.matmul_gflops(precision)
    job = prepare(spec)
    timing.reset_peak()
    size = timing.matmul_size()
    answer({"platform": jax.default_backend(), "precision": precision, "matmul_size": size})
    while line := read():
        if samples := json.loads(line).get("row"):
            peaks = timing.peak_resident_bytes(), timing.peak_device_bytes()
            row = workloads.row_of(job, timing.spread(samples), machine, *peaks)
            answer({"row": row})
            continue
        done = timing.timed(job.call)
        peak, check = timing.peak_resident_bytes(), _check(spec["part"], done.output)
        answer({"seconds": done.seconds, "check": check, "peak": peak})


def _serve() -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        main(sys.stdin.readline, answer)
    except Exception as error:
        expected = isinstance(error, (ValueError, RuntimeError, OSError))
        answer({"error": f"{'' if expected else type(error).__name__ + ': '}{error}"})


if __name__ == "__main__":
    _serve()
