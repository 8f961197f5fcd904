"""Gradients and checkpoints as runs of any layout wrote them, brought under the names of the single process."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

_COLUMN = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "engram.table")
_ROW = ("linear_proj.weight", "linear_fc2.weight")
_GATED_COLUMN = "linear_fc1.weight"  # each rank holds its part of the gate, then its part of the value
_MEMORY_COLUMNS = re.compile(r"\.memory\.(graft|engram)\.(key|value)_weight$")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Over how many ranks a model is split, and how.

    Attributes:
        tensor, pipeline, expert: over how many ranks.
        virtual: model chunks of each pipeline rank.
        first_layers: number from 0 of the first layer of each pipeline rank; none if all have equally many.
        folded: whole experts are split over the tensor-parallel ranks (--expert-tensor-parallel-size 1).
        sequence_parallel: whether positions are.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual: int = 1
    first_layers: tuple[int, ...] = ()
    folded: bool = False
    sequence_parallel: bool = False

    def groups(self) -> list[tuple[int, list[int]]]:
        """(pipeline rank, expert-parallel rank of each tensor-parallel rank) of ranks that hold one model together."""
        experts = [list(range(self.tensor))] if self.folded else [[e] * self.tensor for e in range(self.expert)]
        return list(itertools.product(range(self.pipeline), experts))

    def file_of(self, tensor: int, pipeline: int, expert: int) -> str:
        """The file that Megatron writes the gradients of a rank to."""
        name = f"mp_rank_{tensor:02d}"
        name += f"_{pipeline:03d}" if self.pipeline > 1 else ""
        return name + (f"_{expert:03d}" if self.expert > 1 else "") + ".pth"


def read_gradients(checkpoints: Path, iteration: int, split: Split | None = None) -> dict[str, list[torch.Tensor]]:
    """What ``--save-wgrads-interval`` wrote at an iteration: parameter name -> every copy of its whole gradient.

    Args:
        checkpoints: the run's ``--save``.
        iteration: of the step.
        split: over which ranks the model was split; sharded parameters are joined, replicated ones are copies.
    """
    split, directory = split or Split(), checkpoints / "wgrads" / f"iter_{iteration:07d}"
    if len(files := list(directory.glob("*.pth"))) != len(split.groups()) * split.tensor:
        raise AssertionError(f"{len(files)} gradient files in {directory} for {split}")
    copies: dict[str, list[torch.Tensor]] = {}
    for pipeline, experts in split.groups():
        files = [torch.load(directory / split.file_of(t, pipeline, e)) for t, e in enumerate(experts)]
        for chunk in range(split.virtual):
            ranks, stage = [file[f"model_chunk{chunk}"] for file in files], chunk * split.pipeline + pipeline
            for name in ranks[0]:
                for whole, expert in _wholes(ranks, name, split, experts):
                    copies.setdefault(_global_name(name, split, stage, expert, ranks[0]), []).append(whole)
    return copies


def _wholes(
    ranks: list[dict[str, torch.Tensor]], name: str, split: Split, experts: list[int]
) -> list[tuple[torch.Tensor, int]]:
    """The whole gradients of that name on some tensor-parallel ranks, each with the expert-parallel rank it is of."""
    parts = [rank[name] for rank in ranks]
    if split.folded and "local_experts" in name:
        return list(zip(parts, experts, strict=True))
    return [(whole, experts[0]) for whole in (_join(parts, name, split) if split.tensor > 1 else parts)]


def _join(parts: list[torch.Tensor], name: str, split: Split) -> list[torch.Tensor]:
    if name.endswith(_COLUMN):
        return [torch.cat(parts)]
    if name.endswith(_ROW) or (_MEMORY_COLUMNS.search(name) and not split.sequence_parallel):
        return [torch.cat(parts, dim=1)]
    if name.endswith(_GATED_COLUMN):
        gates, values = zip(*(part.chunk(2) for part in parts), strict=True)
        return [torch.cat([*gates, *values])]
    return parts


def _global_name(name: str, split: Split, stage: int, expert: int, rank: dict[str, torch.Tensor]) -> str:
    """Layers and experts are numbered from 0 on each stage and rank; all ranks have equally many experts."""
    for pattern, place, firsts in (
        (r"(?<=decoder\.layers\.)\d+", stage, split.first_layers),
        (r"(?<=local_experts\.)\d+", expert, ()),
    ):
        here = len({found.group() for other in rank if (found := re.search(pattern, other))})
        first = firsts[place] if firsts else place * here
        name = re.sub(pattern, lambda found, first=first: str(int(found.group()) + first), name)
    return name


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, as a share of the largest value of ``expected``."""
    return float((actual - expected).abs().max() / expected.abs().max())


def read_checkpoint(checkpoints: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its key."""
    loaded: dict[str, torch.Tensor] = {}
    reader = FileSystemReader(checkpoints / f"iter_{iteration:07d}")
    _load_state_dict(loaded, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def digests(directory: Path) -> dict[str, str]:
    """File name -> SHA-256 of every file in a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
