"""`launch/gke.sh`: the manifest against the JobSet schema, and what kubectl and docker are told."""

import copy
import json
import pathlib
import signal

import jsonschema
import launching
import pytest
import yaml

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(pathlib.Path(__file__).with_name("jobset.schema.json").read_text())
)
NAME = "--name=itself"
IMAGE = "--image=europe-docker.pkg.dev/p/r/itself_jax:tpu"
TPU = (
    "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--devices_per_host=4"
)  # fmt: skip
GPU = ("--accelerator=nvidia-h100-80gb", "--hosts=2", "--devices_per_host=8")
JOB = ("--", "--config=configs/cuhk.py", "--workdir=gs://bucket/runs/a b's")
RUN = (NAME, IMAGE, "--poll=0", *TPU, *JOB)
KUBECTL = ["kubectl", "--namespace=default"]
PODS = "--selector=jobset.sigs.k8s.io/jobset-name=itself"

# A cluster that keeps one JobSet in a folder: `jobset` has its terminal state, empty while it runs.
CLUSTER = r"""
case "$*" in
    *"get jobset"*restarts*) [[ ! -e jobset ]] || echo "found 0" ;;
    *"get jobset"*terminalState*) [[ ! -e jobset ]] || echo "found $(cat jobset)" ;;
    *"get pods"*phase*) echo "Running Running Running Running " ;;
    *"get pods"*exitCode*) printf 'itself-job-0-%s\n' '0-abcde 75' '3-fghij 1' ;;
    *"delete jobset"*) rm jobset ;;
    *apply*) cat >applied.yaml; : >jobset ;;
    *logs*--follow*) echo "[pod/itself-job-0-0] step 1"; echo Completed >jobset ;;
    *logs*) echo "itself_jax: no such file: /data" ;;
esac
"""


@pytest.fixture
def cluster(machine):
    def with_kubectl(before: str = ""):
        machine.stub("kubectl", does=f"cd {machine.folder}\n{before}\n{CLUSTER}")
        machine.stub("gcloud", "docker")
        return machine

    return with_kubectl


def manifest_of(machine, *arguments: str) -> dict:
    result = machine.run("gke.sh", "--action=manifest", NAME, IMAGE, *arguments)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def pod_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "arguments",
    [
        (*TPU, "--spot", *JOB),
        (*GPU, "--volume=my-claim:/mnt/disk", "--service_account=trainer", *JOB),
        ("--cpu=8", "--memory=32Gi", "--compile_cache=gs://bucket/cache", *JOB),
    ],
    ids=["tpu", "gpu", "cpu"],
)
def test_the_manifest_is_a_jobset(machine, arguments):
    SCHEMA.validate(manifest_of(machine, *arguments))


def _break(path: list, value: object):
    def broken(manifest: dict) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return broken


@pytest.mark.parametrize(
    "broken",
    [
        _break(["spec", "failurePolicy", "maxRestart"], 3),
        _break(["spec", "failurePolicy", "rules", 0, "action"], "StopJobSet"),
        _break(["spec", "replicatedJobs", 0, "template", "spec", "completions"], "4"),
        _break(["spec", "replicatedJobs", 0, "template", "spec", "template"], None),
        _break(["apiVersion"], "batch/v1"),
    ],
)
def test_the_schema_notices_mistakes(machine, broken):
    manifest = manifest_of(machine, *TPU, *JOB)
    wrong = copy.deepcopy(manifest)
    broken(wrong)
    SCHEMA.validate(manifest)
    assert not SCHEMA.is_valid(wrong)


def test_codes_1_and_2_stop_and_all_others_restart_a_bounded_number_of_times(machine):
    spec = manifest_of(machine, "--max_restarts=7", *TPU, *JOB)["spec"]
    assert spec["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [
            {
                "name": "failed",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    assert (codes["operator"], {1, 2} <= set(codes["values"])) == ("In", True)
    assert not [code for code in codes["values"] if code == 75 or code > 128]
    (container,) = pod_of({"spec": spec})["containers"]
    assert codes["containerName"] == container["name"]
    # A pod that ends otherwise fails the Job, and so restarts the set, at once and with all others.
    assert (job["backoffLimit"], pod_of({"spec": spec})["restartPolicy"]) == (0, "Never")


def test_the_processes_find_each_other(machine):
    manifest = manifest_of(machine, *TPU, *JOB)
    job = manifest["spec"]["replicatedJobs"][0]
    address = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    environment = {e["name"]: e for e in pod_of(manifest)["containers"][0]["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == f"{address}:8476"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "4"
    assert environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    batch = job["template"]["spec"]
    assert (batch["completionMode"], batch["completions"], batch["parallelism"]) == (
        "Indexed",
        4,
        4,
    )


def test_a_single_host_is_a_single_process(machine):
    assert pod_of(manifest_of(machine, *JOB))["containers"][0]["env"] == []


def test_tpu_nodes(machine):
    manifest = manifest_of(machine, *TPU, "--spot", *JOB)
    pod = pod_of(manifest)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_gpu_nodes_and_a_shared_disk(machine):
    job = ("--", "--config=c.py", "--workdir=/mnt/disk/runs/x")
    pod = pod_of(manifest_of(machine, *GPU, "--volume=my-claim:/mnt/disk/", *job))
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"name": "disk", "mountPath": "/mnt/disk"} in pod["containers"][0]["volumeMounts"]
    disk = {"name": "disk", "persistentVolumeClaim": {"claimName": "my-claim"}}
    assert disk in pod["volumes"]


def test_the_jobs_arguments_reach_it_unchanged(machine):
    odd = ['--config.data_root=/it\'s "here"\\ $HOME $(JAX_NUM_PROCESSES) @ARGS@ & é\n\t', ""]
    arguments = pod_of(manifest_of(machine, *TPU, *JOB, *odd))["containers"][0]["args"]
    # Kubernetes replaces $(NAME), and reads $$ as a dollar sign.
    assert [a.replace("$$", "$") for a in arguments] == [*JOB[1:], *odd]
    assert not any("$" in a.replace("$$", "") for a in arguments)


def test_a_run_builds_applies_and_follows_until_the_end(cluster):
    machine = cluster()
    result = machine.run("gke.sh", "--build", "--context=my cluster", *RUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[pod/itself-job-0-0] step 1\n"
    docker = f"--file={launching.ROOT}/launch/Dockerfile"
    assert machine.calls_of("docker") == [
        ["build", docker, "--build-arg=DEVICE=tpu", f"--tag={IMAGE[8:]}", str(launching.ROOT)],
        ["push", IMAGE[8:]],
    ]
    assert [c[1] for c in machine.calls_of("gcloud")] == ["ls", "cp", "rm"]
    kubectl = machine.calls_of("kubectl", "--context=my cluster", "--namespace=default")
    get = ["get", "jobset", "itself", "--ignore-not-found"]
    assert kubectl[:2] == [
        [*get, "--output=jsonpath=found {.status.terminalState}"],
        ["apply", "--filename=-"],
    ]
    assert ["logs", "--follow", "--prefix", PODS, "--max-log-requests=4", "--tail=-1"] in kubectl
    applied = yaml.safe_load((machine.folder / "applied.yaml").read_text())
    assert applied == manifest_of(machine, *TPU, *JOB)
    assert result.stderr.splitlines() == [
        "gke.sh: start 1: Running Running Running Running",
        "gke.sh: done",
        "gke.sh: the JobSet itself is over; its nodes are billed as long as their pool keeps them;"
        r" to delete it: launch/gke.sh --action=stop --name=itself --namespace=default"
        r" --context=my\ cluster",
    ]


def test_a_running_jobset_is_followed_and_an_ended_one_replaced(cluster):
    machine = cluster()
    (machine.folder / "jobset").write_text("")
    result = machine.run("gke.sh", *RUN)
    assert (result.returncode, "itself runs already" in result.stderr) == (0, True)
    assert not (machine.folder / "applied.yaml").exists()
    result = machine.run("gke.sh", *RUN)  # the first one completed it
    assert (result.returncode, "ended (Completed); replacing it" in result.stderr) == (0, True)
    assert machine.calls_of(*KUBECTL, "delete") == [["jobset", "itself", "--wait=true"]]
    assert (machine.folder / "applied.yaml").exists()


def test_a_failed_job_names_its_pods_and_their_words(cluster):
    machine = cluster("if [[ $* == *logs*--follow* ]]; then echo Failed >jobset; exit; fi")
    result = machine.run("gke.sh", *RUN)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[1:3] == [
        "gke.sh: pod itself-job-0-0-abcde ended with code 75: itself_jax: no such file: /data",
        "gke.sh: pod itself-job-0-3-fghij ended with code 1: itself_jax: no such file: /data",
    ]
    assert lines[3].endswith("see kubectl describe jobset itself")
    assert "nodes are billed as long as" in lines[-1]


def test_a_lost_connection_is_made_again_without_the_whole_log(cluster):
    machine = cluster("""
        if [[ $* == *logs*--follow* && ! -e once ]]; then : >once; exit 1; fi
    """)
    assert machine.run("gke.sh", *RUN).returncode == 0
    logs = machine.calls_of(*KUBECTL, "logs")
    assert [call[-1] for call in logs] == ["--tail=-1", "--tail=10"]


@pytest.mark.parametrize(
    "before, sentence, billed",
    [
        ('[[ $* != *apply* ]] || exit 1', "the JobSet itself could not be made", False),
        (
            """
            if [[ $* == *"get jobset"* ]]; then
                echo "the server doesn't have a resource type jobset" >&2
                exit 1
            fi
            """,
            "the cluster has no JobSet: install it (https://jobset.sigs.k8s.io)",
            False,
        ),
        (
            """[[ $* != *"get jobset"* ]] || { echo "Forbidden" >&2; exit 1; }""",
            "the cluster does not answer (kubectl: Forbidden): check kubectl config",
            False,
        ),
        (
            """[[ $* != *"get jobset"* || ! -e jobset ]] || { echo "timed out" >&2; exit 1; }""",
            "the cluster does not answer (kubectl: timed out)",
            True,
        ),
    ],
)  # fmt: skip
def test_a_failure_in_the_middle_says_what_there_is(cluster, before, sentence, billed):
    machine = cluster(before)
    result = machine.run("gke.sh", *RUN)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert ("is still there, and its nodes are billed" in result.stderr) == billed


@pytest.mark.parametrize(
    "step, sentence", [("build", "could not be built"), ("push", "could not be pushed")]
)
def test_without_an_image_nothing_is_started(cluster, step, sentence):
    machine = cluster()
    machine.stub("docker", does=f"[[ $1 != {step} ]]")
    result = machine.run("gke.sh", "--build", *RUN)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert machine.calls_of(*KUBECTL, "apply") == []


def test_leaving_by_a_signal_keeps_the_job(cluster):
    machine = cluster("""
        if [[ $* == *logs*--follow* ]]; then
            echo following
            for _ in {1..100}; do sleep 0.1; done
        fi
    """)
    process = machine.start("gke.sh", *RUN)
    assert process.stdout.readline() == "following\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the JobSet itself is still there" in err.splitlines()[-1]
    assert machine.calls_of(*KUBECTL, "delete") == []


def test_stop_and_status(cluster):
    machine = cluster()
    (machine.folder / "jobset").write_text("")
    assert machine.run("gke.sh", "--action=status", NAME).returncode == 0
    assert machine.calls() == [
        [*KUBECTL, "get", "jobset", "itself"],
        [*KUBECTL, "get", "pods", PODS],
    ]
    result = machine.run("gke.sh", "--action=stop", NAME)
    assert result.returncode == 0
    assert machine.calls_of(*KUBECTL, "delete") == [["jobset", "itself", "--wait=true"]]
    assert "billed as long as their pool keeps them" in launching.only_error(result)


def test_dry_run_prints_a_script_that_does_the_same(cluster):
    machine = cluster()
    result = machine.run("gke.sh", "--dry_run", "--build", *RUN)
    assert (result.returncode, result.stderr) == (0, "")
    assert machine.calls() == []
    (machine.folder / "printed.sh").write_text(result.stdout)
    printed = launching.subprocess.run(
        [machine.bin / "bash", "-eu", machine.folder / "printed.sh"],
        env=machine.environment(),
        stdin=launching.subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.splitlines()[-1] == "[pod/itself-job-0-0] step 1"
    by_print = machine.calls()
    applied = yaml.safe_load((machine.folder / "applied.yaml").read_text())
    assert applied == manifest_of(machine, *TPU, *JOB)
    (machine.folder / "jobset").unlink()
    machine.run("gke.sh", "--build", *RUN)
    real = machine.calls()[len(by_print) :]
    assert [call for call in by_print if call not in real] == []


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((IMAGE, *JOB), "--name is required, e.g. --name=itself"),
        ((NAME, *JOB), "--image is required, e.g. --image=REGION-docker.pkg.dev"),
        (("--name=My job", IMAGE, *JOB), r"--name=My\ job must be at most 40 lower-case letters"),
        ((NAME, IMAGE, *JOB[:2]), "--workdir is required among the job's flags"),
        ((NAME, IMAGE, "--", "--config=c", "--workdir=/x"), "--workdir=/x would be lost with its"),
        ((NAME, IMAGE, "--volume=claim", *JOB), "--volume=claim must be CLAIM:/PATH"),
        ((NAME, IMAGE, "--accelerator=v5e", *JOB), "--accelerator=v5e must begin with tpu- or nv"),
        ((NAME, IMAGE, TPU[0], *TPU[2:], *JOB), "--topology is required, e.g. --topology=4x4"),
        ((NAME, IMAGE, *TPU[:3], *JOB), "--devices_per_host is required"),
        (
            (NAME, IMAGE, *TPU[:2], "--hosts=2", TPU[3], *JOB),
            "--topology=4x4 has 16 chips, but --hosts=2 times --devices_per_host=4 are 8",
        ),
        ((NAME, IMAGE, "--topology=4*4", *TPU[2:], TPU[0], *JOB), r"--topology=4\*4 must be AxB"),
        ((NAME, IMAGE, *GPU, "--topology=4x4", *JOB), "--topology belongs to a TPU"),
        ((NAME, IMAGE, "--devices_per_host=4", *JOB), "--devices_per_host needs --accelerator"),
        ((NAME, "--action=stop", *JOB), "--action=stop takes no flags of the job"),
    ],
)
def test_rejected_flags(cluster, arguments, sentence):
    machine = cluster()
    result = machine.run("gke.sh", *arguments)
    assert result.returncode == 2
    assert sentence in launching.only_error(result)
    assert machine.calls() == []


@pytest.mark.parametrize("tool", ["kubectl", "gcloud", "docker"])
def test_an_absent_tool_is_named(cluster, tool):
    machine = cluster()
    (machine.bin / tool).unlink()
    result = machine.run("gke.sh", "--build", *RUN)
    assert result.returncode == 1
    assert launching.only_error(result).startswith(
        f"gke.sh: {tool} is not installed or not on the PATH: "
    )
    assert machine.calls_of(*KUBECTL, "apply") == []


def test_a_bucket_without_permission_is_named(cluster):
    machine = cluster()
    machine.stub("gcloud", does='[[ $2 != cp ]] || { echo "HTTPError 403" >&2; exit 1; }')
    result = machine.run("gke.sh", *RUN)
    assert result.returncode == 1
    assert launching.only_error(result) == (
        "gke.sh: no permission to write to gs://bucket (gcloud: HTTPError 403):"
        " grant the account roles/storage.objectUser on it"
    )
    assert machine.calls_of("kubectl") == []


def test_help_shows_an_example(machine):
    result = machine.run("gke.sh", "--help")
    assert (result.returncode, "launch/gke.sh --name=itself" in result.stdout) == (0, True)
