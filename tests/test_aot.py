"""What a compiler says about a program is read right, and the step sends what it should."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from itself_jax import aot, step
from itself_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]


# --- the text of a program --------------------------------------------------------------------

TPU = """
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (p: f32[64,8]) -> f32[8,8] {
  %all-reduce.9 = f32[64,8]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[2,8]<=[16], use_global_device_ids=true, to_apply=%add
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.2 = f32[4]{0:T(128)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, metadata={op_name="jit(step)/grad" stack_frame_id=1}
}

ENTRY %main (a: f32[2,3]) -> f32[16,3] {
  %all-gather.1 = f32[16,3]{1,0:T(8,128)} all-gather(%a), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
  %fusion = f32[8,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %permute = bf16[10]{0} collective-permute(%c), source_target_pairs={{0,1},{1,0}}
  %alone = f32[7]{0} all-reduce(%d), replica_groups={{0},{1}}, to_apply=%add
  ROOT %all-reduce.3 = (f32[3]{0}, /*index=1*/pred[5]{0}) all-reduce(%e, %f), replica_groups={}, to_apply=%add
}
"""  # noqa: E501
CHAINED = """
%fused.1 (p: f32[2,4]) -> f32[16,4] {
  %all-gather.1 = f32[16,4]{1,0} all-gather(%p), replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %s = f32[16,4]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: f32[2,4], q: bf16[9]) -> (bf16[9], f32[16,4]) {
  %all-gather.2 = f32[16,4]{1,0} all-gather(%p), replica_groups={}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.3 (p: f32[2,8], q: bf16[9]) -> (bf16[9], f32[16,8]) {
  %all-gather.3 = f32[16,8]{1,0} all-gather(%p), replica_groups={}, frontend_attributes={chain_id="1"}
}
"""  # noqa: E501
GPU = """
ENTRY %main (a: f32[32,512]) -> f32[256,512] {
  %all-gather-start = ((f32[32,512]{1,0}, s32[32]{0}), (f32[256,512]{1,0}, s32[256]{0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %all-gather-done = (f32[256,512]{1,0}, s32[256]{0}) all-gather-done(%all-gather-start)
  %all-reduce-start.2 = bf16[2048]{0} all-reduce-start(%c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %all-reduce-done.2 = bf16[2048]{0} all-reduce-done(%all-reduce-start.2)
  %reduce-scatter-start = (f32[256]{0}, f32[32]{0}) reduce-scatter-start(%d), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
    """Sizes by hand: 16·3·4; 64·8·4, of which each keeps a part; 4·4, five times; 2·10; 3·4 + 5."""
    found = [c[:4] for c in aot.collectives(TPU, 16)]
    assert found == [
        ("reduce-scatter", 2048, 8, 1),
        ("all-reduce", 16, 4, 5),
        ("all-gather", 192, 8, 1),
        ("collective-permute", 20, 2, 1),
        ("all-reduce", 17, 16, 1),  # {}: all devices; the one among single devices is none
    ]
    assert aot.collectives(TPU, 16)[1].source == "jit(step)/grad"


def test_a_collective_behind_a_chain_of_operations_counts_once():
    found = [c[:4] for c in aot.collectives(CHAINED, 8)]
    assert found == [("all-gather", 256, 8, 1), ("all-gather", 512, 8, 1)]


def test_asynchronous_collectives_of_a_gpu_program_count_once():
    found = [c[:4] for c in aot.collectives(GPU, 8)]
    assert found == [
        ("all-gather", 256 * 512 * 4 + 256 * 4, 8, 1),
        ("all-reduce", 4096, 8, 1),
        ("reduce-scatter", 1024, 8, 1),
    ]


def test_bytes_that_a_device_sends_in_a_ring():
    """Eight devices: 7/8 of the array, twice for an all-reduce, and all of it to a neighbour."""
    sent = [aot.Collective(kind, 800, 8, 3, "").sent for kind in aot.KINDS]
    by_kind = dict(zip(aot.KINDS, sent, strict=True))
    assert by_kind["all-reduce"] == 3 * 1400
    assert by_kind["all-gather"] == by_kind["reduce-scatter"] == 3 * 700
    assert by_kind["collective-permute"] == 3 * 800


@pytest.mark.parametrize(
    "line, calls",
    [
        ('%c = f32[] custom-call(%a), custom_call_target="xla_ffi_python_cpu_callback"', True),
        ("%s = (f32[2], u32[], token[]) send(%a, %t), is_host_transfer=true", True),
        ("%i = ((f32[2]), token[]) infeed(%t)", True),
        ('%c = f32[] custom-call(%a), custom_call_target="TopK"', False),
    ],
)
def test_calls_to_the_host_are_seen(line, calls):
    assert aot.calls_host(line) is calls


def test_whole_batch_by_batch_arrays_are_seen():
    text = "%a = f32[32,16]{1,0} b(%c), f32[1,16,16]{2,1,0} d(%e), pred[16,16]{1,0} f(%g)"
    assert aot.square_bytes(text, 16, []) == 16 * 16 * 4
    assert aot.square_bytes(text, 32, []) == 0
    assert aot.square_bytes(text, 16, [(16, 16)]) is None  # a weight looks the same


# --- the largest batch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, start, expected",
    [
        (1000, 256, aot.Search(992, 1024, 7)),  # 256 512 1024 768 896 960 992: no multiple between
        (100, 256, aot.Search(96, 128, 4)),  # 256 128 64 96
        (10, 64, aot.Search(None, 32, 2)),
        (10**9, 64, aot.Search(64 * 2**7, None, 8)),
    ],
)
def test_the_largest_batch_is_found_in_few_tries(limit, start, expected):
    tried = []

    def fits(batch_size):
        tried.append(batch_size)
        return batch_size <= limit

    assert aot.largest_batch(fits, start=start, unit=32, tries=8) == expected
    assert len(tried) == len(set(tried)) and all(size % 32 == 0 for size in tried)


# --- the step of this program -----------------------------------------------------------------

CONFIG = config_lib.Config(
    model=config_lib.Model(
        patch_size=8,
        image_size=(32, 16),
        vision_width=64,
        vision_depth=1,
        vision_heads=4,
        text_width=64,
        text_depth=1,
        text_heads=4,
        text_length=12,
        vocab_size=320,
        embed_dim=32,
    ),
    local=config_lib.Local(dim=512, ats_horizon_steps=4),
    batch_size=24,  # no other size of this model
    eval=config_lib.Eval(batch_size=16),
    num_epochs=8,
)
IDENTITIES = 5


@pytest.fixture(scope="module")
def result() -> aot.Plan:
    return aot.plan(CONFIG, aot.find_topology("cpu:8"), IDENTITIES)


def assert_data_parallel(program: dict, config: config_lib.Config, weights: dict[str, int]) -> None:
    """Every collective of a purely data-parallel step has one of four reasons.

    program: as in the JSON. weights: bounds on the bytes of its gradients, of `gradient_bytes`.
    """
    total = dict.fromkeys(aot.KINDS, 0)
    for c in program["collectives"]:
        total[c["kind"]] += c["times"] * c["bytes"]
    b, width = config.batch_size, config.model.embed_dim + config.local.dim
    features = 2 * 4 * b * width  # both modalities, float32; where they were bfloat16, half of it
    ids = 4 * b
    # Over many devices the TPU compiler does some of the gathering and of the scattering of their
    # gradients by all-reduce.
    gathered, scattered = total.pop("all-gather"), total.pop("reduce-scatter")
    assert gathered <= features + ids and scattered <= features
    otherwise = 2 * features + ids - gathered - scattered
    if program["collectives"][0]["group"] == 8:
        assert gathered > features / 2 and scattered == features
        otherwise = 0
    # BatchNorm: mean, variance, and three sums of the backward pass, on both sides.
    batch_norm = 2 * 5 * 4 * (config.local.dim // 2)
    # Loss and gradient norm, largest label, "is there another identity", the first label.
    scalars = 512 + ids
    reduced = total.pop("all-reduce")
    assert weights["least"] <= reduced <= weights["most"] + batch_norm + scalars + otherwise
    assert set(total.values()) == {0}
    assert not program["calls_host"]
    assert program["square"] == 0


def gradient_bytes(config: config_lib.Config, identities: int) -> dict[str, int]:
    """Bounds on what is reduced over the devices.

    least: the towers and GRAB in the compute type, the classifiers in float32. most: all in
    float32, and the classifiers twice: they see both orders of a pair or both modalities, and not
    every compiler adds the two gradients before it sends them.
    """
    training = step.make(config, num_identities=identities, steps_per_epoch=(3,) * 60)
    shapes = jax.eval_shape(lambda: training.init(0)).params
    narrow = step.compute_dtype(config.precision).itemsize
    least = most = 0
    trained = jax.tree.leaves(training.trained)
    for (path, leaf), counts in zip(
        jax.tree_util.tree_leaves_with_path(shapes), trained, strict=True
    ):
        if counts:
            name = jax.tree_util.keystr(path)
            least += leaf.size * (4 if "_heads" in name else narrow)
            most += 4 * leaf.size * (2 if "_heads" in name else 1)
    return {"least": least, "most": most}


def test_a_data_parallel_step_sends_gradients_features_and_sums_only(result):
    document = aot.to_json(result)
    program = document["programs"][0]
    assert program["name"] == "step" and document["mesh"] == {"data": 8, "model": 1}
    assert_data_parallel(program, CONFIG, gradient_bytes(CONFIG, IDENTITIES))


def test_encoders_send_their_embeddings_only(result):
    """Every host gets all embeddings: (32 + 512) float32 numbers of 16 rows."""
    for program in result.programs[1:]:
        assert [c.kind for c in program.collectives] == ["all-gather"] * len(program.collectives)
        assert sum(c.bytes for c in program.collectives) == 16 * (32 + 512) * 4


def test_memory_is_the_state_and_what_the_compiler_adds(result):
    program = result.programs[0]
    training = step.make(CONFIG, num_identities=IDENTITIES, steps_per_epoch=(3,) * 60)
    state = jax.eval_shape(lambda: training.init(0))
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    rows = 24 // 8 * (32 * 16 * 3 + 4 * 4 + 12 * 4 + 4)
    assert program.arguments == pytest.approx(bytes_of_state + rows, rel=1e-3)
    assert program.aliased == pytest.approx(bytes_of_state, rel=1e-3)  # updated in place
    assert program.bytes == program.arguments + program.outputs - program.aliased + (
        program.temporary
    )
    assert program.temporary > 0 and program.flops > 0


def test_the_table_names_programs_and_says_that_nothing_was_run(result):
    text = "\n".join(aot.lines(result))
    assert "cpu:8: 8 devices (data=8, model=1), batch_size=24" in text
    assert "Compiled, not run." in text
    assert re.search(r"step: 4 x reduce-scatter among 8, 0\.10 MB", text)
    assert "estimate" not in text.lower()  # no peak figures are known of a CPU


def test_an_estimate_is_the_vendors_peak_figures_and_says_so(result):
    chip = aot.Chip(16e9, 1e12, 1e9, 1e8, "https://example.org/chip")
    program = result.programs[0]
    guess = aot.estimate(program, chip)
    assert guess.compute == program.flops / 1e12 and guess.links == program.sent / 1e8
    assert guess.in_turn >= guess.overlapped == max(guess)
    elsewhere = aot.dataclasses.replace(result, chip=chip)
    text = "\n".join(aot.lines(elsewhere))
    assert "an ESTIMATE from peak figures (https://example.org/chip), never measured" in text


def test_peak_figures_name_their_source():
    for chip in aot.CHIPS.values():
        assert chip.source.startswith("https://") and min(chip[:4]) > 0


# --- what cannot be compiled for --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e", "topology 'v5e' is unknown: expected CHIP:SHAPE"),
        ("v9z:2x2", "with a chip of v5e, v6e, v5p, h100 or cpu"),
        ("v5e:0x4", "topology 'v5e:0x4' is unknown"),
        ("cpu:2x4", "cpu takes a number of devices, e.g. cpu:8"),
        ("cpu:9", "needs 9 virtual devices, but this process has 8: set JAX_NUM_CPU_DEVICES=9"),
    ],
)
def test_unknown_topologies_are_refused(name, message):
    with pytest.raises(aot.AotError, match=re.escape(message)):
        aot.find_topology(name)


@pytest.mark.parametrize(
    "name, module, extra", [("v5e:2x4", "libtpu", "aot"), ("h100:8", "jax_cuda12", "aot-cuda")]
)
def test_a_missing_compiler_is_named_with_its_extra(monkeypatch, name, module, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aot.AotError, match=rf"{module}.*pip install 'itself_jax\[{extra}\]'"):
        aot.find_topology(name)


def test_what_does_not_fit_is_a_sentence(monkeypatch):
    def compile_step(*_):
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.17G of 15.75G hbm."
        )

    monkeypatch.setattr(step, "compile_step", compile_step)
    result = aot.plan(CONFIG, aot.find_topology("cpu:8"), IDENTITIES, only=["step"])
    sentence = "does not fit the memory of a device: it needs 40.17G of 15.75G"
    assert result.programs == () and result.failures == {"step": sentence}
    assert f"step: {sentence}." in aot.lines(result)


def test_other_errors_of_a_compiler_are_not_swallowed(monkeypatch):
    def compile_step(*_):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(step, "compile_step", compile_step)
    with pytest.raises(RuntimeError, match="something else"):
        aot.plan(CONFIG, aot.find_topology("cpu:8"), IDENTITIES, only=["step"])


def bench(*arguments: str, config: str = "tests/tiny.py", timeout: int = 300):
    return subprocess.run(
        [sys.executable, "-m", "itself_jax.bench", f"--config={config}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fly"], "startup, all, compare, aot expected, got fly"),
        ([], "one command of train, encode, eval"),
        (["aot"], "--topology is required, e.g. --topology=v5e:16x16"),
        (["aot", "--topology=cpu:8", "--programs=steps"], "--programs=steps: must be some of step"),
        (["aot", "--config.batchsize=8"], "Did you mean 'batch_size'?"),
    ],
)
def test_bad_flags_are_rejected(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "plan.json"
    done = bench(
        *("aot", "--topology=cpu:8", "--identities=24", f"--json={path}"),
        *("--programs=text encoder", "--config.mesh.data=8"),
    )
    assert done.returncode == 0, done.stderr
    assert "text encoder" in done.stdout
    document = json.loads(path.read_text())
    assert document["devices"] == 8 and document["topology"] == "cpu:8"
    (program,) = document["programs"]
    assert program["name"] == "text encoder" and program["bytes"] > 0
    # The rows are back on every host: 16 of (32 + 32) float32 numbers.
    assert sum(row["bytes"] for row in program["grouped"]) == 16 * 64 * 4


# --- the real compiler for real pods ----------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'itself_jax[aot]'",
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "topology, batch_size, devices", [("v5e:2x4", 256, 8), ("v5e:16x16", 8192, 256)]
)
def test_the_full_step_fits_a_real_pod(tmp_path, topology, batch_size, devices):
    """ViT-B/16 on 384x128, 11,003 identities, MARS and ATS in bfloat16. Four minutes each."""
    path = tmp_path / "plan.json"
    done = bench(
        *("aot", f"--topology={topology}", "--programs=step", f"--json={path}"),
        *(f"--config.batch_size={batch_size}", "--config.eval.batch_size=256"),
        config="configs/cuhk.py",
        timeout=7200,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    (program,) = document["programs"]
    assert document["devices"] == devices
    assert 3.5e9 < program["bytes"] < 15.75 * 2**30  # what a v5e's compiler allows
    config = config_lib.Config(batch_size=batch_size, precision="bfloat16")
    assert_data_parallel(program, config, gradient_bytes(config, 11003))


def test_the_batch_of_the_small_step_is_no_size_of_its_weights():
    """Or the search for a batch x batch array would be blind."""
    training = step.make(CONFIG, num_identities=IDENTITIES, steps_per_epoch=(3,) * 60)
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda: training.init(0)).params)]
    assert CONFIG.batch_size not in np.concatenate(shapes)
