"""The twin's half of `python -m itself_jax.bench compare`: a process that is told what to time.

It reads lines of JSON from its input and answers each with one. The first says what to prepare (as
`itself_jax/comparing.py` writes it); each further one is a call. Nothing of `itself_jax` is
imported, so that any Python with torch will do.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import sys
import time


def main() -> None:
    # What torch prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        spec = json.loads(sys.stdin.readline())
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, spec["cpus"])
        os.environ["OMP_NUM_THREADS"] = str(len(spec["cpus"]))
        call, facts = prepare(spec)
        reset_peak()
        answer(**facts)
        for _ in sys.stdin:
            before = time.perf_counter()
            check = call()
            answer(seconds=time.perf_counter() - before, check=check(), peak=peak_resident_bytes())
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")


def prepare(spec: dict):
    """Returns the call, which returns what gives its result in numbers, and facts of this side."""
    import numpy as np
    import torch

    torch.set_num_threads(len(spec["cpus"]))
    device = torch.device("cuda" if spec["platform"] in ("gpu", "cuda") else "cpu")
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matmul_gflops": matmul_gflops(torch, device, spec["matmul_size"]),
    }
    with np.load(spec["inputs"]) as archive:
        arrays = {name: archive[name] for name in archive.files}

    def done() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    if spec["part"] == "eval":
        import twin_ranking

        texts, images = (
            twin_ranking.Side(
                tensor(arrays[f"{side}_global"]),
                tensor(arrays[f"{side}_local"]) if f"{side}_local" in arrays else None,
                tensor(arrays[f"{side}_ids"]),
            )
            for side in ("text", "image")
        )

        def ranked():
            rows = twin_ranking.rank(
                texts, images, spec["alphas"], spec["mode"], block_bytes=spec["block_bytes"]
            )
            done()
            return lambda: [row.mAP for row in rows]

        return ranked, facts

    import twin as twin_lib

    sizes = {**spec["sizes"], "image_size": tuple(spec["sizes"]["image_size"])}
    settings = dict(spec["method"])
    if settings["mars_layers"] is not None:
        settings["mars_layers"] = tuple(settings["mars_layers"])
    model = twin_lib.Twin(twin_lib.Sizes(**sizes), twin_lib.Settings(**settings), spec["mode"])
    with np.load(spec["weights"]) as archive:
        state = {name: torch.from_numpy(archive[name]) for name in archive.files}
    missing, unexpected = model.load_state_dict(state, strict=False)
    # BatchNorm's counter is no weight.
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"weights do not fit the twin: missing {missing}, unknown {unexpected}")
    del state
    model.to(device)
    dtype = getattr(torch, spec["precision"])
    if "images" in arrays:
        mean, std = (np.array(spec[x], np.float32) for x in ("image_mean", "image_std"))
        pixels = (arrays["images"].astype(np.float32) / 255 - mean) / std
        pixels = tensor(pixels.transpose(0, 3, 1, 2))
    if "captions" in arrays:
        ids = tensor(arrays["captions"].astype(np.int64))

    if spec["part"] == "train":
        trainer = twin_lib.Trainer(model, precision=dtype, **spec["training"])
        if spec["compile"]:
            model.compile()
        pids, steps = tensor(arrays["pids"].astype(np.int64)), iter(range(1, 10**9))

        def step():
            metrics = trainer.train_step(pixels, ids, pids, next(steps), 1)
            done()
            return lambda: [float(metrics.loss)]

        return step, facts

    encode, rows = (
        (model.encode_image, pixels) if spec["part"] == "images" else (model.encode_text, ids)
    )
    if spec["compile"]:
        encode = torch.compile(encode)

    def encoded():
        reduced = dtype != torch.float32
        with torch.autocast(device.type, dtype=dtype, enabled=reduced):
            found = [encode(part) for part in rows.split(spec["batch_size"])]
        done()
        sides = [torch.cat(parts) for parts in zip(*found, strict=True) if parts[0] is not None]
        return lambda: [float(x.float().norm()) for x in sides]

    return encoded, facts


def matmul_gflops(torch, device, size: int, repeats: int = 5) -> float:
    """Median GFLOP/s of a float32 product, as `itself_jax.timing` measures its own."""
    a, b = torch.randn(2, size, size, device=device)
    seconds = []
    for _ in range(repeats + 2):
        before = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / sorted(seconds[2:])[repeats // 2] / 1e9


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"VmHWM:\s*(\d+) kB", text):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
