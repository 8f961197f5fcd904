"""The parallel layouts that must train alike, and the checkpoint that all of them go on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.helpers.saved_tensors import Axis
from tests.helpers.tiny_run import Finished

START, STEPS = 9, 10  # the layouts go on from iteration 9, so that gradients are written at their first step alone
GRADIENTS_EVERY = START + 1
MODEL_ONLY = ("--no-load-optim", "--no-load-rng")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over processes."""

    processes: int = 1
    flags: tuple[Any, ...] = ()
    axis: Axis = "none"


# fmt: off
LAYOUTS = {
    "single": Layout(),
    "DP=2, distributed optimizer": Layout(processes=2, flags=("--use-distributed-optimizer",)),
    "TP=2, sequence parallel": Layout(
        processes=2, flags=("--tensor-model-parallel-size", 2, "--sequence-parallel"), axis="tensor"
    ),
    "EP=2": Layout(processes=2, flags=("--expert-model-parallel-size", 2), axis="expert"),
    "PP=2": Layout(processes=2, flags=("--pipeline-model-parallel-size", 2), axis="pipeline"),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that every layout goes on from, and what one process made of the first global batch.

    Attributes:
        run: wrote the checkpoint.
        measured: see ``tests/helpers/randomised_checkpoint.py``.
    """

    run: Finished
    measured: dict[str, Any]
