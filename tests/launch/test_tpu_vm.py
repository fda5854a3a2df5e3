"""`launch/tpu_vm.sh` against a gcloud that keeps one TPU of four workers in a folder."""

import re
import shutil
import signal
import subprocess
import tarfile

import launching
import pytest

HERE = ("--name=itself", "--zone=us-west4-a")
TYPE = ("--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite", "--poll=0")
JOB = ("--", "--config=configs/cuhk.py", "--workdir=gs://bucket/runs/a b's")
RUN = (*HERE, *TYPE, *JOB)
ZONE = "--zone=us-west4-a"
BILLED = (
    "tpu_vm.sh: itself is still there and billed; to end that:"
    " launch/tpu_vm.sh --action=delete --name=itself --zone=us-west4-a"
)

WORKER = 'words="$*"; worker=${words##*--worker=}'
GCLOUD = r"""
absent() { echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found" >&2; exit 1; }
case "$*" in
    *"tpu-vm describe"*networkEndpoints*) printf '10.0.0.%s\n' 1 2 3 4 ;;
    *"tpu-vm describe"*) cat state 2>/dev/null || absent ;;
    *"queued-resources describe"*) cat request 2>/dev/null || absent ;;
    *"tpu-vm create"*) echo READY >state ;;
    *"queued-resources create"*) echo ACTIVE >request; echo READY >state ;;
    *"tpu-vm delete"*) rm state ;;
    *"queued-resources delete"*) rm -f request state worker? ;;
    *"tpu-vm scp"*--worker=0) cp "$5" copied.tar.gz ;;
    *--action=start*) echo "ended 0" >"worker$worker" ;;
    *--action=follow*) echo "step 1" ;;
    *--action=status*) cat "worker$worker" 2>/dev/null || echo absent ;;
esac
"""


@pytest.fixture
def tpu(machine):
    """A machine with a small checkout; give it what gcloud does before its usual behaviour."""
    machine.checkout = machine.folder / "a checkout"
    shutil.copytree(launching.ROOT / "launch", machine.checkout / "launch")
    for name in ("package.py", "new one.py", "ignored.pyc", "tests/test_it.py", "deleted.py"):
        (machine.checkout / name).parent.mkdir(exist_ok=True)
        (machine.checkout / name).write_text("")
    (machine.checkout / ".gitignore").write_text("*.pyc")
    git = ["git", "-C", str(machine.checkout)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "package.py", "deleted.py", "tests"], check=True)
    (machine.checkout / "deleted.py").unlink()

    def with_gcloud(before: str = ""):
        machine.stub("gcloud", does=f"cd {machine.folder}\n{WORKER}\n{before}\n{GCLOUD}")
        return machine

    return with_gcloud


def commands(machine, action: str) -> list[str]:
    """The words that workers were sent which hold `action`, each with its worker."""
    sent = []
    for call in machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "ssh", "itself"):
        words = [w.removeprefix("--command=") for w in call if w.startswith("--command=")]
        if action in words[0]:
            sent.append(f"{call[-1]} {words[0]}")
    return sorted(sent)


def made(machine) -> list[list[str]]:
    return machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "create")


def test_a_run_from_nothing_to_done(tpu):
    machine = tpu()
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "step 1\n"
    assert result.stderr.splitlines() == [
        "tpu_vm.sh: itself: READY",
        "tpu_vm.sh: itself is ready: 4 workers",
        "tpu_vm.sh: done",
        BILLED,
    ]
    calls = machine.calls_of("gcloud")
    assert calls[:6] == [
        ["storage", "ls", "gs://bucket"],
        ["storage", "cp", "-", "gs://bucket/runs/a b's/.itself_jax_probe"],
        ["storage", "rm", "gs://bucket/runs/a b's/.itself_jax_probe"],
        ["compute", "tpus", "tpu-vm", "describe", "itself", ZONE, "--format=value(state)"],
        ["compute", "tpus", "tpu-vm", "create", "itself", ZONE,
         "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"],
        ["compute", "tpus", "tpu-vm", "describe", "itself", ZONE, "--format=value(state)"],
    ]  # fmt: skip
    copies = machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "scp")
    assert sorted(copy[1:] for copy in copies) == [
        ["itself:itself_jax.tar.gz", ZONE, "--quiet", f"--worker={i}"] for i in range(4)
    ]
    assert commands(machine, "pip install") == [
        f"--worker={i} rm -rf itself_jax && mkdir itself_jax"
        " && tar -xzf itself_jax.tar.gz -C itself_jax && cd itself_jax"
        " && python3 -m pip install --quiet --user uv"
        " && python3 -m uv venv --quiet --python=3.12 .venv"
        r" && python3 -m uv pip install --quiet --python=.venv/bin/python -e .\[tpu\,gcs\]"
        for i in range(4)
    ]
    assert commands(machine, "--action=start") == [
        f"--worker={i} bash itself_jax/launch/worker.sh --action=start --run=itself"
        " --python=.venv/bin/python --compile_cache= --max_restarts=20 --max_quick=5"
        r" -- --config=configs/cuhk.py --workdir=gs://bucket/runs/a\ b\'s"
        r" --config.distributed.detect=True"
        for i in range(4)
    ]


def test_what_workers_are_sent_means_the_same_to_their_shell(tpu):
    machine = tpu()
    odd = '--config.data_root=/data/it\'s "here" $HOME `id` *;&'
    machine.run("tpu_vm.sh", *RUN, odd)
    line = commands(machine, "--action=start")[0].removeprefix("--worker=0 ")
    read = subprocess.run(
        ["sh", "-c", line.replace("bash", "printf '%s\\n'", 1)], capture_output=True, text=True
    )
    assert read.stdout.splitlines()[-4:-1] == [*JOB[1:], odd]


def test_the_copied_checkout_has_the_package_and_what_is_not_committed(tpu):
    machine = tpu()
    machine.run("tpu_vm.sh", *RUN)
    with tarfile.open(machine.folder / "copied.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"package.py", "new one.py", "launch/worker.sh", "launch/common.sh"} <= names
    assert not {n for n in names if n.startswith(("tests", ".git/")) or n == "ignored.pyc"}


def test_what_is_no_checkout_is_noticed_before_anything_is_made(tpu):
    machine = tpu()
    shutil.rmtree(machine.checkout / ".git")
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"tpu_vm.sh: {machine.checkout} is not a git checkout:"
        " use --source=git+https://HOST/REPOSITORY"
    )
    assert made(machine) == []


def test_an_installation_from_a_repository(tpu):
    machine = tpu()
    result = machine.run("tpu_vm.sh", "--source=git+https://host/a b.git@v1", *RUN)
    assert result.returncode == 0
    assert machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "scp") == []
    assert (
        r"rm -rf itself_jax && git clone --quiet https://host/a\ b.git itself_jax"
        " && git -C itself_jax checkout --quiet v1 && cd itself_jax"
    ) in commands(machine, "pip install")[3]


def test_a_ready_tpu_is_reused(tpu):
    machine = tpu()
    (machine.folder / "state").write_text("READY\n")
    assert machine.run("tpu_vm.sh", *RUN).returncode == 0
    assert made(machine) == []


def test_a_running_job_is_followed_not_started_twice(tpu):
    machine = tpu(
        """[[ $* != *--action=follow* ]] || echo "ended 0" | tee worker0 worker1 worker2 worker3"""
    )
    (machine.folder / "state").write_text("READY\n")
    for i in range(4):
        (machine.folder / f"worker{i}").write_text("running\n")
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 0
    assert "the job runs already; following it" in result.stderr
    assert commands(machine, "pip install") == commands(machine, "--action=start") == []


def test_spot_and_queued(tpu):
    machine = tpu("""
        if [[ $* == *"queued-resources create"* ]]; then
            echo WAITING_FOR_RESOURCES >request
            exit
        fi
        if [[ $* == *"queued-resources describe"* && -e request ]]; then
            cat request
            echo ACTIVE >request; echo READY >state
            exit
        fi
    """)
    result = machine.run(
        "tpu_vm.sh", "--spot", "--queued", "--valid_until_duration=6h", "--project=my-project",
        "--service_account=me@x.iam.gserviceaccount.com", "--internal_ips", *RUN,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "tpu_vm.sh: itself: request WAITING_FOR_RESOURCES" in result.stderr
    where = [ZONE, "--project=my-project"]
    assert machine.calls_of("gcloud", "compute", "tpus", "queued-resources", "create") == [
        ["itself", *where, "--accelerator-type=v5litepod-16", "--spot", "--internal-ips",
         "--service-account=me@x.iam.gserviceaccount.com",
         "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=itself", "--valid-until-duration=6h"]
    ]  # fmt: skip
    assert made(machine) == []
    (copy, *_) = machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "scp")
    assert copy[2:-1] == [*where, "--quiet", "--internal-ip"]


def test_a_tpu_that_was_taken_away_is_made_again_and_the_job_goes_on(tpu):
    machine = tpu("""
        if [[ $* == *--action=follow* && ! -e once ]]; then
            : >once
            echo PREEMPTED >state
            rm worker?
            exit 1
        fi
        if [[ $* == *ssh* && $(cat state) == PREEMPTED ]]; then exit 1; fi
    """)
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 0, result.stderr
    assert "itself was taken away; making it again (1 of at most 20)" in result.stderr
    assert len(made(machine)) == 2
    assert len(commands(machine, "--action=start")) == 8
    assert result.stderr.splitlines()[-1] == BILLED


def test_a_tpu_that_is_always_taken_away_is_given_up(tpu):
    machine = tpu("""
        if [[ $* == *--action=follow* ]]; then echo PREEMPTED >state; exit 1; fi
        if [[ $* == *ssh* && $(cat state) == PREEMPTED ]]; then exit 1; fi
    """)
    result = machine.run("tpu_vm.sh", "--max_restarts=1", *RUN)
    assert result.returncode == 1
    assert len(made(machine)) == 2
    assert "taken away 2 times, more than --max_restarts=1; giving up" in result.stderr
    assert result.stderr.splitlines()[-1] == BILLED


def test_workers_that_restarted_start_the_job_again(tpu):
    machine = tpu("""
        if [[ $* == *--action=follow* && ! -e once ]]; then : >once; rm worker?; exit 1; fi
        if [[ $* == *--action=status* && ! -e worker0 ]]; then echo lost; exit; fi
    """)
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 0, result.stderr
    assert "the workers restarted; starting the job again (1 of at most 20)" in result.stderr
    assert len(made(machine)) == 1
    assert len(commands(machine, "--action=start")) == 8


@pytest.mark.parametrize("status", ["worker 0 says that it runs", "worker 0 does not answer yet"])
def test_a_lost_connection_is_made_again(tpu, status):
    machine = tpu("""
        if [[ $* == *--action=follow* && ! -e once ]]; then
            : >once
            echo running >worker0
            exit 255
        fi
        if [[ $* == *--action=follow* ]]; then echo "ended 0" >worker0; fi
        if [[ $* == *--action=status*--worker=0 && -e once && ! -e answers ]]; then
            : >answers
            exit 255
        fi
    """)
    if status == "worker 0 says that it runs":
        (machine.folder / "answers").write_text("")
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 0, result.stderr
    said = "the connection was lost; following again" in result.stderr
    assert said == (status == "worker 0 says that it runs")
    assert len(commands(machine, "--action=follow")) == 2
    assert len(commands(machine, "--action=start")) == 4


@pytest.mark.parametrize(
    "step, words, sentence",
    [
        (
            "*scp*--worker=3",
            "receive the checkout",
            "did not reach every worker; nothing was started",
        ),
        ("*uv\\ venv*--worker=3", "install", "failed on some worker; nothing was started"),
        ("*--action=start*--worker=3", "start the job", "was stopped on the others"),
    ],
)
def test_a_failure_of_worker_3_names_it_and_what_stays_billed(tpu, step, words, sentence):
    machine = tpu(f'if [[ $* == {step} ]]; then echo "no space left" >&2; exit 1; fi')
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[-3] == (
        f"tpu_vm.sh: worker 3 of 4 (counted from 0) failed to {words} (exit 1): no space left"
    )
    assert sentence in lines[-2]
    assert lines[-1] == BILLED
    stops = commands(machine, "--action=stop")
    assert len(stops) == (4 if words == "start the job" else 0)


def test_a_tpu_that_ssh_does_not_reach_is_told_and_billed(tpu):
    machine = tpu('if [[ $* == *--command=true* ]]; then echo "Connection refused" >&2; exit 1; fi')
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2:] == [
        "tpu_vm.sh: worker 0 cannot be reached by ssh (gcloud: Connection refused)",
        BILLED,
    ]
    assert commands(machine, "pip install") == []


def test_a_job_that_fails_on_worker_3_is_stopped_everywhere_and_its_sentence_shown(tpu):
    machine = tpu(r"""
        if [[ $* == *--action=start* ]]; then
            echo "ended 75" >"worker$worker"
            [[ $worker != 3 ]] || printf 'ended 1\nitself_jax: no such file: /data\n' >worker3
            exit
        fi
        """)
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2:] == [
        "tpu_vm.sh: worker 3 of 4 (counted from 0) ended with code 1:"
        " itself_jax: no such file: /data",
        BILLED,
    ]
    assert len(commands(machine, "--action=stop")) == 4


def test_a_job_that_was_stopped_says_that_the_same_command_goes_on(tpu):
    machine = tpu('[[ $* != *--action=start* ]] || { echo "ended 75" >"worker$worker"; exit; }')
    result = machine.run("tpu_vm.sh", "--delete_when_done", *RUN)
    assert result.returncode == 75
    assert result.stderr.splitlines()[-2:] == [
        "tpu_vm.sh: stopped; the same command goes on",
        BILLED,
    ]


def test_delete_when_done(tpu):
    machine = tpu()
    result = machine.run("tpu_vm.sh", "--delete_when_done", *RUN)
    assert result.returncode == 0
    assert machine.calls()[-1] == [
        "gcloud", "compute", "tpus", "tpu-vm", "delete", "itself", ZONE, "--quiet"
    ]  # fmt: skip
    assert result.stderr.splitlines()[-1] == (
        "tpu_vm.sh: itself is deleted; nothing of it is billed any more"
    )


def test_a_deletion_that_fails_says_what_is_still_billed(tpu):
    machine = tpu('if [[ $* == *"tpu-vm delete"* ]]; then echo "try later" >&2; exit 1; fi')
    (machine.folder / "state").write_text("READY\n")
    result = machine.run("tpu_vm.sh", "--action=delete", *HERE)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "try later",
        "tpu_vm.sh: itself could not be deleted; gcloud says why above",
        BILLED,
    ]


def test_a_queued_request_is_deleted_with_its_tpu(tpu):
    machine = tpu()
    (machine.folder / "state").write_text("READY\n")
    (machine.folder / "request").write_text("ACTIVE\n")
    result = machine.run("tpu_vm.sh", "--action=delete", *HERE)
    assert result.returncode == 0
    assert machine.calls_of("gcloud", "compute", "tpus", "queued-resources", "delete") == [
        ["itself", ZONE, "--force", "--quiet"]
    ]
    assert machine.calls_of("gcloud", "compute", "tpus", "tpu-vm", "delete") == []


def test_a_creation_that_fails_midway_may_be_billed(tpu):
    machine = tpu('if [[ $* == *"tpu-vm create"* ]]; then echo "no capacity" >&2; exit 1; fi')
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert "try --queued, --spot or another --zone" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("tpu_vm.sh: itself may exist, now or when")


def test_a_failed_request_is_not_billed(tpu):
    machine = tpu('if [[ $* == *"queued-resources create"* ]]; then echo FAILED >request; exit; fi')
    result = machine.run("tpu_vm.sh", "--queued", *RUN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "tpu_vm.sh: the request for itself failed: see gcloud compute tpus queued-resources"
        " describe itself --zone=us-west4-a, delete it and ask again"
    )


def test_leaving_by_a_signal_keeps_the_job_and_says_what_is_billed(tpu):
    machine = tpu("""
        if [[ $* == *--action=follow* ]]; then
            echo following
            for _ in {1..100}; do sleep 0.1; done
        fi
    """)
    process = machine.start("tpu_vm.sh", *RUN)
    assert process.stdout.readline() == "following\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.splitlines()[-2:] == [
        "tpu_vm.sh: the job goes on; to see it: launch/tpu_vm.sh --action=follow --name=itself"
        " --zone=us-west4-a; to save and end it: launch/tpu_vm.sh --action=stop --name=itself"
        " --zone=us-west4-a",
        BILLED,
    ]
    assert commands(machine, "--action=stop") == []


def test_status_and_stop(tpu):
    machine = tpu('[[ $* != *--action=stop* ]] || echo "ended 75"')
    (machine.folder / "state").write_text("READY\n")
    for i in range(4):
        (machine.folder / f"worker{i}").write_text(f"running\nstep {i}\n")
    result = machine.run("tpu_vm.sh", "--action=status", *HERE)
    assert result.stdout.splitlines() == [f"worker {i}: running: step {i}" for i in range(4)]
    assert result.stderr.splitlines() == ["tpu_vm.sh: itself is READY", BILLED]
    result = machine.run("tpu_vm.sh", "--action=stop", *HERE)
    assert result.stdout.splitlines() == [f"worker {i}: ended 75: ended 75" for i in range(4)]
    assert len(commands(machine, "--action=stop")) == 4


def test_dry_run_prints_the_commands_and_runs_nothing(tpu):
    machine = tpu()
    result = machine.run("tpu_vm.sh", "--dry_run", "--queued", "--delete_when_done", *RUN)
    assert (result.returncode, result.stderr) == (0, "")
    assert machine.calls() == []
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    printed = launching.printed_commands("\n".join(lines) + "\n")
    assert [" ".join(c[:5]) for c in printed] == [
        "gcloud storage ls gs://bucket",
        "gcloud storage cp - gs://bucket/runs/a b's/.itself_jax_probe",
        "gcloud storage rm gs://bucket/runs/a b's/.itself_jax_probe",
        "gcloud compute tpus tpu-vm describe",
        "gcloud compute tpus queued-resources create",
        "gcloud compute tpus queued-resources describe",
        "gcloud compute tpus tpu-vm describe",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus queued-resources delete",
        "gcloud compute tpus tpu-vm delete",
    ]
    # What is printed is what a real run says.
    machine.run("tpu_vm.sh", "--queued", "--delete_when_done", *RUN)
    real = [c for c in machine.calls() if "scp" not in c]
    assert [c for c in printed if "scp" not in c and c not in real] == [
        ["gcloud", "compute", "tpus", "tpu-vm", "delete", "itself", ZONE, "--quiet"]
    ]  # the deleted request took it along


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((ZONE, *TYPE, *JOB), "--name is required, e.g. --name=itself"),
        (("--name=itself", *TYPE, *JOB), "--zone is required, e.g. --zone=us-west4-a"),
        ((*HERE, TYPE[1], *JOB), "--accelerator_type is required, e.g. --accelerator_type=v5lite"),
        ((*HERE, TYPE[0], *JOB), "--runtime_version is required, e.g. --runtime_version=v2-alpha"),
        ((*HERE, *TYPE, *JOB[:2]), "--workdir is required among the job's flags, after --"),
        (("--name=my tpu", ZONE, *TYPE, *JOB), r"--name=my\ tpu must be at most 60 lower-case"),
        (
            (*HERE, *TYPE, *JOB[:2], "--workdir=runs/x"),
            "--workdir=runs/x would be deleted with the",
        ),
        (("--source=itself_jax", *RUN), "--source=itself_jax must be checkout or git+https://"),
        (
            ("--action=remove", *HERE),
            "--action=remove must be one of: run follow status stop delete",
        ),
        (("--action=delete", *HERE, *JOB), "--action=delete takes no flags of the job"),
        (("--spot=maybe", *RUN), "--spot=maybe must be true or false"),
    ],
)
def test_rejected_flags(tpu, arguments, sentence):
    machine = tpu()
    result = machine.run("tpu_vm.sh", *arguments)
    assert result.returncode == 2
    assert sentence in launching.only_error(result)
    assert machine.calls() == []


def test_an_absent_gcloud_is_named(machine):
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert launching.only_error(result) == (
        "tpu_vm.sh: gcloud is not installed or not on the PATH:"
        " install the Google Cloud CLI, then run: gcloud auth login"
    )


@pytest.mark.parametrize(
    "command, sentence",
    [
        (
            "storage ls gs://bucket",
            "cannot list gs://bucket (gcloud: ERROR: 403): create it, or grant the account"
            " roles/storage.objectUser on it",
        ),
        (
            "storage cp",
            "no permission to write to gs://bucket (gcloud: ERROR: 403): grant the account"
            " roles/storage.objectUser on it",
        ),
        (
            "storage rm",
            "no permission to delete in gs://bucket (gcloud: ERROR: 403): grant the account"
            " roles/storage.objectUser on it",
        ),
        (
            "storage ls gs://data",
            "cannot list gs://data (gcloud: ERROR: 403): create it, or grant the account"
            " roles/storage.objectViewer on it",
        ),
    ],
)
def test_a_bucket_without_permission_is_named_before_anything_is_made(tpu, command, sentence):
    machine = tpu(f'if [[ $* == "{command}"* ]]; then echo "ERROR: 403" >&2; exit 1; fi')
    result = machine.run("tpu_vm.sh", *RUN, "--config.data_root=gs://data/sets")
    assert result.returncode == 1
    assert launching.only_error(result) == f"tpu_vm.sh: {sentence}"
    assert machine.calls_of("gcloud", "compute") == []


def test_a_project_without_permission_is_no_absent_tpu(tpu):
    machine = tpu(
        'if [[ $* == *"tpu-vm describe"* ]]; then echo "PERMISSION_DENIED" >&2; exit 1; fi'
    )
    result = machine.run("tpu_vm.sh", *RUN)
    assert result.returncode == 1
    assert launching.only_error(result) == (
        "tpu_vm.sh: cannot look at itself in us-west4-a (gcloud: PERMISSION_DENIED):"
        " check --zone and --project, and gcloud auth login"
    )
    assert made(machine) == []


def test_help_shows_an_example(machine):
    result = machine.run("tpu_vm.sh", "--help")
    assert result.returncode == 0
    assert re.search(r"launch/tpu_vm\.sh --name=itself .*\n.* --spot --queued -- \\", result.stdout)
