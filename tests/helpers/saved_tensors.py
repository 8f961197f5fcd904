"""Gradients and checkpoints as runs of any layout wrote them, brought under the names of the single process."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

Axis = Literal["none", "tensor", "expert", "pipeline"]
_COLUMN = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight")
_ROW = ("linear_proj.weight", "linear_fc2.weight")
_GATED_COLUMN = "linear_fc1.weight"  # each rank holds its part of the gate, then its part of the value


def read_gradients(checkpoints: Path, iteration: int, axis: Axis = "none") -> dict[str, list[torch.Tensor]]:
    """What ``--save-wgrads-interval`` wrote at an iteration: parameter name -> every copy of its whole gradient.

    Args:
        checkpoints: the run's ``--save``.
        iteration: of the step.
        axis: over which ranks the model was split; along it sharded parameters are joined, replicated ones are copies.
    """
    files = sorted((checkpoints / "wgrads" / f"iter_{iteration:07d}").glob("*.pth"))
    ranks = [torch.load(file)["model_chunk0"] for file in files]
    if len(ranks) != (1 if axis == "none" else 2):
        raise AssertionError(f"{len(ranks)} gradient files below {checkpoints} for axis {axis}")
    if axis == "tensor":
        return {name: _join([rank[name] for rank in ranks], name) for name in ranks[0]}
    copies: dict[str, list[torch.Tensor]] = {}
    for index, rank in enumerate(ranks):
        for name, gradient in rank.items():
            copies.setdefault(_global_name(name, index, axis, ranks), []).append(gradient)
    return copies


def _join(parts: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    if name.endswith(_COLUMN):
        return [torch.cat(parts)]
    if name.endswith(_ROW):
        return [torch.cat(parts, dim=1)]
    if name.endswith(_GATED_COLUMN):
        gates, values = zip(*(part.chunk(2) for part in parts), strict=True)
        return [torch.cat([*gates, *values])]
    return parts


def _global_name(name: str, index: int, axis: Axis, ranks: list[dict[str, torch.Tensor]]) -> str:
    pattern = {"pipeline": r"(?<=layers\.)\d+", "expert": r"(?<=local_experts\.)\d+"}.get(axis)
    if pattern is None:
        return name
    first = {int(found.group()) for other in ranks[0] if (found := re.search(pattern, other))}
    return re.sub(pattern, lambda found: str(int(found.group()) + index * len(first)), name)


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
