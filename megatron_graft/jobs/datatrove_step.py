"""A stage of a build as a step of a datatrove pipeline. The one module that needs datatrove to be imported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megatron_graft.jobs.bank_build import run_share


class StageTasks(PipelineStep):
    """Runs a worker's share of one stage: the tasks that fall to datatrove's rank and are not done.

    Documents that come in go out unchanged; a stage reads and writes files.

    Args:
        work: work directory of a planned build, on a file system that all nodes share.
        stage: name of the stage.
    """

    type = "megatron-graft"

    def __init__(self, work: Path, stage: str) -> None:
        self.name = f"stage {stage}"
        super().__init__()
        self.work, self.stage = str(work), stage

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Run the share.

        Raises:
            GraftError: a task failed; those before it are kept.
        """
        if data:
            yield from data
        with self.track_time():
            run_share(Path(self.work), self.stage, rank=rank, world_size=world_size)
        self.stat_update("shares")
