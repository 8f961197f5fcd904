"""The files that need a cluster: linted, and what they do before a job starts, or with stand-ins for Slurm's commands.

What they do under a real Slurm: test_slurm_pretrain.py and test_slurm_build.py.
"""

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
# Of a container it has the environment, its own PYTHONPATH for want of one given, and the working directory.
APPTAINER = """#!/usr/bin/env bash
shift
export PYTHONPATH="${PYTHONPATH:-$IMAGE}"
while [[ "$1" == --* ]]; do
    case $1 in --env) export "$2"; shift ;; --pwd) cd "$2"; shift ;; --bind) shift ;; esac
    shift
done
shift
exec "$@"
"""
# In the place of the training script: like Megatron, it saves and exits when it is told to, and it has
# helper processes that know nothing of signals: one inherits that they are ignored, the other does not.
WORKER = """
import os, pathlib, signal, subprocess, time
told = []
helpers = [subprocess.Popen(["sleep", "60"])]
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
helpers.append(subprocess.Popen(["sleep", "60"]))
rank = os.environ["RANK"]
pathlib.Path("ready" + rank).touch()
deadline = time.monotonic() + 60
while not told and time.monotonic() < deadline and not pathlib.Path("finish").exists():
    time.sleep(0.02)
time.sleep(0.5)  # saving takes longer than others would need to die
assert [helper.poll() for helper in helpers] == [None, None], "a helper died of the signal"
for helper in helpers:
    helper.kill()
pathlib.Path(("saved" if told else "finished") + rank).touch()
"""


def lint(*command: str) -> None:
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_dockerfile_lints() -> None:
    lint(str(TOOLS / "hadolint"), "Dockerfile")


@pytest.mark.parametrize("name", ["pretrain.sbatch", "build_bank.sbatch", "submit_build.sh"])
def test_a_script_lints(name: str) -> None:
    script = str(BATCH_SCRIPT.with_name(name))
    lint("bash", "-n", script)
    lint(str(TOOLS / "shellcheck"), script)


def test_the_image_never_replaces_the_base_images_pytorch() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    script = (REPOSITORY / "scripts/install_image.sh").read_text()
    assert not re.search(r"\bpip (install|wheel|uninstall)\b", dockerfile)
    assert re.findall(r"scripts/install_image.sh (wheel|install|check)", dockerfile) == ["wheel", "install", "check"]
    installs = [line for line in script.splitlines() if re.search(r"-m pip (install|wheel|uninstall)\b", line)]
    assert len(installs) == 4
    assert not [line for line in installs if "--no-deps" not in line]
    assert re.search(r"^USER 1\d+$", dockerfile, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == [
        "nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3"
    ] * 2  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "scripts/lock_requirements.py"), "missing", "runtime"]
    # -S: an interpreter with no packages at all, as the emptiest base there could be.
    added = subprocess.run([command[0], "-S", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert "megatron-core==" in added
    assert not re.search(r"^(torch|triton|nvidia-|cuda-)", added, re.MULTILINE)


def test_the_apptainer_recipe_takes_the_steps_of_the_dockerfile() -> None:
    recipe = (REPOSITORY / "examples/apptainer/megatron-graft.def").read_text()
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    steps, base, settings = (
        [re.findall(pattern, text, re.MULTILINE) for text in (recipe, dockerfile)]
        for pattern in (r"/?scripts/install_image.sh (wheel|install|check)\b", r"PYTORCH_VERSION=(\S+)$", r"\w+=1\b")
    )
    assert steps[0] == steps[1] == ["wheel", "install", "check"]
    assert set(base[0]) == set(base[1]) and set(settings[0]) == set(settings[1])
    copied = re.findall(r"^    (\S+) /src/(\S+)$", recipe, re.MULTILINE)
    assert {"csrc", "megatron_graft", "scripts", "setup.py", "requirements.lock"} <= {source for source, _ in copied}
    assert all(source == target and (REPOSITORY / source).exists() for source, target in copied)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a job submitted from ``tmp_path``, with the stand-ins for Slurm on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": SCANCEL,
        "torchrun": TORCHRUN,
        "apptainer": APPTAINER,
    }.items():
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
    deadline = time.monotonic() + 120
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


def test_in_a_container_the_images_package_runs_not_one_in_the_working_directory(job: dict[str, str]) -> None:
    directory = Path(job["SLURM_SUBMIT_DIR"])
    (directory / "finish").touch()
    (directory / "examples/pretrain_graft_moe.sh").write_text("raise SystemExit('a checkout')")
    for package in ("megatron_graft", "image/megatron_graft"):
        (directory / package / "examples").mkdir(parents=True)
        (directory / package / "__init__.py").touch()
    inside = directory / "image/megatron_graft/examples/pretrain_graft_moe.sh"
    inside.write_text(f"import megatron_graft\nassert '/image/megatron_graft/' in megatron_graft.__file__\n{WORKER}")
    image = {"GRAFT_CONTAINER": "an.sif", "IMAGE": str(directory / "image"), "PATH": f"{job['PATH']}:{TOOLS}"}
    process = start(job | image | {"PYTHONPATH": str(directory)})
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert str(inside) in (directory / "torchrun.log").read_text().splitlines()
    assert (directory / "finished0").exists()


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


# ---- building a bank: what is refused before anything is submitted


def call(directory: Path, name: str, *arguments: object, **variables: str) -> tuple[int, str]:
    """Run a script with a Slurm that has an empty queue and takes every job; return exit code and error output."""
    commands = directory / "bin"
    commands.mkdir(exist_ok=True)
    for command in ("squeue", "sbatch"):
        (commands / command).write_text(
            f"#!/usr/bin/env bash\n[ {command} = squeue ] || echo 7 | tee -a {directory}/jobs\n"
        )
        (commands / command).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{TOOLS}:{os.environ['PATH']}"} | variables
    command_line = ["bash", str(BATCH_SCRIPT.with_name(name)), *map(str, arguments)]
    finished = subprocess.run(command_line, cwd=directory, env=environment, capture_output=True, text=True)
    assert not (directory / "jobs").exists()
    return finished.returncode, finished.stderr


def test_submitting_a_build_refuses_what_cannot_work(tmp_path: Path) -> None:
    cases: list[tuple[tuple[object, ...], dict[str, str], str]] = [
        ((), {}, "expected WORK_DIR first"),
        (("--output", "bank"), {}, "expected WORK_DIR first"),
        (("work",), {"GRAFT_MAX_TASKS": "many"}, "GRAFT_MAX_TASKS: not a number of tasks (got many"),
        (("work",), {"GRAFT_MAX_TASKS": "0"}, "GRAFT_MAX_TASKS: not a number of tasks (got 0"),
        (("work",), {}, f"{tmp_path / 'work'}: has no plan. Give the flags"),
        (("work", "--num-rows", 10), {}, "error: --data-prefix: is missing"),
        (("work", "--work-dir", "other"), {}, "error: --work-dir: is WORK_DIR, given first"),
    ]
    for arguments, variables, message in cases:
        code, errors = call(tmp_path, "submit_build.sh", *arguments, **variables)
        assert code == 2 and message in errors, errors


def test_submitting_a_build_without_slurm_says_where_to_call_it(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "realpath"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    command = ["bash", str(BATCH_SCRIPT.with_name("submit_build.sh")), "work"]
    finished = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: sbatch: not found. Call this where jobs are submitted")


def test_a_job_of_a_build_refuses_what_cannot_work(tmp_path: Path) -> None:
    code, errors = call(tmp_path, "build_bank.sbatch", "encode")
    assert code == 2 and "expected STAGE and WORK_DIR, got 1 arguments" in errors
    code, errors = call(tmp_path, "build_bank.sbatch", "encode", tmp_path / "work")
    assert code == 2 and f"{tmp_path / 'work'}/plan.json: no such file on" in errors


def test_a_build_in_a_container_asks_the_images_package(tmp_path: Path) -> None:
    for package, word in (("megatron_graft", "a checkout"), ("image/megatron_graft", "the image")):
        tool = tmp_path / package / "tools/build_stage.py"
        tool.parent.mkdir(parents=True)
        for parent in (tool.parent, tool.parent.parent):
            (parent / "__init__.py").touch()
        tool.write_text(f"raise SystemExit('asked: {word}')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").write_text(APPTAINER)
    (tmp_path / "bin/apptainer").chmod(0o755)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/plan.json").write_text("{}")
    image = {"GRAFT_CONTAINER": "an.sif", "IMAGE": str(tmp_path / "image"), "PYTHONPATH": str(tmp_path)}
    for name, arguments in (("submit_build.sh", ["work"]), ("build_bank.sbatch", ["encode", "work"])):
        code, errors = call(tmp_path, name, *arguments, **image)
        assert code != 0 and "asked: the image" in errors and "a checkout" not in errors
