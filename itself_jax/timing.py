"""How something is measured: repeated calls, their statistics, memory, and what the machine can do.

No number of a program stands without one of the machine that ran it: `matmul_gflops` is measured in
the same process, moments before.
"""

import contextlib
import os
import pathlib
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_PACKAGES = ("itself_jax", "jax", "jaxlib", "flax", "numpy")


class Spread(NamedTuple):
    """Statistics of repeated measurements, in their unit; quartiles are interpolated."""

    count: int
    median: float
    min: float
    max: float
    lower_quartile: float
    upper_quartile: float
    samples: tuple[float, ...]  # in the order measured


def spread(samples: Sequence[float]) -> Spread:
    """Statistics of at least one sample.

    Raises:
      ValueError: there is none.
    """
    if not samples:
        raise ValueError("statistics need at least one sample, got none")
    lower, upper = np.quantile(samples, [0.25, 0.75]).tolist()
    return Spread(
        count=len(samples),
        median=float(statistics.median(samples)),
        min=float(min(samples)),
        max=float(max(samples)),
        lower_quartile=lower,
        upper_quartile=upper,
        samples=tuple(map(float, samples)),
    )


class Timed(NamedTuple):
    """Wall seconds of one call, and what it returned."""

    seconds: float
    output: Any


def timed(call: Callable[[], Any]) -> Timed:
    """One call, until everything that it returns is computed."""
    before = time.perf_counter()
    output = jax.block_until_ready(call())
    return Timed(time.perf_counter() - before, output)


def measure(call: Callable[[], Any], *, repeats: int, warmup: int) -> Spread:
    """Seconds of `repeats` calls, after `warmup` calls that do not count."""
    for _ in range(warmup):
        timed(call)
    return spread([timed(call).seconds for _ in range(repeats)])


def exponent(values: Sequence[float | int], medians: Sequence[float]) -> float | None:
    """Slope of log(median) against log(value), by least squares: 1 is linear growth.

    None where it means nothing: fewer than two different values, or one that is not positive.
    """
    if len(set(values)) < 2 or min(*values, *medians) <= 0:
        return None
    return float(np.polyfit(np.log(values), np.log(medians), 1)[0])


# --- memory ---------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Lets `peak_resident_bytes` begin anew, where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident_bytes(process: int | None = None) -> int | None:
    """Most memory that a process has held since `reset_peak`, else since it began.

    process: its id; None: this one. The answer is None of another one where there is no /proc.
    """
    with contextlib.suppress(OSError):
        path = pathlib.Path("/proc") / str(process or "self") / "status"
        if found := re.search(r"VmHWM:\s*(\d+) kB", path.read_text(encoding="utf-8")):
            return int(found[1]) * 1024
    if process is not None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """Most memory in use on the fullest device since the process began; None: it does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


# --- the machine ----------------------------------------------------------------------------------


def matmul_size() -> int:
    """Rows of the matrices whose product tells what the machine can do."""
    if jax.default_backend() != "cpu":
        return 8192
    return 1024 if cpus() <= 8 else 2048  # enough work for all threads, and done in a moment


def matmul_gflops(dtype: str, *, size: int | None = None, repeats: int = 5) -> float:
    """What one device reaches in a product of two square matrices, GFLOP/s; median of `repeats`.

    All threads of a CPU work on it. A multiplication and an addition count as two operations.

    Args:
      dtype: of the matrices; float32 products are full float32 ones also where TF32 is usual.
      size: rows; None: `matmul_size()`.
    """
    size = size or matmul_size()
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return 2 * size**3 / measure(lambda: product(a, b), repeats=repeats, warmup=2).median / 1e9


def cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Devices and host, as the documents of `bench` have them."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "device_kind": first.device_kind,
        "devices": len(jax.devices()),
        "host": platform.machine(),
        "cpus": cpus(),
    }


def versions(*more: str) -> dict[str, str | None]:
    """Of Python and the packages that matter; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@contextlib.contextmanager
def trace(folder: str | os.PathLike | None) -> Iterator[None]:
    """Writes what runs inside as a trace for XProf and Perfetto; None: does nothing."""
    if folder is None:
        yield
        return
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield


# --- tables ---------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
