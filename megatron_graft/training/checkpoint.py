"""The checkpoint that a run would go on from: where Megatron finds it, and what it was saved with."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import (
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
)

from megatron_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One that Megatron will load.

    Attributes:
        flag: what names it, ``--load`` or ``--pretrained-checkpoint``, with its value.
        path: its directory.
        only_weights: whether nothing but weights is taken from it: it is one to fine-tune from.
    """

    flag: str
    path: Path
    only_weights: bool

    @property
    def iteration(self) -> int:
        """The step after which it was saved; 0 for a released one."""
        number = self.path.name.removeprefix("iter_")
        return int(number) if number.isdecimal() else 0

    @functools.cached_property
    def is_distributed(self) -> bool:
        """Whether it has the format ``torch_dist``, whose common part can be read by itself."""
        return bool(dist_checkpointing.check_is_distributed_checkpoint(str(self.path)))

    @functools.cached_property
    def arguments(self) -> Any | None:
        """The arguments of the run that saved it; None if it does not hold them where they can be read."""
        if not self.is_distributed:
            return None
        return dist_checkpointing.load_common_state_dict(str(self.path)).get("args")


def checkpoint_to_load(args: argparse.Namespace) -> Checkpoint | None:
    """What Megatron would load: of ``--load``, and of ``--pretrained-checkpoint`` where that holds none; or None.

    Raises:
        ConfigError: the checkpoint that is named is not there.
    """
    flag, directory = "--load", args.load
    pretrained = args.pretrained_checkpoint is not None and not checkpoint_exists(args.load)
    if pretrained:
        flag, directory = "--pretrained-checkpoint", args.pretrained_checkpoint
    if directory is None:
        return None
    tracker = Path(get_checkpoint_tracker_filename(directory))
    step = args.ckpt_step or (tracker.read_text().strip() if tracker.is_file() else None)
    if step is None:
        return None
    release = step == "release"
    path = Path(get_checkpoint_name(directory, 0 if release else int(step), release=release, return_base_dir=True))
    if not path.is_dir():
        raise ConfigError(
            f"{flag} {directory}", f"has no {path.name}", expected="a checkpoint of that step",
            remedy="Name another step with --ckpt-step.",
        )  # fmt: skip
    return Checkpoint(
        flag=f"{flag} {directory}", path=path, only_weights=pretrained or args.finetune or bool(args.no_load_optim)
    )
