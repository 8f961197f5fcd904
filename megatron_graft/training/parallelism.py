"""Which of Megatron's dimensions memory sites serve and where that is tested, and which are refused at parsing.

One table: flags are refused by it, ``docs/parallelism.md`` is written from it, and a test compares both with the
layouts that the tests run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_graft.errors import ConfigError
from megatron_graft.training.settings import FROZEN


@dataclass(frozen=True, kw_only=True)
class Served:
    """A dimension that sites serve.

    Attributes:
        dimension: its name.
        flags: what asks for it.
        how: what sites do under it.
        layouts: names of the tested layouts (``tests/helpers/layouts.py``) that have it.
    """

    dimension: str
    flags: str
    how: str
    layouts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A dimension that is refused.

    Attributes:
        dimension: its name.
        flag: the one to blame.
        applies: of Megatron's validated arguments: whether it is asked for.
        why: the reason, as told to the user.
        remedy: the way out.
    """

    dimension: str
    flag: str
    applies: Callable[[argparse.Namespace], Any]
    why: str
    remedy: str = "Leave it out."

    def check(self, args: argparse.Namespace) -> None:
        """Raise ``ConfigError`` if it is asked for."""
        if self.applies(args):
            value = getattr(args, self.flag.removeprefix("--").replace("-", "_"), None)
            raise ConfigError(self.flag, f"is not supported here: {self.why}", got=value, remedy=self.remedy)


SERVED = (
    Served(
        dimension="data parallel", flags="(world size)",
        how="each rank fetches for its own samples; gradients of sites and tables are reduced by Megatron",
        layouts=("DP=2",),
    ),
    Served(
        dimension="distributed optimizer", flags="--use-distributed-optimizer",
        how="tables and sites lie in Megatron's own buffers", layouts=("DP=2, distributed optimizer",),
    ),
    Served(
        dimension="overlap of gradient reduction and parameter gather",
        flags="--overlap-grad-reduce --overlap-param-gather", how="nothing of its own",
        layouts=("DP=2, distributed optimizer, overlap",),
    ),
    Served(
        dimension="tensor parallel with sequence parallel", flags="--tensor-model-parallel-size --sequence-parallel",
        how="a rank fetches and computes its own S/TP positions; projections are replicated and their gradients summed "
        "by Megatron's tag; the convolution's halo comes from the left neighbour; rows of tables and trained rows are "
        "split over the ranks and exchanged", layouts=("TP=2, sequence parallel", "TP=2, sequence parallel, EP=2"),
    ),
    Served(
        dimension="tensor parallel without sequence parallel (dense models)", flags="--tensor-model-parallel-size",
        how="a rank fetches a slice of every bank row's columns and whole heads of the table; row-parallel projections",
        layouts=("dense, TP=2",),
    ),
    Served(
        dimension="expert parallel", flags="--expert-model-parallel-size --moe-token-dispatcher-type",
        how="sites are dense parameters; both dispatchers",
        layouts=("EP=2", "EP=2, allgather", "TP=2, sequence parallel, EP=2", "PP=2, EP=2"),
    ),
    Served(
        dimension="expert tensor parallel apart from tensor parallel", flags="--expert-tensor-parallel-size",
        how="nothing of its own", layouts=("TP=2, sequence parallel, EP=2, ETP=1",),
    ),
    Served(
        dimension="pipeline parallel", flags="--pipeline-model-parallel-size",
        how="every stage reads tokens itself; a stage without a site fetches nothing",
        layouts=("PP=2", "PP=2, EP=2", "TP=2, sequence parallel, PP=2"),
    ),
    Served(
        dimension="uneven pipeline stages",
        flags="--pipeline-model-parallel-layout",
        how="Megatron says which layers a stage has", layouts=("PP=2, uneven",),
    ),
    Served(
        dimension="interleaved pipeline",
        flags="--num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank",
        how="every virtual stage has a stream of its own, which fetches what its own sites read",
        layouts=("PP=2, interleaved",),
    ),
    Served(
        dimension="context parallel", flags="--context-parallel-size",
        how="memory is found in whole sequences, and a rank gets that of the two chunks that Megatron gives it; each "
        "chunk's left context for the convolution comes from the ranks that have it",
        layouts=(
            "CP=2", "CP=2, EP=2", "dense, CP=2", "dense, TP=2, CP=2", "TP=2, sequence parallel, CP=2", "PP=2, CP=2",
        ),
    ),
    Served(
        dimension="gradient accumulation", flags="--global-batch-size", how="memory is an argument of each micro-batch",
        layouts=("single", "dense, micro-batch of 4"),
    ),
    Served(
        dimension="multi-token prediction", flags="--mtp-num-layers",
        how="prediction layers are stock ones and get no memory; the decoder's output that they read has it",
        layouts=("MTP, PP=2", "MTP, EP=2"),
    ),
    Served(
        dimension="packed sequences", flags="--dataloader-inter-document-masking",
        how="attention ends with a document, as memory does; sites read a packed micro-batch as it lies",
        layouts=("packed, DP=2", "packed, EP=2", "packed, full recompute"),
    ),
    Served(
        dimension="bf16 mixed precision", flags="--bf16", how="rows become bf16 at the site; fp32 main parameters",
        layouts=("bf16", "bf16, DP=2, distributed optimizer"),
    ),
    Served(
        dimension="full recompute", flags="--recompute-granularity full --recompute-method uniform|block",
        how="the packed memory is a saved input of the recomputed block",
        layouts=("PP=2, full recompute", "full recompute of some layers"),
    ),
    Served(
        dimension="selective recompute", flags="--recompute-granularity selective --recompute-modules",
        how="nothing of its own: a site's own activations are kept", layouts=("selective recompute",),
    ),
)  # fmt: skip

REFUSED = (
    Refused(
        dimension="tensor parallel without sequence parallel (MoE models)", flag="--tensor-model-parallel-size",
        applies=lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel and args.num_experts,
        why="Megatron's mixture of experts trains under tensor parallelism with --sequence-parallel only",
        remedy="Add --sequence-parallel.",
    ),
    Refused(
        dimension="CUDA graphs", flag="--cuda-graph-impl", applies=lambda args: args.cuda_graph_impl != "none",
        why="a captured graph would replay one micro-batch",
    ),
    Refused(
        dimension="models built without storage", flag="--init-model-with-meta-device",
        applies=lambda args: args.init_model_with_meta_device, why="sites draw their values when built",
    ),
    Refused(
        dimension="Megatron FSDP", flag="--use-megatron-fsdp", applies=lambda args: args.use_megatron_fsdp,
        why="sites are not sharded for it",
    ),
    Refused(
        dimension="torch FSDP2", flag="--use-torch-fsdp2", applies=lambda args: args.use_torch_fsdp2,
        why="sites are not sharded for it",
    ),
    Refused(
        dimension="fp16 mixed precision", flag="--fp16", applies=lambda args: args.fp16,
        why="loss scaling with sites is not tested", remedy="Use --bf16, or neither.",
    ),
    Refused(
        dimension="checkpoint formats but torch_dist", flag="--ckpt-format",
        applies=lambda args: args.ckpt_format != "torch_dist", why="only torch_dist carries the memory's identity",
    ),
    Refused(
        dimension="non-persistent checkpoints", flag="--non-persistent-ckpt-type",
        applies=lambda args: args.non_persistent_ckpt_type is not None,
        why="the memory's identity is compared with that of persistent ones only",
    ),
    Refused(
        dimension="layers of several kinds", flag="--heterogeneous-layers-config-path",
        applies=lambda args: args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json,
        why="a site is tested before an attention, which some of them may lack",
    ),
    Refused(
        dimension="experimental kinds of attention", flag="--experimental-attention-variant",
        applies=lambda args: args.experimental_attention_variant is not None, why="sites are not tested with them",
    ),
    Refused(
        dimension="the local attention backend in dense Transformer Engine layers", flag="--attention-backend",
        applies=lambda args: getattr(args.attention_backend, "name", args.attention_backend) == "local"
        and args.transformer_impl == "transformer_engine"
        and not args.num_experts,
        why="Megatron puts it into a spec that all layers share, and a layer with a site has one of its own",
        remedy="Use another backend.",
    ),
    Refused(
        dimension="weights sharded over further ranks", flag="--tensor-parallel-num-weight-shards",
        applies=lambda args: max(
            getattr(args, name, 1) for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
        ) > 1,
        why="sites are not sharded for it",
    ),
    Refused(
        dimension="layer specs of one's own", flag="--spec", applies=lambda args: args.spec is not None,
        why="sites are put into Megatron's default layer spec",
    ),
)  # fmt: skip

# Where a memory's parameters have rates of their own: hashed tables, trained rows, sites with a --graft-lr-mult.
REFUSED_WITH_OWN_RATES = (
    Refused(
        dimension="optimizers but Adam, with tables, trained rows or --graft-lr-mult", flag="--optimizer",
        applies=lambda args: args.optimizer != "adam",
        why="the memory's parameters have Adam's learning rate and decay of their own",
        remedy="Use --optimizer adam, or train without --engram-layers, --graft-rows and --graft-lr-mult.",
    ),
    Refused(
        dimension="maximal update parametrisation, with tables, trained rows or --graft-lr-mult", flag="--use-mup",
        applies=lambda args: getattr(args, "use_mup", False), why="it would set the memory's learning rates as well",
    ),
    Refused(
        dimension="optimizer offload to the CPU, with tables, trained rows or --graft-lr-mult",
        flag="--optimizer-cpu-offload", applies=lambda args: getattr(args, "optimizer_cpu_offload", False),
        why="the memory's own learning rates are not tested with it",
    ),
)  # fmt: skip

REFUSED_WITH_TRAINED_ROWS = (
    Refused(
        dimension="tensor parallel without sequence parallel, with trained rows", flag="--graft-rows",
        applies=lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
        why="without sequence parallelism a rank reads a slice of every row's columns, and trained rows are exchanged "
        "whole",
        remedy="Add --sequence-parallel, or use --graft-rows frozen.",
    ),
)  # fmt: skip

# What our data iterator or forward step cannot serve, with or without a memory.
REFUSED_DATA = (
    Refused(
        dimension="context parallel or packed sequences, local attention with dropout", flag="--attention-dropout",
        applies=lambda args: (args.context_parallel_size > 1 or args.dataloader_inter_document_masking)
        and args.transformer_impl == "local" and args.attention_dropout > 0,
        why="the local attention has neither with dropout", remedy="Set it to 0.",
    ),
    Refused(
        dimension="context parallel or packed sequences, local attention that is more than softmax under a causal mask",
        flag="--transformer-impl",
        applies=lambda args: (args.context_parallel_size > 1 or args.dataloader_inter_document_masking)
        and args.transformer_impl == "local"
        and (args.apply_query_key_layer_scaling or args.window_size is not None or args.softmax_type != "vanilla"),
        why="the local attention has neither with --apply-query-key-layer-scaling, --window-size or --softmax-type",
        remedy="Leave these out, or use Transformer Engine.",
    ),
    Refused(
        dimension="multi-token prediction with sequence or context parallel or packed sequences, local layers",
        flag="--mtp-num-layers",
        applies=lambda args: args.mtp_num_layers
        and args.transformer_impl == "local"
        and (args.sequence_parallel or args.context_parallel_size > 1 or args.dataloader_inter_document_masking),
        why="Megatron makes prediction layers of its own local layers, which refuse them",
        remedy="Leave it out, or use Transformer Engine.",
    ),
    Refused(
        dimension="hybrid context parallel", flag="--hybrid-context-parallel",
        applies=lambda args: args.hybrid_context_parallel, why="every sequence is cut over all context-parallel ranks",
    ),
    Refused(
        dimension="overlap of the experts' communication", flag="--overlap-moe-expert-parallel-comm",
        applies=lambda args: args.overlap_moe_expert_parallel_comm,
        why="Megatron then asks the forward step for a plan of the layers' parts instead of running the model, and "
        "sites are in none of them",
    ),
    Refused(
        dimension="other data loaders", flag="--dataloader-type",
        applies=lambda args: args.dataloader_type != "external",
        why="the iterator is megatron-graft's own",
    ),
    Refused(
        dimension="skipped iterations with tensor or context parallel or an interleaved pipeline",
        flag="--iterations-to-skip",
        applies=lambda args: args.iterations_to_skip
        and (
            max(args.tensor_model_parallel_size, args.context_parallel_size) > 1
            or args.virtual_pipeline_model_parallel_size
        ),
        why="Megatron then draws the batches of some ranks alone and cuts them itself, and each rank here has its own",
        remedy="Leave it out, and --result-rejected-tracker-filename, which adds to it.",
    ),
    Refused(
        dimension="fill-in-the-middle data", flag="--fim-data", applies=lambda args: args.fim_data,
        why="the memory would be that of text which the model does not read",
    ),
    Refused(
        dimension="restart within the process", flag="--inprocess-restart", applies=lambda args: args.inprocess_restart,
        why="the look-ahead is not made to be restarted", remedy="Let the launcher restart the run.",
    ),
    Refused(
        dimension="whole validation sets", flag="--full-validation", applies=lambda args: args.full_validation,
        why="use tools/evaluate.py for a whole held-out set",
    ),
    Refused(
        dimension="several validation sets", flag="--multiple-validation-sets",
        applies=lambda args: args.multiple_validation_sets, why="use tools/evaluate.py, once per set",
    ),
    Refused(
        dimension="data phases", flag="--phase-transition-iterations",
        applies=lambda args: args.phase_transition_iterations, why="data phases are not supported",
    ),
    Refused(
        dimension="packed fine-tuning data", flag="--sft", applies=lambda args: args.sft,
        why="packed fine-tuning data is not supported",
    ),
    Refused(
        dimension="packed sequences with sequence or context parallel, or in a pipeline with larger micro-batches",
        flag="--dataloader-inter-document-masking",
        applies=lambda args: args.dataloader_inter_document_masking
        and (
            args.sequence_parallel
            or args.context_parallel_size > 1
            or (args.pipeline_model_parallel_size > 1 and max(args.micro_batch_size, args.eval_micro_batch_size) > 1)
        ),
        why="a packed micro-batch is cut otherwise than its sequences are, and pipelines pass on its unpacked shape",
        remedy="Leave it out, or --sequence-parallel and --context-parallel-size; in a pipeline use --micro-batch-size "
        "1 and --eval-micro-batch-size 1.",
    ),
    Refused(
        dimension="attention within documents, local attention", flag="--reset-attention-mask",
        applies=lambda args: args.reset_attention_mask and args.transformer_impl == "local",
        why="the local attention is causal over the whole sequence",
    ),
)  # fmt: skip


ALL_REFUSED = (*REFUSED, *REFUSED_WITH_OWN_RATES, *REFUSED_WITH_TRAINED_ROWS, *REFUSED_DATA)


def check_data_flags(args: argparse.Namespace) -> None:
    """Refuse what our data iterator cannot serve. Raises ``ConfigError``."""
    for refused in REFUSED_DATA:
        refused.check(args)


def check_site_flags(args: argparse.Namespace) -> None:
    """Refuse what memory sites cannot serve; the stock model of the same flags runs. Raises ``ConfigError``."""
    trained = args.graft_rows != FROZEN
    own_rates = args.engram_layers or trained or args.graft_lr_mult != 1
    for refused in (
        *REFUSED,
        *(REFUSED_WITH_OWN_RATES if own_rates else ()),
        *(REFUSED_WITH_TRAINED_ROWS if trained else ()),
    ):
        refused.check(args)


def page() -> str:
    """``docs/parallelism.md``."""
    served = [
        f"| {row.dimension} | {_code(row.flags)} | {row.how} | {', '.join(map(_code, row.layouts))} |" for row in SERVED
    ]
    refused = [f"| {row.dimension} | `{row.flag}` | {row.why} |" for row in ALL_REFUSED]
    return _PAGE.format(served="\n".join(served), refused="\n".join(refused))


def _code(flags: str) -> str:
    return flags if flags.startswith("(") else f"`{flags}`"


_PAGE = """\
# Parallel layouts

Written from `megatron_graft/training/parallelism.py` by `python -m megatron_graft.training.parallelism`; a test holds
this page to that table, and the table to the layouts that the tests train.

Tested means, on gloo and CPU: from one checkpoint whose sites matter (every parameter of the memory random), the first
step's loss and every gradient, and then ten losses, equal those of one process (`tests/distributed/test_layouts.py`).
CUDA and NCCL are written for and have not been run.

## Served

| dimension | flags | what sites do | tested as |
| --- | --- | --- | --- |
{served}

## Refused when flags are parsed

| dimension | flag | why |
| --- | --- | --- |
{refused}
"""


if __name__ == "__main__":
    print(page(), end="")
