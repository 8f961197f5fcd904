"""Tasks of counting in a pool of processes on this machine. A cluster needs none: there, ranks are processes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_graft.building.count import count_stages
from megatron_graft.building.count_plan import CountPlan
from megatron_graft.building.tasks import BuildLog, Stage, StageProgress, run_task, tasks_of_rank
from megatron_graft.errors import PlatformError
from megatron_graft.processes import end_with_parent

_stages: dict[str, Stage] = {}
_log: BuildLog | None = None


class CountingPool:
    """Runs the tasks of counting stages, so many at a time. A context manager; processes start when they are needed.

    Args:
        plan: of the counting.
        work: the work directory.
        log: where tasks are noted.
        workers: number of processes.
    """

    def __init__(self, plan: CountPlan, work: Path, log: BuildLog, workers: int) -> None:
        self._work, self._log = work, log
        # Not forked: the parent may hold a tokenizer, a donor and threads, none of which belongs in a worker's memory.
        self._executor = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=(plan, work, log.path),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def run(self, stage: Stage) -> None:
        """Run what is left of a stage.

        Raises:
            PlatformError: a process died. Finished tasks are kept.
            GraftError: whatever a task finds wrong; tasks that had not begun are not run.
        """
        tasks = tasks_of_rank(stage, self._work, rank=0, world_size=1)
        progress = StageProgress(stage, len(tasks))
        futures = [self._executor.submit(_run, stage.name, task, self._work) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance()
        except BrokenProcessPool as error:
            raise PlatformError(
                f"stage {stage.name}",
                "a worker process died, perhaps for lack of memory",
                remedy="Lower --memory-gb or --workers and start again; finished tasks are kept.",
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _prepare(plan: CountPlan, work: Path, log: Path) -> None:
    global _log
    end_with_parent()  # or it would wait for ever for tasks of a parent that was killed
    _stages.update({stage.name: stage for stage in count_stages(plan, work)})
    _log = BuildLog(log)


def _run(name: str, task: int, work: Path) -> None:
    assert _log is not None, "the pool prepares every process"
    run_task(_stages[name], work, task, _log)
