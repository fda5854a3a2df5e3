"""Step metrics: read back late, checked, written to the work directory and to the terminal."""

import math
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from itself_jax import config as config_lib
from itself_jax import step, workdir


class NonFiniteLossError(RuntimeError):
    """Training diverged; the message names the step and the file with the batch's pictures."""


class Meter:
    """Counts steps, reads their metrics back late, and reports them (on the terminal if `shows`).

    Metrics stay on the device until a report is due; then all but the newest step are read, so that
    the device always has one step queued.
    """

    def __init__(
        self,
        config: config_lib.Config,
        directory: workdir.Workdir,
        stream: Any,
        *,
        start: int,
        total: int,
        shows: bool = True,
    ) -> None:
        self.step = start
        self._total = total
        self._config = config
        self._workdir = directory
        self._stream = stream
        self._shows = shows
        self._pending: list[tuple[int, step.StepMetrics]] = []
        self._clock = time.monotonic()
        self._clocked_step = start
        self._rate = math.nan
        self._bar = tqdm.tqdm(
            total=total,
            initial=start,
            unit="step",
            disable=not (shows and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def restart_clock(self) -> None:
        """Counts time from here: validations and saves are not part of the training speed."""
        self._clock = time.monotonic()

    def record(self, metrics: step.StepMetrics) -> None:
        """Takes note of the step that was just queued."""
        self.step += 1
        self._pending.append((self.step, metrics))
        self._bar.update()
        if (self.step - 1) % self._config.log_every == 0 and len(self._pending) > 1:
            self._report(len(self._pending) - 1)

    def flush(self) -> None:
        """Reads, reports and writes everything that is pending; waits for the device."""
        self._report(len(self._pending))
        self._workdir.flush()

    def close(self) -> None:
        """Ends the progress bar and flushes the event files."""
        self._bar.close()
        self._workdir.close()

    def _report(self, count: int) -> None:
        due, self._pending = self._pending[:count], self._pending[count:]
        if not due:
            return
        values = read_metrics([metrics for _, metrics in due])
        now, last = time.monotonic(), due[-1][0]
        self._rate = (last - self._clocked_step) * self._config.batch_size / (now - self._clock)
        self._clock, self._clocked_step = now, last
        for (number, _), value in zip(due, values, strict=True):
            self._check_finite(number, value)
            if number % self._config.log_every == 0:
                self._write(number, value)

    def _write(self, number: int, value: step.StepMetrics) -> None:
        epoch = self._stream.epoch_of(number - 1)
        record = {"step": number, "epoch": epoch}
        record |= {name: x.item() for name, x in value._asdict().items()}
        self._workdir.write_metrics(record | {"pairs_per_second": round(self._rate, 2)})
        shown = {"epoch": epoch, "loss": f"{record['loss']:.3f}", "pairs/s": f"{self._rate:.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        if self._shows and self._bar.disable:
            left = (self._total - number) * self._config.batch_size / self._rate
            epochs = self._config.last_epoch or self._config.num_epochs
            print_line(
                f"epoch {epoch}/{epochs}  step {number}/"
                f"{self._total}  loss {record['loss']:.3f}  "
                f"{self._rate:.0f} pairs/s  ETA {clock(left)}"
            )

    def _check_finite(self, number: int, value: step.StepMetrics) -> None:
        if np.isfinite(value.loss) and np.isfinite(value.grad_norm):
            return
        path = self._workdir.write_json(
            f"nonfinite-step-{number}.json",
            {
                "step": number,
                "epoch": self._stream.epoch_of(number - 1),
                "loss": repr(float(value.loss)),
                "grad_norm": repr(float(value.grad_norm)),
                "images": self._stream.paths(number - 1),
            },
        )
        raise NonFiniteLossError(
            f"Step {number}: the loss is {float(value.loss)} and the gradient norm "
            f"{float(value.grad_norm)}; the batch's pictures are listed in {path}. The last good "
            "checkpoint is kept: look at the pictures, or lower config.optim.learning_rate."
        )


def read_metrics(metrics: list[step.StepMetrics]) -> list[step.StepMetrics]:
    """The one place where the loop waits for the device."""
    return jax.device_get(metrics)


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def print_line(text: str) -> None:
    """Prints above a progress bar, if there is one, and at once."""
    tqdm.tqdm.write(text)
    sys.stdout.flush()
