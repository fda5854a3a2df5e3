"""The Orbax manager, and what a checkpoint contains.

A checkpoint is one folder, `<folder>/<step>` (`<step>-1`, `<step>-2`, … when a step was saved
again), with two items: `state`, any pytree of arrays, and `meta`, a JSON document that holds the
caller's own values and a checksum of every array. Orbax writes into a temporary folder and renames
it when everything is on disk, so a killed process never leaves half a checkpoint under a final
name. What Orbax does not do is notice damage that comes later: a flipped bit restores silently
wrong, and a lost file raises anything at all. Hence the checksums, and `restore_latest`, which
falls back to an older step and says so.

In a bucket (`gs://…`) nothing can be renamed: there Orbax marks what is complete by a file, and a
damaged checkpoint keeps its place; the next save of its step becomes another revision.
"""

import concurrent.futures
import json
import logging
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from itself_jax import command, files, hosts
from itself_jax.data import remote

_FORMAT = 1
_KEEP_LATEST = 2
# Orbax identifies a checkpoint by one integer; ours is step * _REVISIONS + revision.
_REVISIONS = 1_000_000
_FOLDER_NAME = re.compile(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?")
_UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one sentence for the user."""


class Restored(NamedTuple):
    """A checkpoint read back.

    `meta` equals what was saved, as JSON returns it (tuples are lists, keys are strings). If newer
    or better checkpoints had to be skipped, it has one key more, `damaged_steps`: their steps.
    """

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """Saves asynchronously; keeps the latest two steps and the best one by `meta["score"]`.

    With `keep_scored` every step that has a score is kept.

    Saving belongs to one program at a time; any number may read meanwhile (an evaluation next to
    the training): nothing is created or removed before the first `save`, except by `restore_latest`
    if it meets damage.

    Of several processes, one whose piece cannot be written ends all of them as soon as it knows,
    not at the next `save` or `wait`, where they would wait for each other.

    A save is safe on disk only after `wait` or `close`: a program that ends without either exits
    with 0 and has lost it. Used as a context manager the object closes itself.
    """

    def __init__(
        self,
        folder: files.Path,
        *,
        log: Callable[[str], None] = print,
        ours: hosts.Hosts | None = None,
        keep_scored: bool = False,
    ):
        # Orbax accepts a relative folder, returns True from save() and fails afterwards.
        self.folder = files.place(folder)
        self._log = log
        self._ours = ours or hosts.Hosts()
        self._policy = _LatestAndBest(self.folder, keep_scored)
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        _silence_orbax()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies `state` to the host, returns, and writes it in the background.

        The buffers of `state` may be donated or overwritten as soon as this returns. A previous
        save that is still being written is waited for first. `state` is a pytree of JAX or NumPy
        arrays; anything else belongs in `meta`, which must be JSON. `meta["score"]` is the
        validation score (higher is better), or None if there is none yet; of equal scores the
        earlier step stays the best.

        A step may be saved again, for instance first before and then after its validation: the new
        checkpoint replaces the old one, which is removed only after the new one is complete.

        Checksums cover what every process has whole: an array that is spread over several of them
        is saved without one.

        Raises:
          CheckpointError: this save could not be started, or the previous one had failed.
          TypeError: `state` or `meta` holds something that cannot be saved.
        """
        self.wait()
        document = _document(step, state, meta)
        # Orbax copies device buffers before it returns, but reads NumPy arrays while writing.
        state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), state)
        self._saving = step
        try:
            if self._manager is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self._ours.leads:
                    self._remove_unfinished()
                self._ours.barrier("checkpoints")
                self._manager = self._open_manager()
            revisions = [known.revision for known in self._slots() if known.step == step]
            # What one process sees: another one may look while it renames.
            slot = _Slot(step, self._ours.from_first(max(revisions, default=-1) + 1))
            self._policy.expect(slot, _score(document))
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(document)
            )
            # Without force Orbax skips, silently, every step below the latest.
            self._manager.save(slot.number, args=items, force=True)
        except Exception as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Blocks until every save is on disk under its final name.

        Raises:
          CheckpointError: a save failed in the background; earlier checkpoints are intact.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error

    def restore_latest(self, template: Any) -> Restored | None:
        """The newest checkpoint that is intact, or None if the folder holds none.

        `template` is a pytree like the saved state: `jax.ShapeDtypeStruct` or JAX arrays, whose
        shardings the result gets (the default device where there is none), or NumPy arrays.

        A damaged checkpoint is logged and skipped; once an older one has been restored, the damaged
        ones are renamed to `damaged-<step>`, so that training can save those steps again.

        Raises:
          CheckpointError: every checkpoint is damaged, or the template has other parameters than
            the checkpoint (another model). Nothing is renamed in either case.
        """
        self.wait()
        template = jax.tree_util.tree_map_with_path(_abstract, template)
        order = sorted(self._slots(), reverse=True)
        restored, damaged = self._restore(order, lambda path: _read(path, template))
        if restored is not None:
            self._move_aside(damaged)
        return restored

    def restore_best(
        self, parts: Collection[str], *, scored: bool = True, step: int | None = None
    ) -> Restored | None:
        """The checkpoint with the highest score, or None if no checkpoint has a score.

        With `scored=False` the newest will do where none has a score; `step` takes that one alone.

        `state` is read as it was saved, whatever the model: nested dicts of NumPy arrays, of the
        top-level entries `parts` alone, so that the optimiser's state need not be read; each is an
        array or dicts of arrays.
        Renames nothing. If the best one is damaged this says so and takes the next best, or the
        newest without a score: see `damaged_steps` in `Restored.meta`.

        Raises:
          CheckpointError: every checkpoint is damaged.
        """
        self.wait()
        rated, unrated, unreadable = [], [], []
        for slot in sorted(self._slots(), reverse=True):
            if step is not None and slot.step != step:
                continue
            try:
                score = _score(_read_document(self.folder / slot.name))
            except Exception:
                unreadable.append(slot)
            else:
                (unrated if score is None else rated).append((score, slot))
        if not rated and not unreadable and (scored or not unrated):
            return None
        # An unreadable checkpoint may have been the best one, so it is named first.
        rated.sort(key=lambda item: _rank(item[0], item[1].step), reverse=True)
        order = unreadable + [slot for _, slot in rated + unrated]
        return self._restore(order, lambda path: _read_parts(path, parts))[0]

    def close(self) -> None:
        """Waits for the last save, then frees the threads. Safe to call twice."""
        self.wait()
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            # The exception that is already on its way is the one the user must see.
            self._log(str(failed))

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            step_name_format=_Names(),
            preservation_policy=self._policy,
            enable_async_checkpointing=True,
            create=False,
            # Reading every step's metadata here would make one damaged step fatal to all.
            lightweight_initialize=True,
        )
        return _Manager(self.folder, options=options, failed=self._failed_in_background)

    def _failed_in_background(self, error: Exception) -> None:
        """Of several processes, ends this one and by that the others, which wait for its piece."""
        if self._ours.count > 1:
            self._ours.explain(error)
            self._ours.fail(command.FAILED, self._explained(error))

    def _save_failed(self, error: Exception) -> CheckpointError:
        """Leaves the folder as it was before the failed save, and explains."""
        # The manager now lists a step that does not exist, and has forgotten those that it was
        # about to remove: start from the folder again.
        manager, self._manager = self._manager, None
        if manager is not None and self._ours.count == 1:  # it may wait for the others
            try:
                manager.close()
            except Exception as closing:
                logging.getLogger(__name__).debug("closing after a failed save: %r", closing)
        if self._ours.leads:
            self._remove_unfinished()
        return self._explained(error)

    def _explained(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"step {self._saving} could not be saved in {self.folder}: {_reason(error)}; earlier "
            "checkpoints are intact: free space there or make it writable, then start again"
        )

    def _remove_unfinished(self) -> None:
        """Removes what a killed or failed save left behind: as large as a whole checkpoint."""
        for _ in range(10):
            if not (left := self._unfinished()):
                return
            for path in left:
                files.remove(path)
            # After one write has failed, the others of that save go on for a moment, and may
            # make their folder again.
            time.sleep(0.3)

    def _unfinished(self) -> list[files.Path]:
        if remote.is_local(self.folder):
            return list(self.folder.glob(f"*{_UNFINISHED}*"))
        # A folder without objects is none there.
        return [
            path
            for path in (self.folder.iterdir() if self.folder.is_dir() else ())
            if _FOLDER_NAME.fullmatch(path.name) and not _is_complete(path)
        ]

    def _slots(self) -> list["_Slot"]:
        return [] if not self.folder.is_dir() else _slots(self.folder)

    def _restore(
        self, order: Sequence["_Slot"], read: Callable[[files.Path], tuple[dict[str, Any], Any]]
    ) -> tuple[Restored | None, list["_Slot"]]:
        """The first of `order` that is intact, and those before it that are not."""
        damaged: list[_Slot] = []
        reason = ""
        # Another process may see what this one does not yet.
        order = [_Slot(*slot) for slot in self._ours.from_first([list(slot) for slot in order])]
        for slot in order:
            path = self.folder / slot.name
            try:
                document, state = self._read_together(lambda path=path: read(path))
            except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # Another model, or too little memory: no fault of the files.
            except Exception as error:
                if not path.exists():
                    continue  # Removed by the program that trains in this folder.
                reason = _reason(error)
                damaged.append(slot)
                self._log(f"checkpoint {path} (step {slot.step}) is damaged, skipped: {reason}")
                continue
            meta = document["meta"]
            if damaged:
                meta["damaged_steps"] = sorted({slot.step for slot in damaged})
                self._log(f"restored step {slot.step} instead, from {path}")
            return Restored(slot.step, state, meta), damaged
        if damaged:
            raise CheckpointError(
                f"all {len(damaged)} checkpoints in {self.folder} are damaged (the last one tried: "
                f"{reason}): bring the folder back from a backup, or move it away to start afresh"
            )
        return None, damaged

    def _read_together(self, read: Callable[[], Any]) -> Any:
        """What was read if every process could read it; else an error in all of them."""
        error, result = None, None
        try:
            result = read()
        except Exception as own:
            error = own
        if self._ours.all_true(error is None):
            return result
        raise error or ValueError("another process cannot read it")

    def _move_aside(self, damaged: Iterable["_Slot"]) -> None:
        for slot in damaged if self._ours.leads and remote.is_local(self.folder) else ():
            target, attempt = self.folder / f"damaged-{slot.name}", 1
            while target.exists():
                attempt += 1
                target = self.folder / f"damaged-{slot.name}.{attempt}"
            try:
                os.rename(self.folder / slot.name, target)
            except OSError as error:
                # A later save of this step still works: it becomes the next revision.
                self._log(f"could not rename {self.folder / slot.name}: {_reason(error)}")
        if self._manager is not None:
            # Orbax keeps its own list of steps.
            self._manager.close()
            self._manager = None


class _Manager(ocp.CheckpointManager):
    """Tells of a save that has failed in the background as soon as it has.

    Orbax's own thread first waits for the processes whose save has not failed, and those wait for
    it: many minutes. It also leaves the question whether to stop to `hosts.Hosts`.

    failed: called in a thread of Orbax.
    """

    def __init__(self, *arguments: Any, failed: Callable[[Exception], None], **options: Any):
        self._failed = failed
        super().__init__(*arguments, **options)

    def reached_preemption(self, step: int) -> bool:
        # jax lets all stop a little beyond the largest number that it was asked with, and Orbax
        # asks with numbers a million times ours: a SIGTERM just after a save would be lost.
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self._failed(error)
            raise


class _Slot(NamedTuple):
    """A place for a checkpoint in the folder; sorts by age."""

    step: int
    revision: int

    @property
    def name(self) -> str:
        return f"{self.step}-{self.revision}" if self.revision else str(self.step)

    @property
    def number(self) -> int:
        return self.step * _REVISIONS + self.revision


def _slots(folder: files.Path) -> list[_Slot]:
    """All finished checkpoints in `folder`."""
    matches = [
        _FOLDER_NAME.fullmatch(path.name)
        for path in folder.iterdir()
        if path.is_dir() and _is_complete(path)
    ]
    return [_Slot(int(m[1]), int(m[2] or 0)) for m in matches if m]


def _is_complete(path: files.Path) -> bool:
    """A final name says so on a disk, a file of Orbax in a bucket."""
    return remote.is_local(path) or (path / "commit_success.txt").exists()


class _Names(ocp.path.step.NameFormat):
    """Orbax cannot overwrite a step; this lets one step have several folders for a moment."""

    def build_name(self, step: int) -> str:
        return _Slot(*divmod(step, _REVISIONS)).name

    def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
        for slot in _slots(files.place(base_path)):
            yield self._metadata(base_path, slot)

    def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
        slot = _Slot(*divmod(step, _REVISIONS))
        if slot not in _slots(files.place(base_path)):
            raise ValueError(f"no checkpoint {slot.name} in {base_path}")
        return self._metadata(base_path, slot)

    def _metadata(self, base_path: Any, slot: _Slot) -> ocp.path.step.Metadata:
        path = ocp.path.step.build_step_path(base_path, self, slot.number)
        return ocp.path.step.Metadata(step=slot.number, path=path)


class _LatestAndBest:
    """Keeps the newest revision of the latest two steps and of the best one.

    Not Orbax's own `AnyPreservationPolicy([LatestN, BestN])`: `BestN` lets the later of two equal
    scores win, and knows no score that an earlier run of the program has saved.
    """

    def __init__(self, folder: files.Path, keep_scored: bool = False):
        self._folder = folder
        self._keep_scored = keep_scored
        self._scores: dict[_Slot, float | None] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        slots = [_Slot(*divmod(info.step, _REVISIONS)) for info in checkpoints]
        newest = {slot.step: slot for slot in sorted(slots)}
        steps = sorted(newest)
        keep = set(steps[-_KEEP_LATEST:])
        scores = {step: self._score(newest[step]) for step in steps}
        scored = [step for step in steps if scores[step] is not None]
        if scored:
            keep.add(max(scored, key=lambda step: _rank(scores[step], step)))
        if self._keep_scored:
            keep.update(scored)
        return [slot.step in keep and slot == newest[slot.step] for slot in slots]

    def expect(self, slot: _Slot, score: float | None) -> None:
        """Announces the score of a checkpoint that is not on disk yet."""
        self._scores[slot] = score

    def _score(self, slot: _Slot) -> float | None:
        if slot not in self._scores:
            try:
                self._scores[slot] = _score(_read_document(self._folder / slot.name))
            except Exception:
                self._scores[slot] = None  # Damaged: it must not keep a good one from being best.
        return self._scores[slot]


def _rank(score: float, step: int) -> tuple[float, int]:
    """Orders by score; of equal scores the earlier step is the better."""
    return score, -step


def _score(document: dict[str, Any]) -> float | None:
    score = document["meta"].get("score")
    # A run that diverged has the score NaN, which compares as neither better nor worse.
    return None if score is None or not math.isfinite(score) else float(score)


def _document(step: int, state: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """What the JSON item holds: the caller's `meta`, and the name and checksum of every array."""
    score = meta.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise TypeError(f'meta["score"] must be a number or None, got {score!r}')
    try:
        # Also a copy: Orbax serialises in the background, while the caller goes on.
        meta = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta of step {step} is not JSON: {error}") from None
    leaves = _named_leaves(jax.tree_util.tree_map_with_path(_array, state))
    document = {
        "format": _FORMAT,
        "step": step,
        "meta": meta,
        "arrays": {
            name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name, "crc32": checksum}
            for (name, leaf), checksum in zip(leaves.items(), _checksums(leaves), strict=True)
        },
    }
    return document | {"crc32": _document_checksum(document)}


def _document_checksum(document: dict[str, Any]) -> int:
    body = {key: value for key, value in document.items() if key != "crc32"}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read_document(path: files.Path) -> dict[str, Any]:
    """The JSON item of the checkpoint at `path`; raises anything at all if it is damaged."""
    document = ocp.JsonCheckpointHandler().restore(path / "meta")
    if document["crc32"] != _document_checksum(document):
        raise ValueError("its JSON does not match its own checksum")
    if document["format"] != _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {document['format']}, this version reads {_FORMAT}: "
            "use the version of itself_jax that wrote it"
        )
    return document


def _read(path: files.Path, template: Any) -> tuple[dict[str, Any], Any]:
    """Document and state; CheckpointError for another model, anything else means damage."""
    document = _read_document(path)
    _check_same_arrays(path, template, document["arrays"])
    # Not through a Checkpointer, which waits for the other processes in the end: one that fails
    # would leave them waiting.
    handler = ocp.StandardCheckpointHandler()
    state = handler.restore(path / "state", args=ocp.args.StandardRestore(template))
    _verify(state, document["arrays"])
    return document, state


def _read_parts(path: files.Path, parts: Collection[str]) -> tuple[dict[str, Any], Any]:
    """Document, and the named top-level entries of the state; any error means damage."""
    document = _read_document(path)
    template: dict[str, Any] = {}
    for name, array in document["arrays"].items():
        *folders, last = name.split("/")
        if (folders or [last])[0] in parts:
            node = template
            for folder in folders:
                node = node.setdefault(folder, {})
            node[last] = jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    arguments = ocp.args.PyTreeRestore(template, restore_args=as_numpy, partial_restore=True)
    state = ocp.PyTreeCheckpointHandler().restore(path / "state", args=arguments)
    _verify(state, document["arrays"])
    return document, state


def _verify(state: Any, arrays: dict[str, Any]) -> None:
    leaves = _named_leaves(state)
    for name, checksum in zip(leaves, _checksums(leaves), strict=True):
        expected = arrays[name]["crc32"]
        if None not in (checksum, expected) and checksum != expected:
            raise ValueError(f"{name} does not match its checksum")


def _check_same_arrays(path: files.Path, template: Any, arrays: dict[str, Any]) -> None:
    """The template must name the arrays of the checkpoint, all of them, with shape and type."""
    wanted = _named_leaves(template)
    for name in [*wanted, *arrays]:
        here = there = "no such array"
        if name in wanted:
            here = f"{np.dtype(wanted[name].dtype).name}{list(wanted[name].shape)}"
        if name in arrays:
            there = f"{arrays[name]['dtype']}{arrays[name]['shape']}"
        if here != there:
            raise CheckpointError(
                f"checkpoint {path} belongs to another model: {name} is {there} in the checkpoint "
                f"and {here} here; use the configuration it was made with, or another folder"
            )


def _named_leaves(tree: Any) -> dict[str, Any]:
    """`params/encoder/kernel` → leaf, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _array(path: Any, leaf: Any) -> Any:
    """Refuses what cannot be saved bit for bit."""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or not _is_plain(leaf.dtype):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise TypeError(
            f"{_name(path)} is {kind}, and a checkpoint's state holds arrays of numbers only: put "
            "strings and settings into meta, and save jax.random.key_data(key) for a random key"
        )
    return leaf


def _abstract(path: Any, leaf: Any) -> Any:
    """The template Orbax needs: always with a sharding, else it takes that of the old machine."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(_array(path, leaf))
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        _array(path, leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _is_plain(dtype: Any) -> bool:
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and np.dtype(dtype).kind != "O"


def _checksums(leaves: dict[str, Any]) -> list[int | None]:
    """CRC-32 of each array's bytes; None for one that other processes hold parts of."""
    # zlib releases the interpreter lock: four threads are three times as fast as one.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(_checksum, leaves.values()))


def _checksum(leaf: Any) -> int | None:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            return None
        leaf = leaf.addressable_data(0)
    # As bytes, because bfloat16 has no buffer interface of its own.
    values = np.ascontiguousarray(np.asarray(leaf)).reshape(-1)
    return zlib.crc32(values.view(np.uint8))


def _reason(error: BaseException) -> str:
    """An exception in a few words: Orbax's and TensorStore's run over many lines."""
    text = " ".join(str(error).split()) or "no message"
    # TensorStore puts the one thing that helps behind three long paths.
    system = re.search(r"os_error_code='([0-9]+)'", text)
    if system:
        return os.strerror(int(system[1]))
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '…'}"


class _OrbaxFilter(logging.Filter):
    """Drops what Orbax logs: some forty lines a save, and a traceback for each error we report.

    asyncio adds one for each of Orbax's tasks that failed after the first.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if logging.getLogger("absl").getEffectiveLevel() <= logging.DEBUG:
            return True
        source = record.getMessage() if record.name == "asyncio" else record.pathname
        names = (f"{os.sep}orbax{os.sep}", "tensorstore", _UNFINISHED)
        return not any(name in source for name in names)


class _UnraisableFilter:
    """Drops "Exception ignored in …" after an Orbax read or write has failed.

    At the first error Orbax closes its event loop on the tasks that still run. Python then prints
    a traceback for each of them, up to the end of the program; we have reported the first one.
    """

    def __init__(self, hook: Callable[[Any], object]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        of_its_loop = unraisable.object is None and "loop is closed" in str(unraisable.exc_value)
        if not of_orbax and not of_its_loop:
            self._hook(unraisable)


def _silence_orbax() -> None:
    """Nothing here happens at import: a program without checkpoints keeps its own settings."""
    for logger in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        if not any(isinstance(known, _OrbaxFilter) for known in logger.filters):
            logger.addFilter(_OrbaxFilter())
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)
