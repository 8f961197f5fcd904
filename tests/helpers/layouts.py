"""The parallel layouts that must train alike, and the checkpoint that all of them go on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.helpers.saved_tensors import Split
from tests.helpers.tiny_run import Finished, World

START, STEPS = 9, 10  # the layouts go on from iteration 9, so that gradients are written at their first step alone
GRADIENTS_EVERY = START + 1
MODEL_ONLY = ("--no-load-optim", "--no-load-rng")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over processes.

    Attributes:
        processes: how many.
        flags: what asks Megatron for it.
        split: how the model is split over them.
        world: whose model and memory (:data:`WORLDS`).
        reference: the layout whose losses and gradients these must be.
        close: whether to a few per mille only, for want of bits; else to the last few bits of float32.
    """

    processes: int = 1
    flags: tuple[Any, ...] = ()
    split: Split = field(default_factory=Split)
    world: str = "exclusive"
    reference: str = "single"
    close: bool = False


# Model and memory of the layouts, beyond the flags that all runs have.
# fmt: off
TABLES = ("--engram-layers", 2, 4, "--engram-max-order", 4, "--engram-vocab-size", 101, 67, 53, "--engram-heads", 3,
          "--engram-dim", 15)
WORLDS: dict[str, tuple[Any, ...]] = {
    # Layer 2 reads bank and table, layer 3 another donor layer of the bank, layer 4 a table: under PP=2 one stage has
    # what the other lacks. A bank's 15 columns, 9 heads and the odd number of a table's rows are uneven over two ranks.
    "exclusive": ("--graft-donor-layers", 4, 8, *TABLES, "--graft-combine", "exclusive"),
    "sum": ("--graft-donor-layers", "4,8", 8, *TABLES, "--graft-combine", "sum", "--graft-conv-kernel", 3,
            "--graft-conv-dilation", 2, "--engram-across-documents"),
    "dense": ("--graft-donor-layers", "4,8", 4, *TABLES, "--graft-combine", "sum"),
    "mtp": ("--graft-donor-layers", 4, 8, *TABLES, "--graft-combine", "exclusive", "--mtp-num-layers", 1),
    "packed": ("--graft-donor-layers", 4, 8, *TABLES, "--graft-combine", "exclusive",
               "--dataloader-inter-document-masking"),
}
TP2 = ("--tensor-model-parallel-size", 2)
SP, PP2, EP2 = ("--sequence-parallel",), ("--pipeline-model-parallel-size", 2), ("--expert-model-parallel-size", 2)
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1)
CP2 = ("--context-parallel-size", 2)
INTERLEAVED = ("--num-layers-per-virtual-pipeline-stage", 1)
LAYOUTS = {
    "single": Layout(),
    "DP=2": Layout(processes=2),
    "DP=2, distributed optimizer": Layout(processes=2, flags=DISTRIBUTED_OPTIMIZER),
    "DP=2, distributed optimizer, overlap": Layout(
        processes=2, flags=(*DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather")
    ),
    "TP=2, sequence parallel": Layout(processes=2, flags=(*TP2, *SP), split=Split(tensor=2, sequence_parallel=True)),
    "EP=2": Layout(processes=2, flags=EP2, split=Split(expert=2)),
    "EP=2, allgather": Layout(processes=2, flags=(*EP2, *ALLGATHER), split=Split(expert=2)),
    "PP=2": Layout(processes=2, flags=PP2, split=Split(pipeline=2)),
    "PP=2, full recompute": Layout(processes=2, flags=(*PP2, *RECOMPUTE), split=Split(pipeline=2)),
    "full recompute of some layers": Layout(
        flags=("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", 3)
    ),
    "selective recompute": Layout(
        flags=("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "moe")
    ),
    "PP=2, interleaved": Layout(
        processes=2, flags=(*PP2, *INTERLEAVED), split=Split(pipeline=2, virtual=2)
    ),
    "PP=2, uneven": Layout(
        processes=2, flags=(*PP2, "--pipeline-model-parallel-layout", "Ettt|tL"),
        split=Split(pipeline=2, first_layers=(0, 3)),
    ),
    "TP=2, sequence parallel, EP=2, ETP=1": Layout(
        processes=2, flags=(*TP2, *SP, *EP2, "--expert-tensor-parallel-size", 1),
        split=Split(tensor=2, expert=2, folded=True, sequence_parallel=True),
    ),
    "TP=2, sequence parallel, EP=2": Layout(
        processes=4, flags=(*TP2, *SP, *EP2), split=Split(tensor=2, expert=2, sequence_parallel=True)
    ),
    "PP=2, EP=2": Layout(
        processes=4, flags=(*PP2, *EP2, *DISTRIBUTED_OPTIMIZER), split=Split(pipeline=2, expert=2)
    ),
    "TP=2, sequence parallel, PP=2": Layout(
        processes=4, flags=(*TP2, *SP, *PP2), split=Split(tensor=2, pipeline=2, sequence_parallel=True)
    ),
    "CP=2": Layout(processes=2, flags=CP2),
    "CP=2, EP=2": Layout(processes=2, flags=(*CP2, *EP2), split=Split(expert=2)),
    "PP=2, CP=2": Layout(
        processes=4, flags=(*PP2, *CP2, *DISTRIBUTED_OPTIMIZER), split=Split(pipeline=2)
    ),
    "TP=2, sequence parallel, CP=2": Layout(
        processes=4, flags=(*TP2, *SP, *CP2), split=Split(tensor=2, sequence_parallel=True)
    ),
    "sum": Layout(world="sum", reference="sum"),
    "sum, TP=2, sequence parallel": Layout(
        processes=2, flags=(*TP2, *SP), split=Split(tensor=2, sequence_parallel=True), world="sum", reference="sum"
    ),
    "dense": Layout(world="dense", reference="dense"),
    "dense, TP=2": Layout(processes=2, flags=TP2, split=Split(tensor=2), world="dense", reference="dense"),
    "dense, CP=2": Layout(processes=2, flags=CP2, world="dense", reference="dense"),
    "dense, TP=2, CP=2": Layout(
        processes=4, flags=(*TP2, *CP2), split=Split(tensor=2), world="dense", reference="dense"
    ),
    "dense, micro-batch of 4": Layout(flags=("--micro-batch-size", 4), world="dense", reference="dense"),
    "MTP": Layout(world="mtp", reference="MTP"),
    "MTP, PP=2": Layout(processes=2, flags=PP2, split=Split(pipeline=2), world="mtp", reference="MTP"),
    "MTP, EP=2": Layout(processes=2, flags=EP2, split=Split(expert=2), world="mtp", reference="MTP"),
    "packed": Layout(world="packed", reference="packed"),
    "packed, DP=2": Layout(processes=2, world="packed", reference="packed"),
    "packed, EP=2": Layout(processes=2, flags=EP2, split=Split(expert=2), world="packed", reference="packed"),
    "packed, full recompute": Layout(flags=RECOMPUTE, world="packed", reference="packed"),
    "bf16": Layout(flags=("--bf16",), close=True),
    "bf16, DP=2, distributed optimizer": Layout(
        processes=2, flags=("--bf16", *DISTRIBUTED_OPTIMIZER), reference="bf16"
    ),
}
# fmt: on


def world_flags(world: World, name: str) -> list[Any]:
    """Every flag of a run of a world of :data:`WORLDS` but the number of steps, the layout and the checkpoints."""
    if name != "dense":
        return [*world.flags(world.bank), *WORLDS[name]]
    banks = ["--graft-bank", world.bank, world.many_rows]  # the last of a flag counts: layer 3 reads the second one
    return [*world.flags(world.bank, experts=False), *banks, *WORLDS[name]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """The checkpoint that every layout of a world goes on from, and what one process made of the first global batch.

    Attributes:
        run: wrote the checkpoint.
        measured: see ``tests/helpers/randomised_checkpoint.py``.
    """

    run: Finished
    measured: dict[str, Any]
