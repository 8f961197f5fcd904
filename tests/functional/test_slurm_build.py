"""A bank built by a chain of array jobs on a real Slurm, whatever happens to its jobs on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.slurm import Slurm, wait_until
from tests.helpers.slurm_build import REPOSITORY, STOPPER, Inputs, contents, environment, make_inputs, run_tool

pytestmark = [pytest.mark.slow, pytest.mark.functional]

SUBMIT = REPOSITORY / "examples/slurm/submit_build.sh"
CUT = ("--count-slices", 3, "--count-partitions", 2, "--encode-tasks", 3)
STAGES = {
    "count-2-map": 3, "count-2-reduce": 2, "count-3-map": 3, "count-3-reduce": 2, "select": 1, "pack": 1, "encode": 3,
    "assemble": 1, "report": 1,
}  # fmt: skip
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Build:
    """One build on a Slurm; ``stopper`` holds what is loaded into every Python of its jobs."""

    def __init__(self, slurm: Slurm, directory: Path) -> None:
        self.slurm, self.work, self.stopper = slurm, directory / "work", directory / "stopper"
        self.stopper.mkdir()
        (self.stopper / "sitecustomize.py").write_text(STOPPER)

    def submit(self, *flags: object, **variables: str) -> dict[str, str]:
        """Call submit_build.sh; return the job's number of every stage it submitted."""
        paths = {"PATH": environment()["PATH"], "PYTHONPATH": f"{self.stopper}:{os.environ['PYTHONPATH']}"}
        printed = self.slurm.run(SUBMIT, self.work, *flags, cwd=self.work.parent, **paths, **variables)
        lines = [line.split() for line in printed.splitlines() if "submitted as job" in line]
        return {words[0].removesuffix(":"): words[-1] for words in lines}

    def reached(self, task: str) -> int:
        """Wait until a task has come to its stop; return its process."""
        note = self.stopper / f"reached-{task}"
        wait_until(lambda: note.exists() and note.read_text().endswith("\n"), f"{task} at its stop", 180)
        return int(note.read_text())


@pytest.fixture
def build(slurm: Slurm, tmp_path: Path) -> Build:
    return Build(slurm, tmp_path)


def test_a_chain_of_arrays_survives_kills_and_requeues_and_ends_in_the_bank_of_a_local_build(
    build: Build, inputs: Inputs, tmp_path: Path
) -> None:
    slurm, flags = build.slurm, inputs.flags(tmp_path / "bank", "--orders", 2, 3, *CUT)
    stops = {"GRAFT_TEST_STOPS": "count-2-map-00001 count-3-map-00001 encode-00001"}
    options = {"GRAFT_MAX_TASKS": "2", "GRAFT_ENCODE_SBATCH": "--gpus-per-task=1", "GRAFT_SBATCH": "--cpus-per-task=1"}
    jobs = build.submit(*flags, **stops, **options)
    assert list(jobs) == list(STAGES)

    build.reached("count-2-map-00001")
    with pytest.raises(AssertionError, match="its build is in the queue already"):
        build.submit()
    last = f"{jobs['count-2-map']}_1"  # which Slurm also calls by the number of the whole array
    slurm.run("scontrol", "requeue", last)  # as when a node fails, or a job of higher priority comes

    build.reached("count-3-map-00001")
    told = f"{jobs['count-3-map']}_1"
    slurm.run("scancel", "--batch", "--signal=USR1", told)  # as before the time limit

    process = build.reached("encode-00001")
    states = {stage: slurm.states(jobs[stage]) for stage in STAGES}
    assert [len(states[stage]) for stage in STAGES] == [min(2, tasks) for tasks in STAGES.values()]
    assert {*states["count-2-map"], *states["count-3-reduce"], *states["pack"]} == {"COMPLETED"}
    assert {*states["assemble"], *states["report"]} == {"PENDING"}
    assert "gpu:1" in str(slurm.show(jobs["encode"]))
    os.kill(process, signal.SIGKILL)  # as when memory runs out; nobody requeues that
    assert sorted(slurm.wait(jobs["encode"])) == ["COMPLETED", "FAILED"]
    assert slurm.wait(jobs["report"], 60) == ["CANCELLED"], "stages behind a failed one must not wait for ever"
    assert not (tmp_path / "bank").exists()

    again = build.submit(**options)
    assert list(again) == ["encode", "assemble", "report"]
    assert slurm.wait(again["report"], PATIENCE_SECONDS) == ["COMPLETED"]
    for stage in ("count-2-map", "count-3-map"):
        assert sorted(fields["Restarts"] for fields in slurm.show(jobs[stage])) == ["0", "1"], "of one task, not all"
    log = "".join(file.read_text() for file in (build.work / "logs").glob("graft-count-3-map-*.log"))
    assert f"stage count-3-map: time limit reached; requeueing job {told}" in log

    run_tool("build_bank", *inputs.flags(tmp_path / "local", "--orders", 2, 3))
    assert contents(tmp_path / "bank") == contents(tmp_path / "local")
    temporary = [line for line in (build.stopper / "tmpdirs").read_text().splitlines() if line.startswith("/")]
    of_jobs = [path for path in temporary if Path(path).is_relative_to(slurm.directory)]
    assert len(set(of_jobs)) >= 13, "every job of an array had a TMPDIR of its own"
    assert build.submit() == {}, "nothing is left to do"
