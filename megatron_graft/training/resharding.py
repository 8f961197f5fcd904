"""Which checkpoints a layout can continue, optimizer state included; the others are refused when flags are read.

Model weights of a ``torch_dist`` checkpoint load into every layout. Optimizer state is Megatron's own, with limits of
its own: they are checked here because Megatron finds them late and says little.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_graft.errors import ConfigError
from megatron_graft.training.checkpoint import Checkpoint

# What a layout's optimizer state depends on unless it is fully reshardable, and the flag that sets it.
_SIZES = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "pipeline_model_parallel_layout": "--pipeline-model-parallel-layout",
    "decoder_first_pipeline_num_layers": "--decoder-first-pipeline-num-layers",
    "decoder_last_pipeline_num_layers": "--decoder-last-pipeline-num-layers",
    "expert_model_parallel_size": "--expert-model-parallel-size",
}
_WEIGHTS_ONLY = "Add --no-load-optim to start with fresh optimizer state, or keep the layout."


def check_resharding(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Compare the layout of the checkpoint that the run would continue with its own.

    Raises:
        ConfigError: the optimizer state cannot be brought from the one to the other.
    """
    if checkpoint is None or checkpoint.only_weights:
        return
    saved = checkpoint.arguments
    if saved is None or getattr(saved, "no_save_optim", False):
        return  # Megatron says itself that there is nothing to load
    _check_expert_parallel(args, saved)
    check_optimizer(args, saved)


def _check_expert_parallel(args: argparse.Namespace, saved: Any) -> None:
    """With EP > 1 experts have an optimizer of their own; without, one optimizer has all: the trees do not match."""
    size, before = args.expert_model_parallel_size, saved.expert_model_parallel_size
    if (size > 1) != (before > 1):
        raise ConfigError(
            "--expert-model-parallel-size",
            f"cannot continue the optimizer state of {args.load}: megatron-core keeps it in another form with experts "
            "split over ranks than without",
            got=size, expected="more than 1" if before > 1 else "1", remedy=_WEIGHTS_ONLY,
        )  # fmt: skip


def check_optimizer(args: argparse.Namespace, saved: Any) -> None:
    """Compare what the optimizer's state depends on with the arguments that a checkpoint was saved with.

    Raises:
        ConfigError: it cannot be brought from the one to the other.
    """
    if args.use_distributed_optimizer != saved.use_distributed_optimizer:
        raise ConfigError(
            "--use-distributed-optimizer",
            f"cannot continue the optimizer state of {args.load}: the distributed optimizer's has another form",
            got=args.use_distributed_optimizer, expected=saved.use_distributed_optimizer, remedy=_WEIGHTS_ONLY,
        )  # fmt: skip
    if not args.use_distributed_optimizer or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    for name, flag in _SIZES.items():
        if getattr(args, name) != getattr(saved, name, None):
            raise ConfigError(
                flag,
                f"differs from that of {args.load}, which was saved without --dist-ckpt-optim-fully-reshardable: its "
                "optimizer state follows another number of data-parallel ranks only",
                got=getattr(args, name), expected=getattr(saved, name, None),
                remedy=f"{_WEIGHTS_ONLY} Checkpoints saved with that flag can be continued in other layouts.",
            )  # fmt: skip
