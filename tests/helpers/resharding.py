"""Runs of six steps that stop after three, in layouts whose checkpoints others may go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.layouts import CP2, DISTRIBUTED_OPTIMIZER, EP2, INTERLEAVED, PP2, SP, TP2, world_flags
from tests.helpers.tiny_run import PRETRAIN, Finished, World, launch

HALF, WHOLE = 3, 6
RESHARDABLE = (*DISTRIBUTED_OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")


@dataclass(frozen=True)
class Side:
    """A layout that a checkpoint comes from or goes to: processes and flags."""

    processes: int
    flags: tuple[Any, ...]


SIDES = {
    "single": Side(1, RESHARDABLE),
    "DP=2": Side(2, RESHARDABLE),
    "TP=2, SP": Side(2, (*TP2, *SP, *RESHARDABLE)),
    "PP=2": Side(2, (*PP2, *RESHARDABLE)),
    "PP=2, interleaved": Side(2, (*PP2, *INTERLEAVED, *RESHARDABLE)),
    "CP=2": Side(2, (*CP2, *RESHARDABLE)),
    "EP=2": Side(2, (*EP2, *RESHARDABLE)),
    "TP=2, SP, EP=2": Side(4, (*TP2, *SP, *EP2, *RESHARDABLE)),
    "PP=2, EP=2": Side(4, (*PP2, *EP2, *RESHARDABLE)),
    "single, plain optimizer": Side(1, ()),
    "TP=2, SP, plain optimizer": Side(2, (*TP2, *SP)),
    "single, for data-parallel ranks only": Side(1, DISTRIBUTED_OPTIMIZER),
}


def train(
    world: World, name: str, directory: Path, *more: Any, load: Path | None = None, leave_out: str | None = None
) -> Finished:
    """Train in the layout of a side up to step six.

    Args:
        world: text, tokenizer, data and bank.
        name: of the side.
        directory: of the run; checkpoints go below it.
        more: further flags.
        load: checkpoints to go on from.
        leave_out: what of the package to do without, see ``tests/helpers/pretrain_unmended.py``.
    """
    flags = [*world_flags(world, "exclusive"), *SIDES[name].flags, "--train-iters", WHOLE]
    flags += ["--save", directory / "checkpoints", *(("--load", load) if load else ()), *more]
    module, first = (PRETRAIN, []) if leave_out is None else ("tests.helpers.pretrain_unmended", [leave_out])
    return launch(directory, flags, processes=SIDES[name].processes, module=module, arguments_first=first)
