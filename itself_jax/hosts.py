"""Several processes that train as one: how they find, check and lose each other.

`jax.distributed` does the work; this module starts it from the configuration or the environment,
compares what the processes are about to do, lets them stop at the same step, and ends all of them
when one is gone. With a single process nothing here does anything.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from itself_jax import command
from itself_jax import config as config_lib

# Seconds. A process that shows no sign of life for `_PATIENCE` is lost; jax.distributed itself,
# whose verdict ends a process without a word of ours, waits longer.
_BEAT, _PATIENCE, _JAX_PATIENCE = 1.0, 12.0, 25
_LONGEST_WAIT = 3600  # of processes that all live
_ALIVE, _FAILED = "itself_jax/alive/", "itself_jax/failed/"
# How texts of the runtime's errors begin, whatever type they have.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class HostsError(RuntimeError):
    """The processes cannot work together; the message is one sentence for the user."""


class Hosts:
    """The processes of a run, as this one sees them.

    Attributes:
      index: of this process, 0..count-1; process 0 writes logs and reports.
      count: 1 until `start` finds more.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self._address: str | None = None
        self._joining: float | None = None
        self._leaving: int | None = None
        self._asked = self._barriers = self._exchanges = 0
        self._over = threading.Event()
        self._names: dict[int, str] = {}
        self._handler: Any = None  # kept alive for C

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them have computed."""
        return self.index == 0

    def start(self, settings: config_lib.Distributed) -> None:
        """Joins the other processes, if the configuration or the environment names any.

        In this order: `config.distributed`; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID; what jax finds out from SLURM (a step of several tasks), GKE and TPU pods
        (TPU_WORKER_HOSTNAMES, MEGASCALE_COORDINATOR_ADDRESS) or, with `distributed.detect`, by
        itself. Call it before anything asks jax for its devices.

        Raises:
          ConfigError: the settings are incomplete or contradict each other.
          HostsError: the coordinator cannot be reached in time.
        """
        explicit = _explicit(settings, os.environ)
        if explicit is None and not (settings.detect or _in_a_cluster(os.environ)):
            return
        address, count, index = explicit or (None, None, None)
        if count == 1:
            return
        self.index = index or 0
        self._address, self._joining = address, settings.timeout_s
        if index:  # jax itself ends the process without a sentence
            _wait_for(address, settings.timeout_s, f"process {index} of {count}")
        with self._abortion_explained():
            try:
                jax.distributed.initialize(
                    address,
                    count,
                    index,
                    initialization_timeout=settings.timeout_s,
                    heartbeat_timeout_seconds=_JAX_PATIENCE,
                    shutdown_timeout_seconds=30,
                )
            except (RuntimeError, ValueError) as error:
                raise HostsError(
                    f"jax.distributed could not start ({' '.join(str(error).split())}): set "
                    "config.distributed.coordinator, num_processes and process_id."
                ) from error
        self._joining = None
        self.index, self.count = jax.process_index(), jax.process_count()
        self._address = self._address or _state().coordinator_address
        if self.count > 1:
            threading.Thread(target=self._watch, daemon=True).start()
            self._names = dict(enumerate(self._exchange(_who())))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compares what every process is about to do with what process 0 is.

        facts: flat and JSON; the same in every process, or one of them is wrong.

        Raises:
          HostsError: names the processes, the fact and both values.
        """
        if self.count == 1:
            return
        text = json.dumps(dict(facts), sort_keys=True, default=str)
        everyone = [json.loads(said) for said in self._exchange(text)]
        for other, theirs in enumerate(everyone):
            for name in sorted(everyone[0].keys() | theirs.keys()):
                mine, yours = everyone[0].get(name), theirs.get(name)
                if mine != yours:
                    raise HostsError(
                        f"process {other} ({self.name(other)}) has {name} = {yours!r}, but process "
                        f"0 ({self.name(0)}) has {mine!r}: start all of them with the same "
                        "settings, code and data."
                    )

    def name(self, index: int) -> str:
        """Host and process number of one of the processes, as far as known."""
        return self._names.get(index, "not heard of yet")

    def stop_asked(self) -> bool:
        """Whether all processes are to stop here, because one of them got SIGTERM.

        Every process must ask equally often; all get True at the same of these calls.
        """
        if self.count == 1:
            return False
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def all_true(self, value: bool) -> bool:
        """Whether it is true in every process."""
        return all(json.loads(said) for said in self._exchange(json.dumps(bool(value))))

    def from_first(self, value: Any) -> Any:
        """What process 0 has: anything that is JSON."""
        return json.loads(self._exchange(json.dumps(value))[0])

    def barrier(self, name: str) -> None:
        """Waits until every process is here; after compilations, which take unequally long.

        Not on the devices: their first collective gives up after half a minute.
        """
        if self.count > 1:
            self._barriers += 1
            _state().client.wait_at_barrier(
                f"itself_jax/{self._barriers} {name}", _LONGEST_WAIT * 1000
            )

    def finish(self) -> None:
        """Leaves the others in order, where all of them end or stop."""
        if self.count > 1:
            # Everything is saved: whoever has gone meanwhile changes nothing about that.
            with contextlib.suppress(Exception):
                self.barrier("finish")
            self._over.set()
            with contextlib.suppress(Exception):
                jax.distributed.shutdown()

    def explain(self, error: BaseException) -> None:
        """Waits for the verdict on the others after an error that the loss of one may have caused.

        Ends this process if one is lost; returns if the error is this process's own.
        """
        if self.count == 1 or not _is_of_the_runtime(error):
            return
        time.sleep(_PATIENCE + 3 * _BEAT)  # `_watch` knows by then

    def fail(self, code: int, reason: object) -> NoReturn:
        """Prints the one sentence, lets the others know it, and ends this process."""
        if self.count == 1:
            command.stop(code, reason)
        self._over.set()
        self._leaving = code
        try:
            command.stop(code, reason)
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            with contextlib.suppress(Exception):
                _state().client.key_value_set(f"{_FAILED}{self.index}", f"{code} {reason}")
                time.sleep(3 * _BEAT)  # the coordinator must live until they have read it
            # Not through jax's own end, which waits for processes that are gone.
            os._exit(code)

    def _exchange(self, text: str) -> list[str]:
        """What each process says here, by index; every process comes to the same exchanges."""
        if self.count == 1:
            return [text]
        client, self._exchanges = _state().client, self._exchanges + 1
        # Not on the devices: whoever reads its data half a minute longer would be given up.
        key = f"itself_jax/said/{self._exchanges}/"
        client.key_value_set(f"{key}{self.index}", text)
        wait = _LONGEST_WAIT * 1000
        return [client.blocking_key_value_get(f"{key}{i}", wait) for i in range(self.count)]

    def _watch(self) -> None:
        """Shows that this process lives, and ends it when another one does not."""
        client, beat, answered = _state().client, 0, time.monotonic()
        # Also of those that never came to show one.
        seen = {index: ("", time.monotonic()) for index in range(self.count)}
        while not self._over.wait(_BEAT):
            beat += 1
            try:
                client.key_value_set(f"{_ALIVE}{self.index}", str(beat), allow_overwrite=True)
                failed = client.key_value_dir_get(_FAILED)
                alive = client.key_value_dir_get(_ALIVE)
            except Exception:
                if time.monotonic() - answered > _PATIENCE and not self._over.is_set():
                    self._lost(0)
                continue
            answered = time.monotonic()
            for key, value in failed:
                code, _, reason = value.partition(" ")
                index = int(key.rsplit("/", 1)[1])
                if index != self.index and not self._over.is_set():
                    _end(int(code), f"process {index} ({self.name(index)}) failed: {reason}")
            now = time.monotonic()
            for key, value in alive:
                index = int(key.rsplit("/", 1)[1])
                if seen[index][0] != value:
                    seen[index] = value, now
            for index, (_, last) in seen.items():
                if now - last > _PATIENCE and not self._over.is_set():
                    self._lost(index)

    def _lost(self, index: int) -> NoReturn:
        _end(
            command.INTERRUPTED,
            f"process {index} of {self.count} ({self.name(index)}) is lost; the others stop, and "
            "the same command, started again for all of them, goes on at the last checkpoint.",
        )

    @contextlib.contextmanager
    def _abortion_explained(self) -> Iterator[None]:
        """From here on SIGABRT, by which jax.distributed ends a process, has sentence and code.

        A C-level handler: the aborting thread never comes back to Python's own signal handling.
        """

        def aborted(number: int) -> None:
            if self._leaving is not None:
                os._exit(self._leaving)  # the others went first
            if self._joining is not None:
                _end(
                    command.FAILED,
                    f"process {self.index} waited {self._joining} s at the coordinator "
                    f"{self._address or 'that jax found'}, but not all processes came: start all "
                    "of them, and check names and ports.",
                )
            if not self.leads and not _answers(self._address):
                self._lost(0)
            _end(
                command.INTERRUPTED,
                "another process is lost (jax says above which one); the same command, started "
                "again for all of them, goes on at the last checkpoint.",
            )

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)
        yield


def code_facts() -> dict[str, Any]:
    """Versions of the packages, and a checksum of this package's own source."""
    facts: dict[str, Any] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[f"version of {name}"] = importlib.metadata.version(name)
    checksum = 0
    folder = pathlib.Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return facts | {"checksum of itself_jax": f"{checksum:08x}"}


def _who() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _explicit(
    settings: config_lib.Distributed, environment: Mapping[str, str]
) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and index where somebody names them.

    Raises:
      ConfigError: only some of the three are there, or one makes no sense.
    """
    named = {
        "coordinator": (settings.coordinator, "JAX_COORDINATOR_ADDRESS"),
        "num_processes": (settings.num_processes, "JAX_NUM_PROCESSES"),
        "process_id": (settings.process_id, "JAX_PROCESS_ID"),
    }
    values = {k: environment.get(v) if x is None else str(x) for k, (x, v) in named.items()}
    if all(value is None for value in values.values()):
        return None
    for key, value in values.items():
        if value is None:
            there = next(k for k, v in values.items() if v is not None)
            raise config_lib.ConfigError(
                f"config.distributed.{key} is not set (nor is {named[key][1]}), but "
                f"{there} is: several processes need all three of them."
            )
    address, _, port = values["coordinator"].rpartition(":")
    if not address or not port.isdigit():
        raise config_lib.ConfigError(
            f"config.distributed.coordinator={values['coordinator']!r} must be HOST:PORT of "
            "process 0, e.g. 10.0.0.1:8476."
        )
    numbers = {}
    for key in ("num_processes", "process_id"):
        if not values[key].isdigit():
            raise config_lib.ConfigError(
                f"config.distributed.{key}={values[key]!r} must be a number of 0 or more."
            )
        numbers[key] = int(values[key])
    if not numbers["process_id"] < numbers["num_processes"]:
        raise config_lib.ConfigError(
            f"config.distributed.process_id={numbers['process_id']} must be less than "
            f"num_processes={numbers['num_processes']}."
        )
    return values["coordinator"], numbers["num_processes"], numbers["process_id"]


def _in_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler has started several processes of this program."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return (
        (tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in environment)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _is_of_the_runtime(error: BaseException | None) -> bool:
    """Whether devices, collectives or the coordinator failed, and not this program by itself."""
    while error is not None:
        kind = isinstance(error, jax.errors.JaxRuntimeError)
        if kind or _STATUS.match(str(error)):  # gloo's errors come as ValueError
            return True
        error = error.__cause__ or error.__context__
    return False


def _wait_for(address: str, seconds: int, who: str) -> None:
    """Until the coordinator's port is open."""
    started = time.monotonic()
    while not _answers(address):
        if time.monotonic() - started > seconds:
            raise HostsError(
                f"{who} could not reach the coordinator {address} in {seconds} s: is process 0 "
                "running there, and is the port open? (config.distributed.timeout_s is how long it "
                "tries.)"
            )
        time.sleep(0.2)


def _answers(address: str | None) -> bool:
    if address is None:
        return False
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False


def _state() -> Any:
    from jax._src import distributed  # there is no public door to the key-value store

    return distributed.global_state


def _end(code: int, reason: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"itself_jax: {reason}\n")
    sys.stderr.flush()
    os._exit(code)
