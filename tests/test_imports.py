"""Layers stay apart, and the model needs no data library."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "itself_jax"
PURE = {
    *("jax", "flax", "numpy", "jaxtyping"),
    *("typing", "collections", "functools", "math", "dataclasses"),
}
DATA_FREE = (
    *("itself_jax", "itself_jax.config", "itself_jax.losses", "itself_jax.optim"),
    *("itself_jax.sharding", "itself_jax.step", "itself_jax.models.itself"),
    *("itself_jax.evaluate", "itself_jax.retrieval"),
    *("itself_jax.bench", "itself_jax.workloads", "itself_jax.comparing"),
)


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            inside = node.module.split(".")[0] == "itself_jax"
            found |= {f"{node.module}.{a.name}" if inside else node.module for a in node.names}
    return found


def pure_files() -> list[pathlib.Path]:
    return [PACKAGE / "losses.py", PACKAGE / "retrieval.py", *sorted(PACKAGE.glob("models/*.py"))]


@pytest.mark.parametrize("path", pure_files(), ids=lambda path: path.stem)
def test_models_losses_and_metrics_import_jax_and_flax_only(path):
    ours = ("itself_jax.config", "itself_jax.losses", "itself_jax.models", "itself_jax.sharding")
    for name in imports(path):
        allowed = name.startswith(ours) or name.split(".")[0] in PURE
        assert allowed, f"{path.name} imports {name}"
        # Which mesh there is, is the business of one module.
        assert not name.startswith("jax.sharding"), f"{path.name} imports {name}"


def test_sharding_knows_axes_and_settings_only():
    for name in imports(PACKAGE / "sharding.py"):
        allowed = name.startswith("itself_jax.config") or name.split(".")[0] in {*PURE, "re"}
        assert allowed, f"sharding.py imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("data/*.py")), ids=lambda path: path.stem)
def test_data_never_imports_jax_or_the_models(path):
    for name in imports(path):
        assert name.split(".")[0] not in ("jax", "flax", "optax"), f"{path.name} imports {name}"
        assert not name.startswith(("itself_jax.models", "itself_jax.losses", "itself_jax.step"))


def test_the_walk_sees_imports_inside_functions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import os.path\ndef f():\n    from itself_jax import data\n")
    assert imports(path) == {"os.path", "itself_jax.data"}


def test_training_step_and_evaluation_import_without_data_libraries():
    """In a fresh interpreter where the data libraries cannot be imported."""
    blocked = ("grain", "tensorflow_datasets", "array_record", "tensorflow")
    code = f"import sys\nfor n in {blocked!r}: sys.modules[n] = None\n"
    code += "".join(f"import {name}\n" for name in DATA_FREE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_training_imports_without_what_only_a_report_needs():
    code = "import sys\nfor n in ('matplotlib', 'jinja2'): sys.modules[n] = None\n"
    code += "import itself_jax.main\nimport itself_jax.train\nimport itself_jax.evaluate\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_block_is_felt():
    code = "import sys\nsys.modules['grain'] = None\nimport itself_jax.data.pipeline\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "grain" in done.stderr
