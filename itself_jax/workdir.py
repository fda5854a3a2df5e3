"""A run's directory: whose it is, its configuration, and its metrics.

Files appear as a whole, except `metrics.jsonl`, which grows by whole lines and is cut back to the
restored step when a run goes on. In a bucket, where no file can grow, it is written anew every
half-minute and at every validation; TensorBoard's events and the lock are on disks only.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import jax
import tensorboardX

from itself_jax import config as config_lib
from itself_jax import files
from itself_jax.data import remote

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "itself_jax")
_CONFIG = "config.json"
FROM_WEIGHTS = "sizes_from_weights"  # its entry on what `init_from` decided
_METRICS = "metrics.jsonl"
_FINISHED = "finished.json"
_LOCK = ".lock"
_UPLOAD_EVERY = 30.0  # seconds


class WorkdirError(RuntimeError):
    """The work directory cannot be used; the message is one sentence for the user."""


class Workdir:
    """Opens (or makes) a run's directory. All processes of a run see it; one of them `writes`.

    Raises:
      WorkdirError: it cannot be written, holds something else, or another configuration.
    """

    def __init__(self, path: str | os.PathLike, *, writes: bool = True) -> None:
        try:
            self.path = files.place(path)
        except OSError as error:
            raise WorkdirError(f"--workdir={error}; give another --workdir.") from error
        self._is_local = remote.is_local(self.path)
        self.checkpoints = self.path / "checkpoints"
        self._writes = writes
        self._lock: int | None = None
        self._unwritten: list[str] | None = None  # of metrics in a bucket: all of its lines
        self._uploaded, self._is_changed = 0.0, False
        self._tensorboard: tensorboardX.SummaryWriter | None = None

    def claim(self, config: config_lib.Config, compute_dtype: str, log: Any) -> None:
        """Makes the directory, or checks that it is ours and that its configuration agrees.

        One that is ours is locked against other runs until `release` or the end of this process.
        Writes nothing else: a start that fails later leaves it free for another configuration.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            entries = [
                e.name
                for e in (self.path.iterdir() if self.path.exists() else ())
                if not e.name.startswith(".tmp-") and e.name != _LOCK
            ]
        if _CONFIG in entries:
            self._take_lock()
            try:
                changed = self._check_same(config, compute_dtype)
            except WorkdirError:
                self.release()
                raise
            for line in changed:
                log(line)
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
        """Locks it and writes `config.json`: from here on it belongs to this configuration."""
        self._take_lock()
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
            with files.reaching(path):
                saved = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(saved["config"], dict):
                raise TypeError("'config' is not an object")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error, "read") from error
        except (ValueError, KeyError, TypeError) as error:
            raise WorkdirError(
                f"{path} is not a configuration of itself_jax ({error!r}): "
                "give another --workdir, or remove the file to start anew."
            ) from error
        return saved

    def finished(self) -> dict[str, Any] | None:
        """What a finished run left behind; None: nothing, or nothing that can be understood."""
        try:
            with files.reaching(self.path):
                found = json.loads((self.path / _FINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def is_in_use(self) -> bool | None:
        """Whether a run has this directory now; None where that is not known, as in a bucket."""
        if not self._is_local:
            return None
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return None
        finally:
            os.close(descriptor)
        return False  # whoever left the lock behind was killed

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete: only its report is written afterwards."""
        self.write_json(_FINISHED, summary)

    def write_json(self, name: str, content: Any) -> files.Path:
        """Writes a file of this directory as a whole.

        Raises:
          WorkdirError: the disk is full or the directory cannot be written.
        """
        text = json.dumps(content, indent=2) + "\n"
        return self.write(name, lambda file: file.write(text.encode()))

    def write(self, name: str, content: Callable[[BinaryIO], Any]) -> files.Path:
        """Writes a file of this directory as a whole, by the process that writes.

        Raises:
          WorkdirError: the disk is full or the directory cannot be written.
        """
        path = self.path / name
        if self._writes:
            with self._writing():
                files.write(path, content)
        return path

    def cut_metrics(self, step: int, *, validated: bool) -> None:
        """Drops every metric line beyond `step`, and half a last line, before a run goes on.

        validated: whether the restored state includes the validation at `step`.
        """
        path = self.path / _METRICS
        kept = []
        with self._writing():
            if not self._writes or not path.exists():
                return
            text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] < step or (
                record["step"] == step and (validated or "split" not in record)
            ):
                kept.append(line + "\n")
        self._unwritten = kept
        with self._writing():
            files.write(path, lambda file: file.write("".join(kept).encode()))

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl` and its numbers to the TensorBoard events.

        Raises:
          WorkdirError: the disk is full or the directory cannot be written.
        """
        if not self._writes:
            return
        if not self._is_local:
            self._unwritten = (self._unwritten or []) + [json.dumps(record) + "\n"]
            self._is_changed = True
            if "split" in record or time.monotonic() - self._uploaded > _UPLOAD_EVERY:
                self._upload()
            return
        with self._writing():
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

    def flush(self) -> None:
        """Writes every metric line that is kept back for a bucket."""
        if self._is_changed:
            self._upload()

    def hold(self, config: config_lib.Config, compute_dtype: str) -> None:
        """Locks the directory against other runs, before anything in it is changed.

        Raises:
          WorkdirError: another run has it, or has made it its own since `claim`.
        """
        self._take_lock()
        if self.saved_config() is not None:
            self._check_same(config, compute_dtype)

    def token(self) -> str:
        """The name of a new file that whoever sees this directory can see, for `sees`."""
        name = f".tmp-{os.getpid()}-{time.time_ns()}"
        with self._writing():
            files.write(self.path / name, lambda file: file.write(b"seen"))
        return name

    def sees(self, name: str, patience: float = 20.0) -> bool:
        """Whether another process's token is here; network disks may show it a little later."""
        deadline = time.monotonic() + patience
        while not (self.path / name).exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def close(self) -> None:
        """Flushes metrics and TensorBoard events."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def release(self) -> None:
        """Lets another run have the directory."""
        if self._lock is not None:
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is not None or not (self._writes and self._is_local):
            return
        path = self.path / _LOCK
        with self._writing():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The system frees it when this process dies, in whatever way.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise WorkdirError(
                f"{self.path} is in use by {holder}: wait for it or stop it, or give another "
                "--workdir."
            ) from error
        except OSError:  # a file system without locks
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return
        if not path.exists() or os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            os.close(descriptor)  # its last holder removed it meanwhile
            return self._take_lock()
        os.truncate(descriptor, 0)
        since = datetime.datetime.now().isoformat(" ", "seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        os.write(descriptor, holder.encode())
        self._lock = descriptor

    def _check_same(self, config: config_lib.Config, compute_dtype: str) -> list[str]:
        """A line for each setting that may differ from the saved one, and does."""
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
        lines = [
            f"Going on with config.{key} = {new!r} (was {old!r})."
            for key, (old, new) in changed.items()
        ]
        if saved.get("compute_dtype", compute_dtype) != compute_dtype:
            lines.append(
                f"Going on in {compute_dtype} (was {saved['compute_dtype']}), as the device says."
            )
        return lines

    def _upload(self) -> None:
        text = "".join(self._unwritten)
        with self._writing():
            files.write(self.path / _METRICS, lambda file: file.write(text.encode()))
        self._uploaded, self._is_changed = time.monotonic(), False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Explains what keeps the directory from being read or written."""
        try:
            with files.reaching(self.path):
                yield
        except OSError as error:
            raise self._unusable(error, "written") from error

    def _unusable(self, error: OSError, what: str) -> WorkdirError:
        advice = "free some space or give another --workdir."
        if not self._is_local:
            advice = (
                "check the bucket's name, and that this machine's account may read and write "
                "objects there (role Storage Object User), or give another --workdir."
            )
        elif what == "read":
            advice = "give yourself the right to read it, or give another --workdir."
        return WorkdirError(
            f"Work directory {self.path} cannot be {what} ({error.strerror or error}): {advice}"
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
