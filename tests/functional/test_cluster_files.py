"""The files that need a cluster: linted, and the batch script run with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH_SCRIPT = REPOSITORY / "examples/slurm/pretrain.sbatch"
TOOLS = Path(sys.executable).parent

# Of the two nodes' tasks one runs, here. As with Slurm's cgroups, a signal reaches the task alone.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & echo $! >task.pid
wait $!
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>scontrol.log
[ "$1 $2" = "show hostnames" ] && printf 'node1\\nnode2\\n' || true
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" >>scancel.log
kill -USR1 "$(cat task.pid)"
"""
# Notes how it was called and runs the real one, on this machine alone.
TORCHRUN = f"""#!/usr/bin/env bash
printf '%s\\n' "PET_NODE_RANK=$PET_NODE_RANK" "$@" >torchrun.log
for argument in "$@"; do
    case $argument in --nnodes=*|--nproc-per-node=*|--master-addr=*) ;; *) kept+=("$argument") ;; esac
done
kept=(--nnodes=1 --nproc-per-node=2 --master-addr=127.0.0.1 "${{kept[@]}}")
exec {sys.executable} -m torch.distributed.run "${{kept[@]}}"
"""
# In the place of the training script: like Megatron, it saves and exits when it is told to, and it has a
# helper process that knows nothing of signals.
WORKER = """
import os, pathlib, signal, subprocess, time
told = []
helper = subprocess.Popen(["sleep", "60"])
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
rank = os.environ["RANK"]
pathlib.Path("ready" + rank).touch()
deadline = time.monotonic() + 60
while not told and time.monotonic() < deadline and not pathlib.Path("finish").exists():
    time.sleep(0.02)
time.sleep(0.5)  # saving takes longer than others would need to die
assert helper.poll() is None, "the helper died of the signal"
helper.kill()
pathlib.Path(("saved" if told else "finished") + rank).touch()
"""


def lint(*command: str) -> None:
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_dockerfile_lints() -> None:
    lint(str(TOOLS / "hadolint"), "Dockerfile")


def test_the_batch_script_lints() -> None:
    lint("bash", "-n", str(BATCH_SCRIPT))
    lint(str(TOOLS / "shellcheck"), str(BATCH_SCRIPT))


def test_the_image_never_replaces_the_base_images_pytorch() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    steps = dockerfile.replace("\\\n", " ").splitlines()
    installs = [part for step in steps for part in step.split("&&") if re.search(r"\bpip (install|wheel)\b", part)]
    assert len(installs) == 4
    assert not [part for part in installs if "--no-deps" not in part]
    assert re.search(r"^USER 1\d+$", dockerfile, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == [
        "nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3"
    ] * 2  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "scripts/lock_requirements.py"), "missing", "runtime"]
    # -S: an interpreter with no packages at all, as the emptiest base there could be.
    added = subprocess.run([command[0], "-S", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert "megatron-core==" in added
    assert not re.search(r"^(torch|triton|nvidia-|cuda-)", added, re.MULTILINE)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a job submitted from ``tmp_path``, with the stand-ins for Slurm on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "torchrun": TORCHRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/pretrain_graft_moe.sh").write_text(WORKER)
    shutil.copy(BATCH_SCRIPT, tmp_path / "spooled-copy")
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "DATA_PATH": "data",
        "TOKENIZER_MODEL": "tokenizer.model",
        "GRAFT_BANK": "bank",
    }


def start(job: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    directory = Path(job["SLURM_SUBMIT_DIR"])
    return subprocess.Popen(
        ["bash", str(directory / "spooled-copy"), *arguments],
        env=job,
        cwd=directory.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never appeared"
        time.sleep(0.02)


def test_a_job_starts_one_torchrun_per_node_and_ends_with_it(job: dict[str, str]) -> None:
    directory = Path(job["SLURM_SUBMIT_DIR"])
    (directory / "finish").touch()
    process = start(job, "--train-iters", "7")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    torchrun = (directory / "torchrun.log").read_text().splitlines()
    assert torchrun[:1] == ["PET_NODE_RANK=0"]
    for argument in (
        "--nnodes=2",
        "--nproc-per-node=8",
        "--master-addr=node1",
        f"--master-port={20000 + os.getpid() % 20000}",
    ):
        assert argument in torchrun
    script, *flags = torchrun[-6:]
    assert script == "examples/pretrain_graft_moe.sh"
    assert flags == ["--exit-signal-handler", "--exit-signal", "SIGUSR1", "--train-iters", "7"]
    assert (directory / "finished0").exists() and (directory / "finished1").exists()
    assert "requeue" not in (directory / "scontrol.log").read_text()


def test_at_the_time_limit_the_workers_save_and_the_job_requeues_itself(job: dict[str, str]) -> None:
    directory = Path(job["SLURM_SUBMIT_DIR"])
    process = start(job)
    wait_for(directory / "ready0")
    wait_for(directory / "ready1")
    process.send_signal(signal.SIGUSR1)  # what Slurm sends to the batch script
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert (directory / "saved0").exists() and (directory / "saved1").exists()
    assert f"requeue {os.getpid()}" in (directory / "scontrol.log").read_text()


def test_a_failed_step_is_not_requeued(job: dict[str, str]) -> None:
    directory = Path(job["SLURM_SUBMIT_DIR"])
    (directory / "bin/torchrun").write_text("#!/usr/bin/env bash\nexit 3\n")
    process = start(job)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert "requeue" not in (directory / "scontrol.log").read_text()


@pytest.mark.parametrize("name", ["DATA_PATH", "TOKENIZER_MODEL", "GRAFT_BANK"])
def test_a_missing_setting_is_named_before_anything_starts(job: dict[str, str], name: str) -> None:
    process = start({key: value for key, value in job.items() if key != name})
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert f"set {name}" in output
    assert not (Path(job["SLURM_SUBMIT_DIR"]) / "scontrol.log").exists()
