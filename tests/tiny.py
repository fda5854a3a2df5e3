"""The smallest configuration that has every part: the tests of the main job run it whole.

Its 16 steps end their epochs at 5, 11 and 16. It imports no jax at the top: as a `--config` file it
is read before flags are refused.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import ml_collections
import numpy as np

from itself_jax import config as config_lib
from itself_jax import interrupt

ROOT = pathlib.Path(__file__).resolve().parents[1]
EPOCH_ENDS = (5, 11, 16)
TRAIN_KEYS = {
    *("step", "epoch", "loss", "loss_tal", "loss_cid", "grad_norm", "learning_rate"),
    *("bank_image", "bank_text", "pairs_per_second"),
}


def get_config() -> ml_collections.ConfigDict:
    """Also a file for `--config`."""
    config = config_lib.default()
    config.dataset = "synthetic"
    config.synthetic.identities = (24, 6, 6)
    config.synthetic.images_per_identity = 2
    model = config.model
    model.image_size = (32, 16)
    model.patch_size = 8
    model.vision_width = model.text_width = 32
    model.vision_depth = model.text_depth = 2
    model.vision_heads = model.text_heads = 2
    model.embed_dim = 32
    model.text_length = 16
    config.local.dim = 32
    config.local.ats_horizon_steps = 12
    config.batch_size = 16
    config.num_epochs = 3
    config.warmup_epochs = 1
    config.optim.learning_rate = 1e-3
    config.optim.eps = 1e-8
    config.mesh.data = 1
    config.eval.batch_size = 16
    config.eval.watch = 0  # two programs less to compile; tests/test_watching.py has them
    config.log_every = 1
    return config


def configs(name: str) -> types.ModuleType:
    """The module `configs/NAME.py`."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(data_root: os.PathLike, **changes: object) -> config_lib.Config:
    """The configuration with changes such as `local__ats=False`."""
    config = get_config()
    config.data_root = str(data_root)
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    with config.ignore_type():
        config.update_from_flattened_dict(flat)
    return config_lib.from_dict(config)


class StopAt(interrupt.Interrupts):
    """A signal that comes just before the run looks for one the n-th time."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth

    def check(self) -> None:
        self._left -= 1
        self.requested |= self._left <= 0
        super().check()


def run(config: config_lib.Config, path: pathlib.Path) -> pathlib.Path:
    from itself_jax import train

    train.run(config, path, interrupt.Interrupts())
    return path


def metrics(path: pathlib.Path) -> list[dict]:
    text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def train_lines(path: pathlib.Path) -> list[dict]:
    return [line for line in metrics(path) if "split" not in line]


def results(path: pathlib.Path, name: str = "synthetic-test") -> dict:
    return json.loads((path / "results" / f"{name}.json").read_text(encoding="utf-8"))


def newest(path: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint's folder."""
    folders = [p for p in (path / "checkpoints").iterdir() if p.name.replace("-", "").isdigit()]
    return max(folders, key=lambda p: tuple(map(int, (p.name + "-0").split("-")[:2])))


def document(checkpoint: pathlib.Path) -> dict:
    import orbax.checkpoint as ocp

    return ocp.JsonCheckpointHandler().restore(checkpoint / "meta")


def arrays(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        tree = reader.restore(checkpoint / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(path: pathlib.Path, reference: pathlib.Path) -> None:
    """Metrics, results, and everything in the last checkpoint agree bit for bit."""
    for line, expected in zip(metrics(path), metrics(reference), strict=True):
        line.pop("pairs_per_second", None)
        expected.pop("pairs_per_second", None)
        assert line == expected
    assert results(path) == results(reference)
    assert document(newest(path))["meta"] == document(newest(reference))["meta"]
    got, expected = arrays(newest(path)), arrays(newest(reference))
    assert got.keys() == expected.keys()
    assert len(got) > 100
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name
    finished = "finished.json"
    assert json.loads((path / finished).read_text()) == json.loads(
        (reference / finished).read_text()
    )


def command(*arguments: object, config: object = "tests/tiny.py") -> list[str]:
    module = [sys.executable, "-m", "itself_jax.main"]
    return [*module, f"--config={config}", *map(str, arguments)]


def environment(cache: os.PathLike | None) -> dict[str, str]:
    """Of a command that shares compiled programs with this process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["JAX_NUM_CPU_DEVICES"] = "8"
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return env


def call(*arguments: object, cache: os.PathLike | None = None, **kwargs: object):
    """Runs the command to its end, with its output as text."""
    config = kwargs.pop("config", "tests/tiny.py")
    return subprocess.run(
        command(*arguments, config=config),
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


_MADE: dict = {}


def compile_once(monkeypatch) -> None:
    """Equal settings share one `Training` and its compiled functions, in all tests of a process."""
    import jax

    from itself_jax import step

    def canonical(config):
        return dataclasses.replace(
            config,
            dataset="synthetic",
            data_root=None,
            eval_datasets=(),
            init_from=None,
            eval=config_lib.Eval(batch_size=config.eval.batch_size),
            last_epoch=None,
            train_on_all=False,
            log_every=1,
            num_workers=0,
            seed=0,
        )

    make, compile_step, compile_encoders = step.make, step.compile_step, step.compile_encoders

    def cached_make(config, *, num_identities, steps_per_epoch):
        key = (canonical(config), num_identities, steps_per_epoch)
        if key not in _MADE:
            _MADE[key] = make(
                config, num_identities=num_identities, steps_per_epoch=steps_per_epoch
            )
        return _MADE[key]

    def cached(compile_it, kind):
        def compiled(training, template, mesh):
            key = (kind, id(training), mesh)
            if kind == "encoders":  # whatever else a run does
                config = training.config
                key = (kind, config.model, config.local, config.eval.batch_size, mesh)
                key += (jax.tree.structure(template),)
            if key not in _MADE:
                _MADE[key] = compile_it(training, template, mesh)
            return _MADE[key]

        return compiled

    monkeypatch.setattr(step, "make", cached_make)
    monkeypatch.setattr(step, "compile_step", cached(compile_step, "step"))
    monkeypatch.setattr(step, "compile_encoders", cached(compile_encoders, "encoders"))


def shared(tmp_path_factory) -> pathlib.Path:
    """A folder of this test session for `data`, `compiled` and reference runs."""
    folder = tmp_path_factory.getbasetemp() / "tiny"
    folder.mkdir(exist_ok=True)
    return folder
