"""Draws a chart from documents of `python -m itself_jax.bench … --sweep=… --json=FILE`.

    python benchmarks/growth.py growth.png batch.json gallery.json …

Needs matplotlib; takes sweeps over numbers, not those of `compare`. One panel for each swept key
and job: time against value, both on logarithmic scales, with the measured range, a line of slope 1
through the first point where time grows, and the fitted exponent.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(target: str, *documents: str) -> None:
    panels: dict[tuple[str, str], list[tuple[float, dict]]] = {}
    exponents = {}
    for path in documents:
        document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        for row in document["rows"]:
            for key, value in row["changed"].items():
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    continue
                panels.setdefault((row["name"], key), []).append((value, row))
        for found in document["growth"]:
            exponents[found["name"], found["key"]] = found["exponent"]
    if not panels:
        sys.exit("growth.py: no sweep over numbers in " + (", ".join(documents) or "no document"))
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((name, key), points) in zip(axes.flat, panels.items(), strict=False):
        points.sort(key=lambda point: point[0])
        values = [value for value, _ in points]
        seconds = [row["seconds"]["median"] for _, row in points]
        low = [row["seconds"]["median"] - row["seconds"]["min"] for _, row in points]
        high = [row["seconds"]["max"] - row["seconds"]["median"] for _, row in points]
        axis.errorbar(values, seconds, yerr=(low, high), fmt="o-", color="#1f5f8b", capsize=3)
        if seconds[-1] > seconds[0]:  # of what makes a step smaller, linear says nothing
            linear = [seconds[0] * value / values[0] for value in values]
            axis.plot(values, linear, ":", color="#777777", label="linear")
            axis.legend(frameon=False, fontsize=9)
        axis.set(xscale="log", yscale="log", xlabel=key, ylabel="seconds")
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axis.set_yticks(seconds, [f"{second:.2g}" for second in seconds], minor=False)
        axis.minorticks_off()
        exponent = exponents.get((name, key))
        axis.set_title(name + ("" if exponent is None else f": {key}^{exponent:.2f}"), fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("growth.py: expected TARGET.png and documents of bench: see its first lines")
    main(*sys.argv[1:])
