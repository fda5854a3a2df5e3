"""What survives: restarts, damage, full disks and kills."""

import json
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itself_jax import checkpoint


def _state(value=0, *, width=16):
    """Every kind of leaf and container of a train state; about 100 kB, which differ by `value`."""
    generator = np.random.default_rng(value)
    params = {
        "encoder": {"kernel": jnp.asarray(generator.normal(size=(256, width)), jnp.float32)},
        "frozen": {"scale": jnp.full((3,), value, jnp.bfloat16)},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()},
            {"encoder": "train", "frozen": "freeze"},
        ),
    )
    gradients = jax.tree.map(lambda x: x * 0.1, params)
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    return {
        "step": jnp.array(value, jnp.int32),
        "params": params,
        "opt_state": opt_state,
        "table": generator.normal(size=(64, 64)).astype(np.float32),
    }


def _template(state):
    """As a restart would build it: shapes only."""
    return jax.eval_shape(lambda: state)


def _assert_equal_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def _folders(folder):
    return sorted(path.name for path in folder.iterdir())


def _finished(folder):
    """Without what a failed save may still be writing, which the next save removes."""
    return [name for name in _folders(folder) if "tmp" not in name]


def _largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def log():
    return []


@pytest.fixture
def saved(tmp_path, log):
    """A folder with steps 1 (the best) 2 and 3, each with its own state."""
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder, log=log.append) as checkpoints:
        for step, score in [(1, 9.0), (2, 2.0), (3, 3.0)]:
            checkpoints.save(step, _state(step), {"score": score})
    assert _folders(folder) == ["1", "2", "3"]
    return folder


def test_a_state_comes_back_bit_for_bit_with_its_meta(tmp_path):
    state = _state(7)
    state["params"]["encoder"]["kernel"] = (
        state["params"]["encoder"]["kernel"].at[0, :3].set(jnp.array([-0.0, jnp.nan, jnp.inf]))
    )
    meta = {"epoch": 2, "score": None, "data": {"position": 12}, "best": 41.25, "rng": [1, 2]}
    with checkpoint.Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore_latest(_template(state)) is None
        assert checkpoints.restore_best(("params",)) is None
        assert not (tmp_path / "new").exists()
        checkpoints.save(7, state, meta)
        restored = checkpoints.restore_latest(_template(state))
    assert restored.step == 7
    assert restored.meta == meta
    assert isinstance(restored.state["step"], jax.Array)
    assert restored.state["step"].dtype == jnp.int32
    _assert_equal_bits(restored.state, state)


def test_the_best_and_the_last_two_steps_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step, score in enumerate([1.0, 3.0, 2.0, 3.0, 0.0], start=1):
            checkpoints.save(step, _state(step), {"score": score})
        checkpoints.wait()
        # Steps 2 and 4 are equally good: the earlier one stays the best.
        assert _folders(folder) == ["2", "4", "5"]
        assert checkpoints.restore_best(("params",)).step == 2

    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_best(("params",)).step == 2
        checkpoints.save(6, _state(6), {"score": 3.0})
        checkpoints.save(7, _state(7), {"score": 3.5})
        checkpoints.save(8, _state(8), {"score": -1.0})
        checkpoints.save(9, _state(9), {"score": float("nan")})
        checkpoints.wait()
        assert _folders(folder) == ["7", "8", "9"]
        best = checkpoints.restore_best(("params",))
        assert (best.step, best.meta) == (7, {"score": 3.5})
        assert checkpoints.restore_latest(_template(_state())).step == 9


def test_every_scored_step_is_kept_on_request_and_found_by_its_number(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_scored=True) as checkpoints:
        for step, score in enumerate((3.0, 1.0, None, 2.0, None, None), start=1):
            checkpoints.save(step, _state(step), {"score": score})
        checkpoints.wait()
        # The third has no score and is not among the last two.
        assert _folders(tmp_path) == ["1", "2", "4", "5", "6"]
        assert checkpoints.restore_best(("params",)).step == 1
        found = checkpoints.restore_best(("params",), step=2)
        assert (found.step, found.meta) == (2, {"score": 1.0})
        _assert_equal_bits(found.state["params"], jax.device_get(_state(2)["params"]))
        assert checkpoints.restore_best(("params",), step=3) is None


def test_a_step_without_a_score_is_never_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step), {"score": None})
        checkpoints.wait()
        assert _folders(folder) == ["2", "3"]
        assert checkpoints.restore_best(("params",)) is None
        checkpoints.save(4, _state(4), {"score": -5.0})
        for step in (5, 6, 7):
            checkpoints.save(step, _state(step), {})
        checkpoints.wait()
        assert _folders(folder) == ["4", "6", "7"]
        assert checkpoints.restore_best(("params",)).step == 4


def test_a_step_saved_again_replaces_itself_and_counts_once(tmp_path):
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(1, _state(1), {"score": 1.0})
        checkpoints.save(2, _state(2), {"score": None})
        checkpoints.save(2, _state(20), {"score": 5.0})
        checkpoints.wait()
        assert _folders(folder) == ["1", "2-1"]
        checkpoints.save(3, _state(3), {"score": None})
        checkpoints.save(3, _state(30), {"score": None})
        checkpoints.save(3, _state(31), {"score": 0.0})
        checkpoints.save(4, _state(4), {"score": 0.0})
    assert _folders(folder) == ["2-1", "3-2", "4"]

    with checkpoint.Checkpoints(folder) as checkpoints:
        best = checkpoints.restore_best(("params",))
        assert (best.step, best.meta) == (2, {"score": 5.0})
        _assert_equal_bits(best.state["params"], jax.device_get(_state(20)["params"]))
        checkpoints.save(4, _state(40), {"score": 6.0})
        latest = checkpoints.restore_latest(_template(_state()))
    assert (latest.step, latest.meta) == (4, {"score": 6.0})
    _assert_equal_bits(latest.state, _state(40))


def test_a_checkpoint_of_one_device_restores_onto_eight_shards_and_back(tmp_path):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs several devices: jax_num_cpu_devices")
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharded(x):
        spec = ("data",) if x.ndim and x.shape[0] % len(devices) == 0 else ()
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = _state(1)
    template = jax.tree.map(sharded, state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        spread = checkpoints.restore_latest(template).state
        kernel = spread["params"]["encoder"]["kernel"]
        assert kernel.sharding == template["params"]["encoder"]["kernel"].sharding
        assert kernel.addressable_shards[0].data.shape == (256 // len(devices), 16)
        _assert_equal_bits(spread, state)
        checkpoints.save(2, spread, {})
        gathered = checkpoints.restore_latest(_template(state)).state
    assert len(gathered["params"]["encoder"]["kernel"].sharding.device_set) == 1
    _assert_equal_bits(gathered, state)


def test_buffers_may_be_donated_and_overwritten_right_after_save(tmp_path):
    def fresh():
        return {
            "weights": jnp.arange(2_000_000.0),
            "table": np.arange(500_000),
            "gone": jnp.ones(9),
        }

    train_step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = fresh()
    jax.block_until_ready(train_step(jnp.zeros(2_000_000)))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        weights = state["weights"]
        for _ in range(5):
            weights = train_step(weights)
        state["table"][:] = -1
        state["gone"].delete()
        jax.block_until_ready(weights)
        # On a CPU the donation may be refused, as Orbax still holds the buffer: equally safe.
        state["weights"].delete()
        restored = checkpoints.restore_latest(fresh())
    _assert_equal_bits(restored.state, fresh())


def test_a_flipped_bit_is_noticed_and_the_older_step_used(saved, log):
    data = _largest_file(saved / "3" / "state")
    _flip_bit(data, data.stat().st_size // 2)
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        restored = checkpoints.restore_latest(_template(_state()))
        assert restored.step == 2
        assert restored.meta == {"score": 2.0, "damaged_steps": [3]}
        _assert_equal_bits(restored.state, _state(2))
        assert len(log) == 2
        assert "step 3) is damaged" in log[0]
        assert "restored step 2 instead" in log[1]
        # Nothing is lost, and the step number is free again.
        assert _folders(saved) == ["1", "2", "damaged-3"]
        checkpoints.save(3, _state(33), {"score": 4.0})
        assert checkpoints.restore_latest(_template(_state())).meta == {"score": 4.0}
    assert _folders(saved) == ["1", "2", "3", "damaged-3"]


def test_a_changed_value_that_orbax_restores_without_complaint_is_noticed(saved, log, monkeypatch):
    """Bits can also change where no format check looks: here between Orbax and our checksum."""
    real = checkpoint.ocp.StandardCheckpointHandler.restore

    def flip(self, directory, *args, **kwargs):
        state = real(self, directory, *args, **kwargs)
        if "/3/" in str(directory):
            kernel = state["params"]["encoder"]["kernel"]
            state["params"]["encoder"]["kernel"] = kernel.at[17, 3].multiply(1.0000001)
        return state

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "restore", flip)
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        assert checkpoints.restore_latest(_template(_state())).step == 2
    assert "params/encoder/kernel does not match its checksum" in log[0]


def _truncate_json(step_folder):
    path = step_folder / "meta" / "metadata"
    path.write_text(path.read_text()[:-20])


def _edit_json(step_folder):
    path = step_folder / "meta" / "metadata"
    document = json.loads(path.read_text())
    document["meta"]["score"] = 99.0
    path.write_text(json.dumps(document))


def _delete_json(step_folder):
    (step_folder / "meta" / "metadata").unlink()


def _delete_data(step_folder):
    # All of it: which array lies in which file differs from save to save.
    files = [p for p in (step_folder / "state").rglob("d/*") if p.is_file()]
    assert files
    for path in files:
        path.unlink()


def _delete_tree_description(step_folder):
    (step_folder / "state" / "_METADATA").unlink()


def _empty(step_folder):
    for path in step_folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


_DAMAGE = [_truncate_json, _edit_json, _delete_json, _delete_data, _delete_tree_description, _empty]


@pytest.mark.parametrize("damage", _DAMAGE)
def test_any_damage_falls_back_to_the_older_step(saved, log, damage):
    damage(saved / "3")
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        restored = checkpoints.restore_latest(_template(_state()))
        assert restored.step == 2
        assert "step 3) is damaged" in log[0]
        assert all(len(line) < 500 and "\n" not in line for line in log)
        checkpoints.save(3, _state(3), {"score": 3.0})
        assert checkpoints.restore_latest(_template(_state())).step == 3


def test_several_damaged_steps_are_skipped_and_kept_under_names_of_their_own(saved, log):
    for step in ("2", "3"):
        _delete_data(saved / step)
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        restored = checkpoints.restore_latest(_template(_state()))
        assert (restored.step, restored.meta["damaged_steps"]) == (1, [2, 3])
        checkpoints.save(2, _state(2), {})
        checkpoints.wait()
        _delete_data(saved / "2")
        assert checkpoints.restore_latest(_template(_state())).step == 1
    assert _folders(saved) == ["1", "damaged-2", "damaged-2.2", "damaged-3"]


def test_a_damaged_older_step_does_not_stop_saving(saved):
    _empty(saved / "1")
    _empty(saved / "2")
    with checkpoint.Checkpoints(saved) as checkpoints:
        assert checkpoints.restore_latest(_template(_state())).step == 3
        checkpoints.save(4, _state(4), {"score": 1.0})
    assert _folders(saved) == ["3", "4"]


def test_a_damaged_best_gives_way_to_the_next_best_and_stays_where_it_is(saved, log):
    _delete_data(saved / "1")
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        restored = checkpoints.restore_best(("params",))
        assert restored.meta == {"score": 3.0, "damaged_steps": [1]}
        assert restored.step == 3
        assert "step 1) is damaged" in log[0]
        _truncate_json(saved / "3")
        assert checkpoints.restore_best(("params",)).meta["damaged_steps"] == [1, 3]
    assert _folders(saved) == ["1", "2", "3"]


def test_parts_of_the_best_are_read_without_the_rest_and_without_a_template(saved, log):
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        parts = checkpoints.restore_best(("params",)).state
        assert parts.keys() == {"params"}
        _assert_equal_bits(parts["params"], jax.device_get(_state(1)["params"]))
        table = checkpoints.restore_best(("table", "step")).state
    assert table.keys() == {"step", "table"} and table["step"] == 1
    np.testing.assert_array_equal(table["table"], _state(1)["table"])


def test_when_every_checkpoint_is_damaged_the_error_says_what_to_do(saved):
    for step in ("1", "2", "3"):
        _delete_data(saved / step)
    with checkpoint.Checkpoints(saved) as checkpoints:
        for restore in (
            lambda: checkpoints.restore_latest(_template(_state())),
            lambda: checkpoints.restore_best(("params",)),
        ):
            with pytest.raises(checkpoint.CheckpointError, match="all 3 checkpoints in") as caught:
                restore()
            assert str(saved) in str(caught.value)
            assert "backup" in str(caught.value)
    assert _folders(saved) == ["1", "2", "3"]


def test_another_model_size_is_named_and_no_file_is_touched(saved, log):
    def listing():
        return {p: p.stat().st_mtime_ns for p in saved.rglob("*")}

    before = listing()
    with checkpoint.Checkpoints(saved, log=log.append) as checkpoints:
        with pytest.raises(
            checkpoint.CheckpointError,
            match=r"kernel is float32\[256, 16\] in the checkpoint and float32\[256, 24\] here",
        ):
            checkpoints.restore_latest(_template(_state(width=24)))
        template = _template(_state())
        template["params"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
        with pytest.raises(checkpoint.CheckpointError, match="params/extra is no such array in"):
            checkpoints.restore_latest(template)
        del template["params"]["extra"], template["params"]["frozen"]
        with pytest.raises(checkpoint.CheckpointError, match="frozen/scale .* no such array here"):
            checkpoints.restore_latest(template)
        template = _template(_state())
        template["step"] = jax.ShapeDtypeStruct((), jnp.float32)
        with pytest.raises(checkpoint.CheckpointError, match=r"step is int32\[\] in .* float32"):
            checkpoints.restore_latest(template)
    assert listing() == before
    assert log == []


def test_what_cannot_be_saved_is_refused_by_name_before_anything_is_written(tmp_path):
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        with pytest.raises(TypeError, match="model/name is str"):
            checkpoints.save(1, {"model": {"name": "vit"}}, {})
        with pytest.raises(TypeError, match=r"rng is key<fry>.*jax.random.key_data"):
            checkpoints.save(1, {"rng": jax.random.key(0)}, {})
        with pytest.raises(TypeError, match="not JSON: .*PosixPath"):
            checkpoints.save(1, _state(), {"path": pathlib.Path("x")})
        with pytest.raises(TypeError, match="must be a number or None, got '3'"):
            checkpoints.save(1, _state(), {"score": "3"})
    assert not folder.exists()


def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(tmp_path, log):
    folder = tmp_path / "checkpoints"
    big = {"weights": np.random.default_rng(0).normal(size=200_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.Checkpoints(folder, log=log.append) as checkpoints:
        checkpoints.save(1, big, {"score": 1.0})
        checkpoints.save(2, big, {"score": 0.5})
        checkpoints.save(3, big, {"score": 0.5})
        checkpoints.wait()
        # Writing past the limit fails as a full disk does: in the background, after save().
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            checkpoints.save(4, big, {"score": 2.0})
            with pytest.raises(checkpoint.CheckpointError) as caught:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        message = str(caught.value)
        assert message.startswith(f"step 4 could not be saved in {folder}: ")
        assert "File too large" in message
        assert "free space" in message
        assert _finished(folder) == ["1", "2", "3"]
        assert checkpoints.restore_latest(big).step == 3
        assert checkpoints.restore_best(("weights",)).step == 1
        # Once there is space again, the same object goes on.
        checkpoints.save(4, big, {"score": 2.0})
    assert _folders(folder) == ["3", "4"]


def test_a_failed_save_is_reported_by_the_next_one_and_by_closing(tmp_path, monkeypatch, log):
    async def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.JsonCheckpointHandler, "_save_fn", fail)
    checkpoints = checkpoint.Checkpoints(tmp_path, log=log.append)
    checkpoints.save(1, _state(), {})
    with pytest.raises(checkpoint.CheckpointError, match="step 1 .* No space left on device"):
        checkpoints.save(2, _state(), {})
    checkpoints.save(2, _state(), {})
    with pytest.raises(checkpoint.CheckpointError, match="step 2 .* No space left on device"):
        checkpoints.close()
    checkpoints.close()
    # An exception that is on its way already is not replaced, but the lost save is still told.
    with pytest.raises(KeyError, match="bug"):
        with checkpoint.Checkpoints(tmp_path, log=log.append) as checkpoints:
            checkpoints.save(3, _state(), {})
            raise KeyError("bug")
    assert len(log) == 1
    assert "step 3 could not be saved" in log[0]
    assert _finished(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="NotADirectoryError") as caught:
            checkpoints.save(1, _state(), {})
    assert str(folder) in str(caught.value)


_KILLED = """
    import os, pathlib, signal, sys
    import numpy as np
    from itself_jax import checkpoint

    checkpoints = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]))
    state = {"weights": np.random.default_rng(0).normal(size=8_000_000)}
    checkpoints.save(1, state, {"score": 1.0})
    checkpoints.wait()
    checkpoints.save(2, state, {"score": 2.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    root = pathlib.Path(checkpoint.__file__).parent.parent
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path)]
    done = subprocess.run(command, cwd=root, timeout=120, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout + done.stderr == ""
    assert len(_folders(tmp_path)) == 2  # Step 1, and the beginning of step 2.
    template = {"weights": np.zeros(8_000_000)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(template)
        assert restored.step == 1
        assert restored.meta == {"score": 1.0}
        assert len(_folders(tmp_path)) == 2  # Reading removes nothing.
        checkpoints.save(2, restored.state, {"score": 2.0})
    assert _folders(tmp_path) == ["1", "2"]


def test_closing_waits_for_the_last_save_and_nothing_is_printed(tmp_path, capfd):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weights": np.ones(2_000_000)}, {})
    assert _folders(tmp_path) == ["1"]
    assert capfd.readouterr() == ("", "")


def test_a_relative_folder_is_where_the_program_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with checkpoint.Checkpoints(pathlib.Path("checkpoints")) as checkpoints:
        checkpoints.save(1, _state(), {})
    assert _folders(tmp_path / "checkpoints") == ["1"]
