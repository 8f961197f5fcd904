"""Load a run's newest checkpoint into one process and evaluate it; the library behind ``tools/evaluate.py``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import value_of, without_flags
from megatron_graft.compat.parameter_groups import TABLE_ATTRIBUTE
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.index import open_index
from megatron_graft.memory.site import MemorySite
from megatron_graft.training.bank_setup import check_bank_tokenizer, run_tokenizer
from megatron_graft.training.checkpoint import checkpoint_to_load
from megatron_graft.training.data_provider import build_datasets
from megatron_graft.training.evaluation import Evaluator, bigram_baseline
from megatron_graft.training.evaluation_text import EvaluationText
from megatron_graft.training.loss_summaries import Classifier
from megatron_graft.training.memory_setup import RunMemory
from megatron_graft.training.other_banks import other_memories
from megatron_graft.training.run import RUN_FILE, chunk_layouts, model_config, parse_arguments

RESULT_FILE = "evaluation.json"
# One process evaluates: its layout replaces the run's, and nothing but the weights is loaded.
_ONE_PROCESS = (
    "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--expert-model-parallel-size", "1",
    "--expert-tensor-parallel-size", "1", "--context-parallel-size", "1", "--no-load-optim", "--no-load-rng",
    "--micro-batch-size", "8", "--global-batch-size", "8",
)  # fmt: skip
# What only many processes can have, and batches of other sizes: nothing that could be appended would undo these.
_OF_MANY = (
    "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank",
    "--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers",
    "--tp-comm-overlap", "--hierarchical-context-parallel-sizes", "--num-distributed-optimizer-instances",
    "--step-batch-size-schedule", "--rampup-batch-size", "--eval-micro-batch-size", "--eval-global-batch-size",
)  # fmt: skip
# What the run began from, which need not be what it saved.
_BEGINNING = ("--load", "--ckpt-step", "--pretrained-checkpoint", "--finetune", "--graft-adopt-checkpoint")


def evaluate_run(
    run_dir: Path,
    data: dict[str, str],
    extra: list[str],
    *,
    if_finished: bool = False,
    classify_by: Path | None = None,
    other_banks: dict[str, Path] | None = None,
    memory_off: list[str] | None = None,
) -> dict[str, Any] | None:
    """Evaluate the newest checkpoint of a run.

    Args:
        run_dir: directory that a run was given as ``--graft-run-dir``.
        data: name -> ``.bin/.idx`` prefix of the texts. Of one that the run trained on by ``--split``, the validation
            share is read.
        extra: Megatron flags appended to the run's own.
        if_finished: return None instead if the run has not reached its last step.
        classify_by: bank whose matches split the losses of a run without a bank of its own, for comparison. Those of
            a run with banks are split by its first.
        other_banks: name -> banks to measure with in place of the run's, see :func:`other_memories`.
        memory_off: names of the texts that are measured also with the memory off and with the other banks; None for
            all.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        ConfigError: the directory holds no run, or the run no checkpoint; ``memory_off`` names no text; or another bank
            cannot stand in the run's place, which may also be an ``IdentityError`` or a ``BankError``.
    """
    _check_names(memory_off or [], data)
    sys.argv = ["evaluate", *_flags_of_one_process(_recorded_arguments(run_dir)), *extra]
    _single_process_environment()
    args, settings, memory = parse_arguments()
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None:
        raise ConfigError(f"--load {args.load}", "holds no checkpoint", remedy="Train the run first.")
    saved = checkpoint.arguments
    if saved is None:
        raise ConfigError(
            checkpoint.flag, "does not tell what it was trained with", expected="one of --ckpt-format torch_dist"
        )  # fmt: skip
    steps = args.train_iters or saved.train_iters  # of a run that counts samples, Megatron works them out
    if if_finished and checkpoint.iteration < steps:
        return None
    others = other_memories(other_banks or {}, memory, settings)
    initialize_megatron()
    config = model_config(args, memory)
    model = _loaded_model(config)
    tokenizer = run_tokenizer(args)
    texts = {name: EvaluationText.read(prefix, tokenizer, _split_of(prefix, args)) for name, prefix in data.items()}
    (layout,) = chunk_layouts(memory, config.transformer)
    evaluator = Evaluator(
        model, args, tokenizer,
        fetcher=memory.fetcher(layout) if memory and layout else None,
        others={name: other.fetcher(layout) for name, other in others.items()} if layout else {},
        classifier=_classifier(memory, classify_by, tokenizer),
    )  # fmt: skip
    return {
        "iteration": checkpoint.iteration,
        "train_iters": steps,
        "checkpoint": str(checkpoint.path),
        "memory": getattr(args, "graft_identity", None),
        "parameters": _parameter_counts(model),
        "data": {
            name: evaluator.evaluate(name, text, memory_off=memory_off is None or name in memory_off)
            for name, text in texts.items()
        },
        **_training_text(args, tokenizer, texts, saved.consumed_train_samples),
    }


def _recorded_arguments(run_dir: Path) -> list[str]:
    path = run_dir / RUN_FILE
    if not path.is_file():
        raise ConfigError(
            run_dir, "is not the directory of a run", expected=f"a file {RUN_FILE}",
            remedy="Give the directory that the run was given as --graft-run-dir.",
        )  # fmt: skip
    arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    return [str(argument) for argument in arguments]


def _flags_of_one_process(recorded: list[str]) -> list[str]:
    """A run's flags for the model that it saved, in one process; of a run that saved nothing, what it began from."""
    saved = value_of("--save", recorded)
    kept = without_flags((*_OF_MANY, *(_BEGINNING if saved else ())), recorded)
    return [*kept, *(["--load", saved] if saved else []), *_ONE_PROCESS]


def _check_names(memory_off: list[str], data: dict[str, str]) -> None:
    for name in memory_off:
        if name not in data:
            raise ConfigError(
                "--memory-off", "names no text of --data", got=name, expected=" or ".join(data),
                remedy="Leave it out to measure all texts with the memory off.",
            )  # fmt: skip


def _classifier(memory: RunMemory | None, bank: Path | None, tokenizer: TextTokenizer) -> Classifier | None:
    if memory is not None and memory.banks:
        return Classifier(index=memory.indexes[0], key_counts=memory.banks[0].key_counts)
    if bank is None:
        return None
    opened = open_bank(bank)
    check_bank_tokenizer(opened, tokenizer)
    return Classifier(index=open_index(opened), key_counts=opened.key_counts)


def _split_of(prefix: str, args: argparse.Namespace) -> str | None:
    trained_on = [str(Path(item).absolute()) for item in args.data_path or []]
    return args.split if str(Path(prefix).absolute()) in trained_on else None


def _single_process_environment() -> None:
    # Below a torchrun this process would wait for the launcher's store, which listens on another port.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")


def _loaded_model(config: Any) -> Any:
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_checkpoint(chunks, None, None)
    for chunk in chunks:
        chunk.eval()
    return unwrap_model(chunks)[0]


def _parameter_counts(model: Any) -> dict[str, int]:
    """Trained parameters: all, those of the memory sites, and those of them that are rows of tables."""
    sites = [module for module in model.modules() if isinstance(module, MemorySite)]
    in_sites = [parameter for site in sites for parameter in site.parameters()]
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "memory_sites": sum(parameter.numel() for parameter in in_sites),
        "tables": sum(parameter.numel() for parameter in in_sites if hasattr(parameter, TABLE_ATTRIBUTE)),
    }


def _training_text(
    args: argparse.Namespace, tokenizer: TextTokenizer, texts: dict[str, EvaluationText], samples: int
) -> dict[str, Any]:
    """How much was trained on, how often, and what a bigram model makes of the same tokens."""
    train, _, _ = build_datasets(args, (samples, 0, 0))
    available = int(train.dataset.sequence_lengths[train.indices].sum()) if hasattr(train, "dataset") else None
    seen = samples * args.seq_length
    return {
        "training_text": {
            "tokens_seen": seen,
            "tokens_available": available,
            "passes": seen / available if available else None,
        },
        "bigram_loss": bigram_baseline(train, samples, texts, tokenizer.vocab_size),
    }
