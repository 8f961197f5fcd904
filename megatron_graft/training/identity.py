"""The identity of a run's memory: kept in every checkpoint, compared before a checkpoint is continued."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from megatron_graft.errors import IdentityError
from megatron_graft.training.memory_setup import RunMemory

ARGUMENT = "graft_identity"


def memory_identity(memory: RunMemory | None) -> dict[str, Any] | None:
    """What must stay the same for a checkpoint to be continued; plain JSON values, None for the stock model."""
    if memory is None:
        return None
    return {
        "bank": memory.bank.digest,
        "tokenizer": memory.bank.tokenizer_fingerprint,
        "layers": list(memory.layers),
        "row_dim": memory.site.row_dim,
        "conv_kernel": memory.site.conv_kernel,
        "conv_dilation": memory.site.conv_dilation,
    }


def check_checkpoint_identity(args: argparse.Namespace, identity: dict[str, Any] | None) -> None:
    """Compare ``identity`` with that of the checkpoint that ``--load`` would continue, if there is one.

    Reads the checkpoint's common part only, in every process by itself, before any collective.

    Raises:
        IdentityError: the checkpoint was trained with another memory (or with one where this run has none, or the
            other way round).
    """
    directory = checkpoint_to_load(args)
    if directory is None:
        return
    saved_args = dist_checkpointing.load_common_state_dict(str(directory))["args"]
    saved = getattr(saved_args, ARGUMENT, None)
    if saved == identity:
        return
    if saved is None or identity is None:
        raise IdentityError(
            f"--load {args.load}", "was trained with a memory" if saved else "was trained without a memory",
            got=f"bank {saved['bank']}" if saved else "no bank",
            expected=f"bank {identity['bank']}" if identity else "no bank",
            remedy="Give the run the checkpoint's memory (--graft-bank, --graft-layers), or start without --load.",
        )  # fmt: skip
    name = next(key for key in identity if saved.get(key) != identity[key])
    raise IdentityError(
        f"--load {args.load}", f"was trained with another {name} of its memory", got=saved.get(name),
        expected=identity[name],
        remedy="Point --graft-bank (and the other --graft-* flags, and --bank-rows) at what the checkpoint was trained "
        "with, or start without --load.",
    )  # fmt: skip


def checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """Directory of the checkpoint that Megatron would load, or None."""
    if args.load is None:
        return None
    tracker = Path(get_checkpoint_tracker_filename(args.load))
    if not tracker.is_file():
        return None
    step = args.ckpt_step or tracker.read_text().strip()
    if step == "release":
        return Path(get_checkpoint_name(args.load, 0, release=True, return_base_dir=True))
    return Path(get_checkpoint_name(args.load, int(step), return_base_dir=True))


def check_same_on_all_ranks(identity: dict[str, Any] | None) -> None:
    """Compare the identity over all ranks: node-local copies of a bank can differ.

    Raises:
        IdentityError: on every rank, with the digests by rank.
    """
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, identity and identity["bank"])
    if len(set(digests)) > 1:
        table = ", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
        raise IdentityError(
            "--graft-bank", "is not the same bank on all ranks", got=table,
            remedy="Copy one bank to every node, and give every rank the same --bank-rows.",
        )  # fmt: skip
