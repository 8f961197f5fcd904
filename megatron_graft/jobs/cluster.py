"""The stages of a planned build run by datatrove, on this machine or as arrays of Slurm jobs.

datatrove is imported inside functions: a build without it never meets it. Which tasks are done is told by the work
directory alone, never by datatrove's own notes, so both ways of building can take turns in one directory.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_graft.building.tasks import Stage, remaining_stages
from megatron_graft.errors import ConfigError, PlatformError
from megatron_graft.jobs.bank_build import open_stages
from megatron_graft.log import get_logger

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

Executor = Literal["datatrove-local", "datatrove-slurm"]
LOGS = "datatrove"
"""Directory of datatrove's notes and logs below the work directory: one directory a stage."""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What Slurm is asked for.

    Attributes:
        partition: of every job.
        time: time limit of a job, as ``sbatch --time`` takes it.
        cpus_per_task: processors of a job.
        mem_per_cpu_gb: memory of a processor, in GiB.
        encode_gpus: GPUs of a job of the stage that runs the donor.
        encode_partition: partition of those jobs, if another.
        qos: quality of service; empty: the site's default.
        max_jobs: most jobs of one array. A stage of more tasks gives each job several.
        max_running: jobs of an array that may run at once; -1: as many as there is room for.
        environment_command: shell line that makes Python ready on a node. Empty: the Python that submits, found on
            the node under the same path.
        sbatch_flags: further flags of ``sbatch``, without their dashes: ``{"account": "lm"}``.
    """

    partition: str
    time: str = "04:00:00"
    cpus_per_task: int = 2
    mem_per_cpu_gb: int = 4
    encode_gpus: int = 0
    encode_partition: str = ""
    qos: str = ""
    max_jobs: int = 200
    max_running: int = -1
    environment_command: str = ""
    sbatch_flags: Mapping[str, str] = field(default_factory=dict)


def run_with_datatrove(
    work: Path, *, executor: Executor, workers: int = 1, slurm: SlurmOptions | None = None
) -> list[str]:
    """Run what is left of a planned build through datatrove.

    Args:
        work: work directory, where the plan is; for Slurm on a file system that all nodes share.
        executor: ``"datatrove-local"`` runs everything here and returns when the bank is there;
            ``"datatrove-slurm"`` submits one array of jobs a stage, each after the one before it, and returns.
        workers: processes of the local executor.
        slurm: what Slurm is asked for; needed by ``"datatrove-slurm"``.

    Returns:
        Numbers of the submitted jobs, in the order of the stages; empty if none were.

    Raises:
        PlatformError: datatrove or Slurm's ``sbatch`` is not installed.
        ConfigError: ``slurm`` is missing.
        GraftError: a task that ran here failed.
    """
    chain = stage_executors(work, executor=executor, workers=workers, slurm=slurm)
    if not chain:
        get_logger().info("%s: every stage is done", work)
        return []
    chain[-1].run()  # runs or submits those it depends on first
    # A local executor has no job; a submitted stage always has one, as all of its tasks are handed over.
    jobs = [str(part.job_id) for part in chain if getattr(part, "job_id", None)]
    for part, job in zip(chain, jobs, strict=False):
        get_logger().info("%s: submitted as job %s", part.job_name, job)
    return jobs


def stage_executors(
    work: Path, *, executor: Executor, workers: int = 1, slurm: SlurmOptions | None = None
) -> list[PipelineExecutor]:
    """datatrove's executors for the stages that are left, each depending on the one before it. Nothing is run.

    Raises:
        PlatformError, ConfigError: see :func:`run_with_datatrove`.
        BankIncompleteError: nothing is planned in ``work``.
    """
    _require_datatrove()
    stages = open_stages(work)
    left = remaining_stages(stages.all, stages.work)
    if executor == "datatrove-local":
        return _local_chain(stages.work, left, workers)
    if slurm is None:
        raise ConfigError("slurm", "is missing", expected="SlurmOptions, at least the partition")
    if shutil.which("sbatch") is None:
        raise PlatformError("sbatch", "is not found", remedy="Submit from a node of a Slurm cluster, or build locally.")
    return _slurm_chain(stages.work, left, slurm)


def _require_datatrove() -> None:
    if importlib.util.find_spec("datatrove") is None:
        raise PlatformError(
            "datatrove", "is not installed", remedy="Install it with: pip install datatrove, or build without it."
        )


def _local_chain(work: Path, stages: Sequence[Stage], workers: int) -> list[PipelineExecutor]:
    from datatrove.executor import LocalPipelineExecutor

    from megatron_graft.jobs.datatrove_step import StageTasks

    chain: list[PipelineExecutor] = []
    for stage in stages:
        chain.append(
            LocalPipelineExecutor(
                pipeline=[StageTasks(work, stage.name)],
                tasks=stage.num_tasks,
                workers=max(1, min(workers, stage.num_tasks)),
                logging_dir=str(work / LOGS / stage.name),
                depends=chain[-1] if chain else None,
                skip_completed=False,
                start_method="spawn",
            )
        )
    return chain


def _slurm_chain(work: Path, stages: Sequence[Stage], options: SlurmOptions) -> list[PipelineExecutor]:
    from datatrove.executor import SlurmPipelineExecutor

    from megatron_graft.jobs.datatrove_step import StageTasks

    chain: list[PipelineExecutor] = []
    for stage in stages:
        encodes = stage.name == "encode"
        chain.append(
            SlurmPipelineExecutor(
                pipeline=[StageTasks(work, stage.name)],
                tasks=stage.num_tasks,
                tasks_per_job=math.ceil(stage.num_tasks / options.max_jobs),
                max_array_size=options.max_jobs,
                workers=options.max_running,
                time=options.time,
                partition=options.encode_partition if encodes and options.encode_partition else options.partition,
                cpus_per_task=options.cpus_per_task,
                mem_per_cpu_gb=options.mem_per_cpu_gb,
                gpus_per_task=options.encode_gpus if encodes else 0,
                job_name=f"graft-{stage.name}",
                qos=options.qos,
                env_command=options.environment_command or _this_python(),
                # Should a stage fail, those behind it are not to wait for ever.
                sbatch_args={"kill-on-invalid-dep": "yes", "open-mode": "append", **options.sbatch_flags},
                logging_dir=str(work / LOGS / stage.name),
                depends=chain[-1] if chain else None,
                skip_completed=False,
            )
        )
    return chain


def _this_python() -> str:
    """Puts the commands and modules of the Python that runs this first on a node."""
    checkout = Path(__file__).resolve().parents[2]
    commands = Path(sys.executable).absolute().parent
    return f'export PATH="{commands}:$PATH" PYTHONPATH="{checkout}:$PYTHONPATH"'
