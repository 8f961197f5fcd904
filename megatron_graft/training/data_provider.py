"""Megatron's data sets behind our look-ahead: every rank of every pipeline stage reads its own micro-batches.

The sampler is Megatron's own and a pure function of the consumed-sample counter, so ranks that share a data-parallel
rank read the same tokens without a word between them, and a restart goes on exactly where the counter says.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_graft.data.look_ahead import LookAhead, MicroBatchStream
from megatron_graft.errors import ConfigError


class DatasetProvider:
    """What ``pretrain()`` calls for its data; hands out look-ahead streams instead of data sets.

    Attributes:
        is_distributed: tells Megatron to call it on every rank.
        pin: whether batches lie in page-locked memory, which a GPU reads while the host goes on.
    """

    is_distributed = True

    def __init__(self, look_ahead: LookAhead, *, pin: bool = False) -> None:
        self.look_ahead, self.pin = look_ahead, pin

    def __call__(
        self, num_samples: Sequence[int], vp_stage: int | None = None
    ) -> tuple[MicroBatchStream | None, MicroBatchStream | None, MicroBatchStream | None]:
        """Streams for training, validation and test, from the consumed-sample counters on.

        In an interleaved pipeline Megatron calls it for each virtual stage; every one reads the same tokens.
        """
        args = get_args()
        train, valid, test = build_datasets(args, num_samples)
        chunk = vp_stage or 0
        if args.skip_train:  # Megatron's data sets then hold one evaluation
            train, seen = None, 0
        else:
            seen = args.consumed_valid_samples
        return (
            self._stream(train, args.consumed_train_samples, args.micro_batch_size, chunk, counted=True),
            self._stream(valid, seen, args.eval_micro_batch_size, chunk, counted=False),
            self._stream(test, 0, args.eval_micro_batch_size, chunk, counted=False),
        )

    def _stream(
        self, dataset: Any, consumed: int, micro_batch_size: int, chunk: int, *, counted: bool
    ) -> MicroBatchStream | None:
        if dataset is None:
            return None
        workers = get_args().num_workers
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=_sampler(len(dataset), consumed, micro_batch_size),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_process_group if workers else None,
            pin_memory=self.pin,  # without workers, by the look-ahead's thread
            generator=torch.Generator(),  # the workers' seed is drawn from it, and not from what dropout draws from
        )
        return self.look_ahead.stream(loader, chunk=chunk, counted=counted)


def _leave_process_group(_worker: int) -> None:
    """A launcher signals the group: the trainer then saves a checkpoint, for which its loaders have to live on."""
    os.setpgid(0, 0)


def build_datasets(args: argparse.Namespace, num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
    """Megatron's (train, valid, test) ``GPTDataset``s for the run's data flags; None where a split has no data."""
    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config(args)
    train, valid, test = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()
    return train, valid, test


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's data set configuration from its own flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        sequences_per_dataset=_sequences_per_dataset(args.per_dataset_sequences_path),
        object_storage_cache_path=args.object_storage_cache_path,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        inter_document_masking=args.dataloader_inter_document_masking,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )


def _sequences_per_dataset(path: str | None) -> dict[str, int] | None:
    if path is None:
        return None
    try:
        found: dict[str, int] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("--per-dataset-sequences-path", f"cannot be read: {error}", got=path) from error
    return found


def _sampler(total: int, consumed: int, micro_batch_size: int) -> MegatronPretrainingSampler:
    return MegatronPretrainingSampler(
        total_samples=total,
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
