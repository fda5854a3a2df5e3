"""A run's directory: whose it is, its configuration, and its metrics.

Files are written under a temporary name and renamed, except `metrics.jsonl`, which grows by whole
lines and is cut back to the restored step when a run goes on.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import tensorboardX

from itself_jax import config as config_lib

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "itself_jax")
_CONFIG = "config.json"
FROM_WEIGHTS = "sizes_from_weights"  # its entry on what `init_from` decided
_METRICS = "metrics.jsonl"
_FINISHED = "finished.json"


class WorkdirError(RuntimeError):
    """The work directory cannot be used; the message is one sentence for the user."""


class Workdir:
    """Opens (or makes) a run's directory.

    Raises:
      WorkdirError: it cannot be written, holds something else, or another configuration.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self._tensorboard: tensorboardX.SummaryWriter | None = None

    def claim(self, config: config_lib.Config, compute_dtype: str, log: Any) -> None:
        """Makes the directory, or checks that it is ours and that its configuration agrees.

        Writes nothing: a start that fails later leaves it free for another configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entries = [e.name for e in self.path.iterdir() if not e.name.startswith(".tmp-")]
        except OSError as error:
            raise self._unusable(error) from error
        if _CONFIG in entries:
            self._check_same(config, compute_dtype, log)
        elif entries:
            raise WorkdirError(
                f"{self.path} is not empty and holds no {_CONFIG} (found {sorted(entries)[0]!r}): "
                "it belongs to something else; give another --workdir."
            )

    def describe(
        self,
        config: config_lib.Config,
        compute_dtype: str,
        sizes_from_weights: Sequence[str] = (),
    ) -> None:
        """Writes `config.json`: from here on the directory belongs to this configuration."""
        self.write_json(
            _CONFIG,
            {
                "config": config_lib.to_dict(config),
                "compute_dtype": compute_dtype,
                FROM_WEIGHTS: list(sizes_from_weights),
                "versions": _versions(),
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "git_revision": _git_revision(),
            },
        )

    def saved_config(self) -> dict[str, Any] | None:
        """`config.json` as it stands, or None.

        Raises:
          WorkdirError: the file is there but is not ours.
        """
        path = self.path / _CONFIG
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(saved["config"], dict):
                raise TypeError("'config' is not an object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkdirError(
                f"{path} is not a configuration of itself_jax ({error!r}): "
                "give another --workdir, or remove the file to start anew."
            ) from error
        return saved

    def finished(self) -> dict[str, Any] | None:
        """What a finished run left behind, or None."""
        try:
            return json.loads((self.path / _FINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete; the very last thing it writes."""
        self.write_json(_FINISHED, summary)

    def write_json(self, name: str, content: Any) -> pathlib.Path:
        """Writes a file of this directory atomically.

        Raises:
          WorkdirError: the disk is full or the directory cannot be written.
        """
        path = self.path / name
        temporary = path.with_name(f".tmp-{name}")
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unusable(error) from error
        return path

    def cut_metrics(self, step: int, *, validated: bool) -> None:
        """Drops every metric line beyond `step`, and half a last line, before a run goes on.

        validated: whether the restored state includes the validation at `step`.
        """
        path = self.path / _METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] < step or (
                record["step"] == step and (validated or "split" not in record)
            ):
                kept.append(line + "\n")
        temporary = path.with_name(f".tmp-{_METRICS}")
        try:
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unusable(error) from error

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl` and its numbers to the TensorBoard events.

        Raises:
          WorkdirError: the disk is full or the directory cannot be written.
        """
        try:
            with (self.path / _METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self._tensorboard is None:
                # Events after the restored step, from before a kill, are hidden by the purge.
                self._tensorboard = tensorboardX.SummaryWriter(
                    str(self.path / "tensorboard"), purge_step=record["step"]
                )
            prefix = record.get("split", "train")
            for key, value in record.items():
                if key not in ("step", "epoch", "split"):
                    self._tensorboard.add_scalar(f"{prefix}/{key}", value, record["step"])
        except OSError as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _check_same(self, config: config_lib.Config, compute_dtype: str, log: Any) -> None:
        saved = self.saved_config()
        changed = config_lib.differences(saved["config"], config)
        refused = {
            key: values
            for key, values in changed.items()
            if key in config_lib.UNCHANGEABLE
            or not any(
                key == name or (name.endswith(".") and key.startswith(name))
                for name in config_lib.CHANGEABLE
            )
        }
        if refused:
            listed = "; ".join(
                f"{key} was {old!r}, now {new!r}" for key, (old, new) in refused.items()
            )
            raise WorkdirError(
                f"{self.path} holds a run with another configuration: {listed}. "
                "Give another --workdir, or the configuration that it was started with."
            )
        for key, (old, new) in changed.items():
            log(f"Going on with config.{key} = {new!r} (was {old!r}).")
        if saved.get("compute_dtype", compute_dtype) != compute_dtype:
            log(f"Going on in {compute_dtype} (was {saved['compute_dtype']}), as the device says.")

    def _unusable(self, error: OSError) -> WorkdirError:
        return WorkdirError(
            f"Work directory {self.path} cannot be written ({error.strerror or error}): "
            "free some space or give another --workdir."
        )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str | None:
    """The revision of the checkout that this package runs from; None outside of one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
