"""The programs of a run, compiled for machines that are not here: what they need and send.

`plan` compiles the train step and both encoders at full size with the real compiler of a topology
and reads its answer: memory, operations, collectives. Nothing is run, so nothing here is a measured
time; `estimate` says what the vendors' peak figures would allow at best.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from itself_jax import config as config_lib
from itself_jax import sharding, step, timing


class AotError(RuntimeError):
    """A topology that cannot be compiled for; the message says what to do."""


class Chip(NamedTuple):
    """The vendor's peak figures of one device.

    memory: bytes. flops: bfloat16 operations a second. bandwidth: of its memory, bytes a second.
    link: bytes a second that it sends in a ring over one axis of the network, both directions of
    it (two of a TPU's ports; all of a GPU's, behind a switch). source: where these figures stand.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    source: str


CHIPS: dict[str, Chip] = {
    # 1,600 Gb/s over 4 ports is 50 GB/s a port; v6e 3,200 Gb/s over 4; v5p 4,800 Gb/s over 6.
    "v5e": Chip(16e9, 197e12, 819e9, 100e9, "https://cloud.google.com/tpu/docs/v5e"),
    "v6e": Chip(32e9, 918e12, 1600e9, 200e9, "https://cloud.google.com/tpu/docs/v6e"),
    "v5p": Chip(95e9, 459e12, 2765e9, 200e9, "https://cloud.google.com/tpu/docs/v5p"),
    # The SXM module: dense bfloat16; NVLink's 900 GB/s are both directions together.
    "h100": Chip(80e9, 989e12, 3350e9, 450e9, "https://www.nvidia.com/en-us/data-center/h100/"),
}
# By what jax calls the devices. Other cards of a name, such as the H100 PCIe, have other figures.
_DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "NVIDIA H100 80GB HBM3": "h100",
}
_PER_HOST = {"h100": 8}

# What the CUDA compiler asks of a card. Figures of the H100 80GB HBM3 as its driver reports them.
_GPU_TARGET = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}


def chip_of(device_kind: str) -> Chip | None:
    """Peak figures of a device by jax's name of its kind; None: not known here."""
    return CHIPS.get(_DEVICE_KINDS.get(device_kind, ""))


class Topology(NamedTuple):
    """Devices to compile for. `chip` is None where no peak figures are known (the CPU)."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None


def find_topology(name: Any) -> Topology:
    """`v5e:16x16`, `v5p:4x4x4`, `h100:8`, `cpu:8`.

    Raises:
      AotError: no such machine, or its compiler is not installed.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){0,2})", str(name))
    kind = found[1] if found else ""
    if kind != "cpu" and kind not in CHIPS:
        raise AotError(
            f"topology {name!r} is unknown: expected CHIP:SHAPE with a chip of "
            f"{', '.join(CHIPS)} or cpu, e.g. v5e:16x16, v5p:4x4x4, h100:8, cpu:8"
        )
    shape = found[2]
    if kind == "cpu" or kind in _GPU_TARGET:
        if "x" in shape:
            raise AotError(f"topology {name!r}: {kind} takes a number of devices, e.g. {kind}:8")
        find = _cpu_devices if kind == "cpu" else _gpu_devices
        return Topology(name, find(kind, int(shape)), CHIPS.get(kind))
    _require("libtpu", "TPU", "aot")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the plug-in raises what it likes
        raise AotError(f"topology {name!r} is refused by the TPU compiler: {error}") from error
    return Topology(name, devices, CHIPS[kind])


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise AotError(
            f"the {what} compiler is not installed ({module} is missing): "
            f"pip install 'itself_jax[{extra}]'"
        )


def _cpu_devices(kind: str, count: int) -> Sequence[Any]:
    if len(devices := jax.devices("cpu")) < count:
        raise AotError(
            f"topology {kind}:{count} needs {count} virtual devices, but this process has "
            f"{len(devices)}: set JAX_NUM_CPU_DEVICES={count} before it starts"
        )
    return devices[:count]


def _gpu_devices(kind: str, count: int) -> Sequence[Any]:
    _require("jax_cuda12_plugin", "CUDA", "aot-cuda")
    hosts, rest = divmod(count, _PER_HOST[kind])
    if hosts and rest:
        raise AotError(f"topology {kind}:{count}: hosts have {_PER_HOST[kind]} cards each")
    shape = f"1x{hosts}x{_PER_HOST[kind]}" if hosts else f"1x1x{count}"
    jax.devices()  # loads the plug-ins
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=shape, target_config=_GPU_TARGET[kind]
        ).devices
    except Exception as error:
        raise AotError(
            f"topology {kind}:{count} is refused by the CUDA compiler: {error}"
        ) from error


# --- reading a compiled program -------------------------------------------------------------------


class Collective(NamedTuple):
    """One exchange between devices.

    bytes: of the whole array: what an all-gather returns, what the others take. group: devices that
    take part in one exchange. times: how often the program does it. source: the operation of the
    model that it belongs to, where the compiler has kept that.
    """

    kind: str
    bytes: int
    group: int
    times: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends for it in a ring, all repetitions together."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * factor


KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_SIZES = {"pred": 1, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALL = re.compile(r"(?:calls|body|condition|to_apply|called_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_HOST = re.compile(
    r'custom_call_target="[^"]*(?:callback|HostExecute)[^"]*"|is_host_transfer=true'
    r"| (?:infeed|outfeed)\(",
    re.IGNORECASE,
)


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective in the text of an optimised program, in its order.

    Those inside of a loop of known length count as often as it runs. An all-reduce of which the
    compiler keeps each device its part (a fusion that TPUs have) is the reduce-scatter it is. One
    that goes on behind a chain of other operations is named in each of them, and counts once.
    """
    computation, found, loops, chains = "", [], {}, set()
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
            continue
        called = _CALL.findall(line)
        trips = _TRIPS.search(line)
        for name in called:
            loops.setdefault(name, []).append((computation, int(trips[1]) if trips else 1))
        if match := _COLLECTIVE.match(line):
            if chain := re.search(r'chain_id="(\d+)"', line):
                if chain[1] in chains:
                    continue
                chains.add(chain[1])
            found.append((computation, line, match))
    result = []
    for computation, line, match in found:
        kind, started = match[2], match[3] is not None
        group = _group_size(line, devices)
        size = _result_bytes(match[1], kind, started)
        if kind == "reduce-scatter":
            size *= group  # its result is a device's part
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', line)
        # Of those that were combined into one, the first names it.
        name = source[1].split(":")[0] if source else ""
        result.append(Collective(kind, size, group, _times(computation, loops), name))
    return [c for c in result if c.group > 1]


def _times(computation: str, loops: dict[str, list[tuple[str, int]]]) -> int:
    """How often a computation runs: through all its callers up to the program's entry."""
    if computation not in loops:
        return 1
    return sum(trips * _times(caller, loops) for caller, trips in loops[computation])


def _result_bytes(shape: str, kind: str, started: bool) -> int:
    arrays = [_array_bytes(*a) for a in _ARRAY.findall(shape)]
    # An asynchronous one returns what it took beside what it gives.
    if not started or kind == "all-reduce":
        return sum(arrays)
    if kind == "collective-permute":
        return arrays[1]
    return sum(arrays[len(arrays) // 2 :])


def _array_bytes(kind: str, dims: str) -> int:
    bits = re.search(r"\d+", kind)
    size = _SIZES[kind] if kind in _SIZES else math.ceil(int(bits[0]) / 8) if bits else 0
    return size * math.prod(int(n) for n in dims.split(",") if n)


def _group_size(line: str, devices: int) -> int:
    if "source_target_pairs=" in line:
        return 2
    found = re.search(r"replica_groups=(\S.*?)(?:, [a-z_]+=|$)", line)
    groups = found[1] if found else ""
    if iota := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(iota[2])
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if groups.startswith("mesh["):
        axes, _, used = groups.partition("] ")
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", used)
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices  # {}: all of them


def calls_host(text: str) -> bool:
    """Whether a compiled program talks to the host while it runs."""
    return _HOST.search(text) is not None


def square_bytes(text: str, batch_size: int, weights: Iterable[tuple[int, ...]]) -> int | None:
    """Bytes of the largest batch x batch array that a device holds whole; 0: there is none.

    None: a weight has the shape, too, so that shapes cannot tell.
    """
    if (batch_size, batch_size) in set(weights):
        return None
    sizes = [0]
    for kind, dims in _ARRAY.findall(text):
        if [n for n in dims.split(",") if n not in ("", "1")] == [str(batch_size)] * 2:
            sizes.append(_array_bytes(kind, dims))
    return max(sizes)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device needs for a compiled program; bytes, and operations of one call.

    `flops` and `accessed` are None where the compiler does not say (CUDA). The compiler counts
    a multiplication and an addition as two.
    """

    name: str
    arguments: int
    outputs: int
    temporary: int
    aliased: int  # outputs that take the place of arguments
    flops: float | None
    accessed: float | None
    collectives: tuple[Collective, ...]
    calls_host: bool
    square: int | None

    @property
    def bytes(self) -> int:
        """All that is needed at once."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    @property
    def sent(self) -> float:
        """Bytes a device sends in one call."""
        return sum(c.sent for c in self.collectives)


def measure(name: str, compiled: Any, *, devices: int, batch_size: int, weights: Any) -> Program:
    """Reads what the compiler says about a program (`jax.stages.Compiled`)."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text()
    shapes = [tuple(x.shape) for x in jax.tree.leaves(weights)]
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        flops=cost.get("flops"),
        accessed=cost.get("bytes accessed"),
        collectives=tuple(collectives(text, devices)),
        calls_host=calls_host(text),
        square=square_bytes(text, batch_size, shapes),
    )


class Estimate(NamedTuple):
    """Lower bounds on the seconds of one call, by the vendor's peak figures: never measured."""

    compute: float
    memory: float
    links: float

    @property
    def overlapped(self) -> float:
        """All three at once."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """Nothing sent while something is computed."""
        return max(self.compute, self.memory) + self.links


def estimate(program: Program, chip: Chip | None) -> Estimate | None:
    """None where the chip or the program's operations are unknown."""
    if chip is None or program.flops is None:
        return None
    return Estimate(
        program.flops / chip.flops,
        (program.accessed or 0) / chip.bandwidth,
        program.sent / chip.link,
    )


# --- compiling ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """All programs of a run on a topology; a program that does not fit is a sentence."""

    topology: str
    devices: int
    batch_size: int
    sharding: str
    mesh: tuple[int, int]
    programs: tuple[Program, ...]
    failures: dict[str, str]
    chip: Chip | None


def plan(
    config: config_lib.Config,
    topology: Topology,
    identities: int,
    *,
    only: Sequence[str] = ("step", "image encoder", "text encoder"),
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles the programs named in `only` for all devices of the topology.

    Raises:
      ConfigError: the settings do not fit the devices.
    """
    if config.precision is None:  # what this program would choose there
        there = "float32" if topology.name.startswith("cpu") else "bfloat16"
        config = dataclasses.replace(config, precision=there)
    if config.attention is None:
        fused = topology.name.startswith(tuple(_GPU_TARGET)) and config.precision == "bfloat16"
        config = dataclasses.replace(config, attention="cudnn" if fused else "plain")
    mesh = sharding.make_mesh(config, list(topology.devices))
    training = step.make(
        config, num_identities=identities, steps_per_epoch=(1000,) * config.num_epochs
    )
    state = step.state_template(training, mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    jobs: dict[str, Callable[[], Any]] = {
        "step": lambda: step.compile_step(training, state, mesh),
        "image encoder": lambda: step.compile_image_encoder(training, variables, mesh),
        "text encoder": lambda: step.compile_text_encoder(training, variables, mesh),
    }
    programs, failures = [], {}
    for name in only:
        say(f"Compiling the {name} for {topology.name} …")
        try:
            compiled = jobs[name]()
        except Exception as error:
            if not (sentence := _out_of_memory(error)):
                raise
            failures[name] = sentence
            continue
        programs.append(
            measure(
                name,
                compiled,
                devices=mesh.size,
                batch_size=(
                    config.batch_size if name == "step" else sharding.eval_batch_size(config, mesh)
                ),
                weights=state.params,
            )
        )
    return Plan(
        topology=topology.name,
        devices=mesh.size,
        batch_size=config.batch_size,
        sharding=config.sharding,
        mesh=(mesh.shape["data"], mesh.shape["model"]),
        programs=tuple(programs),
        failures=failures,
        chip=topology.chip,
    )


def _out_of_memory(error: Exception) -> str | None:
    """The compiler's sentence on memory; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    used = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w)", text)
    if used is None:
        return "does not fit the memory of a device"
    return f"does not fit the memory of a device: it needs {used[1]} of {used[2]}"


class Search(NamedTuple):
    """The largest batch found to fit, the smallest found not to (None: none was tried)."""

    fits: int | None
    too_large: int | None
    tries: int


def largest_batch(fits: Callable[[int], bool], *, start: int, unit: int, tries: int) -> Search:
    """Doubles from `start` until a batch does not fit, then bisects in multiples of `unit`.

    Each try is a compilation, so that the answer is a pair of bounds rather than a number.
    """
    low, high, size, done = None, None, max(unit, start // unit * unit), 0
    while done < tries:
        done += 1
        if fits(size):
            low = size
        else:
            high = size
        if high is None:
            size = 2 * low
        else:
            size = ((low or 0) + high) // 2 // unit * unit
            if size in (0, low, high):
                break
    return Search(low, high, done)


# --- what is printed and written ------------------------------------------------------------------


def lines(result: Plan) -> list[str]:
    """The plan as a table and sentences."""
    chip = result.chip
    out = [
        f"{result.topology}: {result.devices} devices (data={result.mesh[0]}, "
        f"model={result.mesh[1]}), batch_size={result.batch_size}, sharding={result.sharding}. "
        "Compiled, not run."
    ]
    header = ("per device", "arguments", "outputs", "aliased", "temporary", "needed")
    rows = [(*header, "TFLOP", "GB accessed")]
    for p in result.programs:
        sizes = (p.arguments, p.outputs, p.aliased, p.temporary, p.bytes)
        rows.append(
            (
                p.name,
                *(f"{n / 1e9:.2f} GB" for n in sizes),
                "unknown" if p.flops is None else f"{p.flops / 1e12:.3f}",
                "unknown" if p.accessed is None else f"{p.accessed / 1e9:.1f}",
            )
        )
    out += timing.aligned(rows)
    for p in result.programs:
        if chip is not None:
            share = p.bytes / chip.memory
            out.append(f"{p.name}: {share:.0%} of the {chip.memory / 1e9:.0f} GB of a device.")
        for row in grouped(p.collectives):
            out.append(
                f"{p.name}: {row['count']} x {row['kind']} among {row['group']}, "
                f"{row['bytes'] / 1e6:.2f} MB"
            )
        out.append(f"{p.name}: a device sends {p.sent / 1e6:.1f} MB (ring).")
        if p.calls_host:
            out.append(f"{p.name}: CALLS THE HOST while it runs.")
        if p.square:
            out.append(f"{p.name}: a batch x batch array of {p.square / 1e6:.1f} MB is whole.")
        if guess := estimate(p, chip):
            out.append(
                f"{p.name}: an ESTIMATE from peak figures ({chip.source}), never measured: "
                f"compute {guess.compute * 1e3:.1f} ms, memory {guess.memory * 1e3:.1f} ms, links "
                f"{guess.links * 1e3:.1f} ms; at least {guess.overlapped * 1e3:.1f} ms a call."
            )
    out += [f"{name}: {sentence}." for name, sentence in result.failures.items()]
    return out


def grouped(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives by kind and group size: count, bytes of the arrays, bytes a device sends."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for c in found:
        row = rows.setdefault(
            (c.kind, c.group),
            {"kind": c.kind, "group": c.group, "count": 0, "bytes": 0, "sent": 0.0},
        )
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["sent"] += c.sent
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def to_json(result: Plan) -> dict[str, Any]:
    """The plan as plain values, with every collective by itself."""
    programs = []
    for p in result.programs:
        guess = estimate(p, result.chip)
        programs.append(
            {
                **{f.name: getattr(p, f.name) for f in dataclasses.fields(p)},
                "bytes": p.bytes,
                "sent": p.sent,
                "collectives": [c._asdict() for c in p.collectives],
                "grouped": grouped(p.collectives),
                "estimate_seconds": guess and {**guess._asdict(), "in_turn": guess.in_turn},
            }
        )
    return {
        "topology": result.topology,
        "devices": result.devices,
        "mesh": {"data": result.mesh[0], "model": result.mesh[1]},
        "batch_size": result.batch_size,
        "sharding": result.sharding,
        "chip": result.chip and result.chip._asdict(),
        "programs": programs,
        "failures": result.failures,
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
    }
