"""From a run's own flags to what each rank will hold and move, for a number of ranks that need not exist.

Megatron's own functions tell the backbone's state and operations; :mod:`megatron_graft.training.run_cost` what the
memory adds. A bank is taken from the run's ``--graft-bank``, of which only headers are read, or described by its size
where it is not built yet.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.training.arguments import parse_and_validate_args
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
from megatron.training.training import num_floating_point_operations

from megatron_graft.bank.reader import open_bank
from megatron_graft.compat.megatron import require_megatron, use_shipped_dataset_helpers
from megatron_graft.data.memory_layout import EngramReading, GraftReading, SiteReading
from megatron_graft.errors import ConfigError
from megatron_graft.ngram.hashing import layer_hashes
from megatron_graft.training.arguments import add_graft_arguments, graft_settings
from megatron_graft.training.run_cost import RunShape, SitePlan
from megatron_graft.training.run_terms import BankShape
from megatron_graft.training.settings import EngramSettings, GraftSettings

_UNEVEN_STAGES = (
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
_ANY_VOCABULARY = 1 << 17  # sizes of tables do not depend on it


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run on paper.

    Attributes:
        shape: what decides the cost of its memory.
        banks: that it reads.
        backbone_state: bytes of parameters, gradients and optimizer state of the stock model on its fullest rank.
        backbone_flops: operations per token of a forward and backward pass of the stock model.
        tokens: of a step, over all ranks.
    """

    shape: RunShape
    banks: tuple[BankShape, ...]
    backbone_state: float
    backbone_flops: float
    tokens: int


def plan_run(flags: Sequence[str], world_size: int, bank: BankShape | None = None) -> RunPlan:
    """Read a run's flags as the run itself would, with ``world_size`` ranks.

    Args:
        flags: Megatron's and this package's, as the run is given them.
        world_size: number of ranks.
        bank: stands for every ``--graft-bank`` of the run, which then need not exist.

    Raises:
        ConfigError: flags that the run would refuse, or a layout that does not divide the ranks.
        BankError: a bank of the run cannot be read.
    """
    require_megatron()
    use_shipped_dataset_helpers()
    args = _arguments(flags, world_size)
    _require_even_stages(args)
    settings = graft_settings(args)
    banks = tuple(bank or _bank_shape(path) for path in settings.banks)
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    shape = RunShape(
        world_size=world_size,
        tensor=args.tensor_model_parallel_size,
        context=args.context_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        data=args.data_parallel_size,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        num_layers=args.num_layers,
        hidden=args.hidden_size,
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        micro_batches=micro_batches,
        look_ahead=settings.look_ahead_of(micro_batches),
        element_bytes=2 if args.bf16 or args.fp16 else 4,
        sites=tuple(_sites(settings, banks)),
    )
    tokens = args.global_batch_size * args.seq_length
    return RunPlan(
        shape=shape,
        banks=banks,
        backbone_state=_backbone_state(args),
        backbone_flops=num_floating_point_operations(args, args.global_batch_size) / tokens,
        tokens=tokens,
    )


def _require_even_stages(args: argparse.Namespace) -> None:
    for name in _UNEVEN_STAGES:
        if value := getattr(args, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}", "gives pipeline stages different numbers of layers: not planned",
                got=value, remedy="Plan with even stages: leave it out.",
            )  # fmt: skip


def _arguments(flags: Sequence[str], world_size: int) -> argparse.Namespace:
    """Megatron's validated arguments, of the first of so many ranks; no process group is made."""
    before, environment = sys.argv, dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron wants it of a tensor-parallel run
    sys.argv = ["plan", *flags]
    try:
        return parse_and_validate_args(  # type: ignore[no-any-return]
            extra_args_provider=add_graft_arguments, args_defaults={"dataloader_type": "external"}
        )
    except AssertionError as error:
        raise ConfigError("--world-size", f"does not suit the run's flags: {error}", got=world_size) from error
    finally:
        sys.argv = before
        os.environ.clear()
        os.environ |= environment


_UNSPLIT_BYTES = 18  # of a parameter, in Megatron's formula where optimizer state is not split


def _backbone_state(args: argparse.Namespace) -> float:
    """Parameters and gradients, and optimizer state, of which ranks that hold the same parameters share the work.

    Megatron's own formula tells how many parameters there are. Their bytes are counted here: it knows no float32, and
    splits dense ones over data-parallel ranks, while the optimizer splits them over context-parallel ones as well.
    """
    unsplit = copy.copy(args)
    unsplit.use_distributed_optimizer = False
    dense = copy.copy(unsplit)
    dense.moe_ffn_hidden_size = 0  # no parameter is left to an expert
    total, of_dense = (compute_weight_and_optimizer_memory(one) / _UNSPLIT_BYTES for one in (unsplit, dense))
    expert_shards = (
        args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    )
    return float(
        of_dense * _state_bytes(args, args.data_parallel_size * args.context_parallel_size)
        + (total - of_dense) * _state_bytes(args, args.world_size // expert_shards)
    )


def _state_bytes(args: argparse.Namespace, copies: int) -> float:
    """Bytes of a parameter, its gradient and its share of Adam's state, where ``copies`` ranks hold it."""
    split = copies if args.use_distributed_optimizer else 1
    return 6 + 12 / split if args.bf16 or args.fp16 else 8 + 8 / split


def _bank_shape(path: Path) -> BankShape:
    bank = open_bank(path)
    return BankShape(
        num_rows=bank.num_rows,
        layers=bank.manifest.identity.donor.layers,
        widths=bank.row_layout.widths,
        max_order=bank.max_order,
        row_dtype=bank.row_layout.dtype.name,
        num_bytes=sum(file.stat().st_size for file in bank.path.iterdir()),
    )


def _sites(settings: GraftSettings, banks: Sequence[BankShape]) -> list[SitePlan]:
    grafts = {
        layer: _graft(settings.bank_of_site(site), banks, settings, settings.donor_layers[site])
        for site, layer in enumerate(settings.layers)
    }
    tables = _tables(settings.engram) if settings.engram else {}
    readings = [
        SiteReading(
            layer_number=layer, graft=grafts.get(layer), engram=tables.get(layer),
            exclusive=settings.combine == "exclusive",
        )
        for layer in sorted(grafts.keys() | tables.keys())
    ]  # fmt: skip
    return [
        SitePlan(
            reading=reading,
            conv_kernel=settings.conv_kernel,
            conv_dilation=settings.conv_dilation or reading.max_order,
        )
        for reading in readings
    ]


def _graft(
    number: int, banks: Sequence[BankShape], settings: GraftSettings, donor_layers: tuple[int, ...] | None
) -> GraftReading:
    bank = banks[number]
    wanted = bank.layers if donor_layers is None else donor_layers
    if not set(wanted) <= set(bank.layers):
        raise ConfigError(
            "--graft-donor-layers", "names layers that the bank does not have", got=wanted, expected=bank.layers
        )
    first = sum(bank.widths[: bank.layers.index(wanted[0])])
    width = sum(bank.widths[bank.layers.index(layer)] for layer in wanted)
    rows = min(settings.bank_rows or bank.num_rows, bank.num_rows)
    return GraftReading(
        bank=number,
        columns=(first, first + width),
        row_layout=bank.layout,
        max_order=bank.max_order,
        trained_rows=rows if settings.trains_rows else None,
    )


def _tables(settings: EngramSettings) -> dict[int, EngramReading]:
    config = settings.hashing(eod=0)
    return {
        layer: EngramReading(
            num_rows=hash_.num_rows, num_heads=config.num_heads, head_dim=config.head_dim, max_order=config.max_order
        )
        for layer, hash_ in layer_hashes(config, _ANY_VOCABULARY).items()
    }
