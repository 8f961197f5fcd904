"""The identity of a run's memory: kept in every checkpoint, compared before a checkpoint is continued."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.memory.site import SiteConfig
from megatron_graft.training.checkpoint import Checkpoint
from megatron_graft.training.memory_setup import RunEngram, RunMemory
from megatron_graft.training.settings import FROZEN

ARGUMENT = "graft_identity"


def memory_identity(memory: RunMemory | None) -> dict[str, Any] | None:
    """What must stay the same for a checkpoint to be continued; plain JSON values, None for the stock model."""
    if memory is None:
        return None
    return {
        "tokenizer": memory.tokenizer.fingerprint,
        "banks": [bank.digest for bank in memory.banks],
        "engram": _engram_identity(memory.engram),
        "sites": {str(layer): _site_identity(site) for layer, site in sorted(memory.sites.items())},
    }


def _site_identity(site: SiteConfig) -> dict[str, Any]:
    graft, engram = site.reading.graft, site.reading.engram
    both = graft is not None and engram is not None
    # Named only where rows are trained: checkpoints from before there was a choice are of frozen ones.
    rows = {"rows": site.rows} if site.rows not in (None, FROZEN) else {}
    return {
        "bank": graft and graft.bank,
        "columns": graft and list(graft.columns),
        "engram_rows": engram and engram.num_rows,
        "combine": ("exclusive" if site.reading.exclusive else "sum") if both else None,
        "gate": site.gate,
        "conv_kernel": site.conv_kernel,
        "conv_dilation": site.conv_dilation,
        **rows,
    }


def _engram_identity(engram: RunEngram | None) -> dict[str, Any] | None:
    if engram is None:
        return None
    config = engram.config
    return {
        "dialect": config.dialect.name,
        "max_order": config.max_order,
        "heads": config.heads,
        "vocab_sizes": list(config.vocab_sizes),
        "dim": config.dim,
        "seed": config.seed,
        "pad_id": config.pad_id,
        "across_documents": config.across_documents,
        "layer_ids": [list(pair) for pair in config.layer_ids],
        "compressed_vocabulary": engram.vocabulary.digest,
    }


def check_checkpoint_identity(
    args: argparse.Namespace, identity: dict[str, Any] | None, checkpoint: Checkpoint | None
) -> None:
    """Compare ``identity`` with that of the checkpoint that the run would continue or fine-tune, if there is one.

    Reads the checkpoint's common part only, in every process by itself, before any collective. With
    ``--graft-adopt-checkpoint`` a difference is what is wanted: then what either side lacks is passed over.

    Raises:
        ConfigError: another memory's checkpoint would be adopted with its optimizer state.
        IdentityError: the checkpoint was trained with another memory (or with one where this run has none, or the
            other way round), or has a format that does not tell.
    """
    if checkpoint is None:
        return
    if not checkpoint.is_distributed:
        if identity is None:
            return
        raise IdentityError(
            checkpoint.flag, f"{checkpoint.path.name} does not have the format in which a memory's identity is kept",
            expected="one saved with --ckpt-format torch_dist",
            remedy="Convert it: let the stock model load it (--auto-detect-ckpt-format) and save it in that format.",
        )  # fmt: skip
    saved = getattr(checkpoint.arguments, ARGUMENT, None)
    if saved == identity:
        return
    if args.graft_adopt_checkpoint:
        if not checkpoint.only_weights:
            raise ConfigError(
                "--graft-adopt-checkpoint", "cannot take the optimizer state of other parameters along",
                got=checkpoint.flag,
                remedy="Give that checkpoint as --pretrained-checkpoint, and --load the run's own; or add --finetune "
                "(start at step 0) or --no-load-optim.",
            )  # fmt: skip
        args.dist_ckpt_strictness = "log_all"
        return
    adopt = "or start from its other parameters: --graft-adopt-checkpoint, with it as --pretrained-checkpoint"
    if saved is None or identity is None:
        raise IdentityError(
            checkpoint.flag, "was trained with a memory" if saved else "was trained without a memory",
            got=_described(saved), expected=_described(identity),
            remedy=f"Give the run the checkpoint's memory (--graft-bank, --graft-layers, --engram-layers), {adopt}.",
        )  # fmt: skip
    name = next(key for key in identity if saved.get(key) != identity[key])
    raise IdentityError(
        checkpoint.flag, f"was trained with other {name} of its memory", got=json.dumps(saved.get(name)),
        expected=json.dumps(identity[name]),
        remedy="Point --graft-bank (and the other --graft-* and --engram-* flags, and --bank-rows) at what the "
        f"checkpoint was trained with, {adopt}.",
    )  # fmt: skip


def _described(identity: dict[str, Any] | None) -> str:
    if identity is None:
        return "no memory"
    parts = [f"bank {digest}" for digest in identity.get("banks", [])]
    return ", ".join([*parts, *(["hashed tables"] if identity.get("engram") else [])])


def check_same_on_all_ranks(identity: dict[str, Any] | None) -> None:
    """Compare the identity over all ranks: node-local copies of a bank can differ.

    Raises:
        IdentityError: on every rank, with what differs by rank.
    """
    identities: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(identities, identity)
    if any(other != identities[0] for other in identities):
        table = ", ".join(f"rank {rank}: {_described(other)}" for rank, other in enumerate(identities))
        raise IdentityError(
            "--graft-bank", "does not give all ranks the same memory", got=table,
            remedy="Copy one bank to every node, and give every rank the same flags.",
        )  # fmt: skip
