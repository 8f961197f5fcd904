"""The stages of a build run by datatrove, here and on a real Slurm; and that a build without it never meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_graft.errors import BankIncompleteError, ConfigError, PlatformError
from megatron_graft.jobs import cluster
from megatron_graft.jobs.bank_build import run_share
from megatron_graft.jobs.cluster import SlurmOptions, run_with_datatrove, stage_executors
from tests.helpers.slurm import Slurm
from tests.helpers.slurm_build import Inputs, contents, environment, make_inputs, run_tool

pytestmark = [pytest.mark.slow, pytest.mark.functional]

STAGES = ["count-2-map", "count-2-reduce", "select", "pack", "encode", "assemble", "report"]
CUT = ("--count-slices", 3, "--count-partitions", 2, "--encode-tasks", 2)
ORDERS = ("--orders", 2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def bank(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local build makes, file by file."""
    output = tmp_path_factory.mktemp("local") / "bank"
    run_tool("build_bank", *inputs.flags(output, *ORDERS))
    return contents(output)


def plan(inputs: Inputs, directory: Path) -> Path:
    """Plan a build whose output is ``bank`` beside its work directory."""
    run_tool("build_stage", "plan", "--work-dir", directory / "work", *inputs.flags(directory / "bank", *ORDERS, *CUT))
    return directory / "work"


@pytest.fixture
def work(inputs: Inputs, tmp_path: Path) -> Path:
    return plan(inputs, tmp_path)


@pytest.fixture(scope="module")
def untouched(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned build that nothing is done to."""
    return plan(inputs, tmp_path_factory.mktemp("untouched"))


def test_the_local_executor_goes_on_where_another_way_of_building_stopped(work: Path, bank: dict[str, bytes]) -> None:
    run_share(work, "count-2-map", rank=0, world_size=1)
    assert [part.pipeline[0].stage for part in stage_executors(work, executor="datatrove-local")] == STAGES[1:]
    assert run_with_datatrove(work, executor="datatrove-local", workers=2) == []
    assert contents(work.parent / "bank") == bank
    assert run_with_datatrove(work, executor="datatrove-local") == []
    assert stage_executors(work, executor="datatrove-local") == []


def test_slurm_runs_the_stages_as_a_chain_of_arrays(
    slurm: Slurm, work: Path, bank: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    options = SlurmOptions(
        partition="main", time="00:30:00", cpus_per_task=1, mem_per_cpu_gb=1, encode_gpus=1, max_jobs=2,
        sbatch_flags={"comment": "a-test"},
    )  # fmt: skip
    jobs = run_with_datatrove(work, executor="datatrove-slurm", slurm=options)
    assert len(set(jobs)) == len(STAGES)
    assert slurm.wait(jobs[-1], 300) == ["COMPLETED"], slurm.logs()
    # Three tasks in the two jobs that an array may have: the first does two of them.
    assert [len(slurm.states(job)) for job in jobs] == [2, 2, 1, 1, 2, 1, 1]
    assert {slurm.show(job)[0]["Comment"] for job in jobs} == {"a-test"}
    gpus = ["gpu" in str(slurm.show(job)) for job in jobs]
    assert gpus == [stage == "encode" for stage in STAGES]
    assert contents(work.parent / "bank") == bank


class TestWhatIsMissing:
    """Named before anything is submitted or run."""

    def test_datatrove(self, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = cluster.importlib.util.find_spec
        monkeypatch.setattr(
            cluster.importlib.util, "find_spec", lambda name: None if name == "datatrove" else find(name)
        )
        with pytest.raises(PlatformError, match=r"^datatrove: is not installed.*pip install datatrove"):
            run_with_datatrove(untouched, executor="datatrove-local")

    def test_slurm_and_its_options(self, untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="^slurm: is missing"):
            run_with_datatrove(untouched, executor="datatrove-slurm")
        monkeypatch.setenv("PATH", str(untouched))
        with pytest.raises(PlatformError, match="^sbatch: is not found"):
            run_with_datatrove(untouched, executor="datatrove-slurm", slurm=SlurmOptions(partition="main"))

    def test_a_plan(self, tmp_path: Path) -> None:
        with pytest.raises(BankIncompleteError):
            run_with_datatrove(tmp_path / "nothing", executor="datatrove-local")


def test_a_build_without_it_never_imports_datatrove() -> None:
    program = """
import sys
import megatron_graft.jobs.bank_build, megatron_graft.jobs.cluster
from tools import build_bank, build_stage
print(*sorted({"datatrove", "dill", "loguru"} & sys.modules.keys()))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (finished.returncode, finished.stdout.split()) == (0, []), finished.stderr
