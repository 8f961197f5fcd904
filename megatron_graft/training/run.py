"""A pre-training run from outside: ``megatron.training``'s own loop with our model, data, forward step and metrics.

Nothing of Megatron may be imported before :func:`megatron_graft.compat.cpu.install`; the entry point
(:mod:`megatron_graft.training.pretrain`) sees to that.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_graft.compat.megatron import mend_help, require_megatron, use_shipped_dataset_helpers
from megatron_graft.compat.optimizer_restart import mend_optimizer_restart
from megatron_graft.compat.optional import describe_optional_packages
from megatron_graft.compat.parameter_groups import use_multipliers
from megatron_graft.compat.rebind import rebind
from megatron_graft.data.look_ahead import LookAhead
from megatron_graft.data.memory_layout import MemoryLayout
from megatron_graft.data.transfer import CudaTransfer, HostTransfer
from megatron_graft.errors import ConfigError
from megatron_graft.files import write_json_atomically
from megatron_graft.log import get_logger
from megatron_graft.models.gpt import keep_memory_from_mtp, layer_spec_factory
from megatron_graft.models.stage import stage_layout, stage_sites
from megatron_graft.training.arguments import add_graft_arguments, graft_settings
from megatron_graft.training.checkpoint import checkpoint_to_load
from megatron_graft.training.data_provider import DatasetProvider
from megatron_graft.training.forward_step import ForwardStep
from megatron_graft.training.identity import (
    ARGUMENT,
    check_checkpoint_identity,
    check_same_on_all_ranks,
    memory_identity,
)
from megatron_graft.training.memory_setup import RunMemory, open_run_memory
from megatron_graft.training.metrics import RunMetrics
from megatron_graft.training.resharding import check_resharding
from megatron_graft.training.settings import GraftSettings
from megatron_graft.training.verification import Verifier

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"


def parse_arguments() -> tuple[argparse.Namespace, GraftSettings, RunMemory | None]:
    """Read ``sys.argv``, check every flag and artefact, and open the run's memory.

    Raises:
        GraftError: whatever is wrong with them, before any process group exists.
    """
    _refuse_yaml(sys.argv)
    get_logger().info("megatron-core %s; %s", require_megatron(), describe_optional_packages())
    use_shipped_dataset_helpers()
    mend_optimizer_restart()
    args = parse_and_validate_args(
        extra_args_provider=lambda parser: add_graft_arguments(mend_help(parser)),
        args_defaults={"dataloader_type": "external"},
    )
    settings = graft_settings(args)
    use_multipliers(settings.multipliers)
    memory = open_run_memory(settings, args)
    identity = memory_identity(memory)
    checkpoint = checkpoint_to_load(args)
    check_checkpoint_identity(args, identity, checkpoint)
    check_resharding(args, checkpoint)
    setattr(args, ARGUMENT, identity)
    return args, settings, memory


def _refuse_yaml(words: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--yaml-cfg" for word in words):
        raise ConfigError(
            "--yaml-cfg", "is not supported here: Megatron then drops all flags, and the memory's with them",
            remedy="Give its settings as flags.",
        )  # fmt: skip


def model_config(args: argparse.Namespace, memory: RunMemory | None) -> Any:
    """Megatron's GPT configuration of the run, with our layer spec in it."""
    config = gpt_config_from_args(args)
    config.transformer_layer_spec = layer_spec_factory(memory.sites if memory else {})
    config.pre_wrap_hooks.append(keep_memory_from_mtp)
    return config


def chunk_layouts(memory: RunMemory | None, transformer_config: Any) -> tuple[MemoryLayout | None, ...]:
    """What a micro-batch brings to each model chunk of this rank; None where no site lies. Process groups must exist.

    A rank has one chunk, or one for each of its virtual stages.
    """
    virtual = transformer_config.virtual_pipeline_model_parallel_size
    chunks = [None] if virtual is None else range(virtual)
    sites = [stage_sites(memory.sites, transformer_config, chunk) if memory else {} for chunk in chunks]
    return tuple(stage_layout(here, transformer_config) if here else None for here in sites)


def build_look_ahead(
    args: argparse.Namespace,
    settings: GraftSettings,
    memory: RunMemory | None,
    layouts: Sequence[MemoryLayout | None],
) -> LookAhead:
    """The look-ahead of this rank: it fetches for those of its model chunks that own one of the run's sites."""
    transfer = CudaTransfer(torch.device("cuda", torch.cuda.current_device())) if _on_cuda() else HostTransfer()
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    fetchers = [memory.fetcher(layout, pin=_on_cuda()) if memory and layout else None for layout in layouts]
    return LookAhead(fetchers, transfer, settings.look_ahead_of(micro_batches))


def _on_cuda() -> bool:
    """Whether this process computes on a GPU; Megatron has set its device."""
    return torch.device(torch.cuda.current_device()).type == "cuda"


def run_pretraining() -> None:
    """Parse, check, train."""
    started = time.time()
    args, settings, memory = parse_arguments()
    if settings.run_dir is not None and args.rank == 0:
        _record_command(settings.run_dir, started, args.world_size)
    config = model_config(args, memory)
    setup = _DeferredSetup(args, settings, memory, config.transformer)
    config.post_wrap_hooks.append(setup.after_model_is_built)
    rebind(training, "training_log", _TRAINING_LOG, setup.with_metrics)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        setup.dataset_provider,
        ModelType.encoder_or_decoder,
        setup.forward_step,
    )


_TRAINING_LOG = (
    "loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale", "report_memory_flag", "skipped_iter",
    "grad_norm",
)  # fmt: skip


class _DeferredSetup:
    """What can only be made once ``pretrain()`` has created the process groups and the model, made then."""

    def __init__(
        self, args: argparse.Namespace, settings: GraftSettings, memory: RunMemory | None, transformer: Any
    ) -> None:
        self.args, self.settings, self.memory, self.transformer = args, settings, memory, transformer
        self._last_logged = -1

    @functools.cached_property
    def layouts(self) -> tuple[MemoryLayout | None, ...]:
        check_same_on_all_ranks(getattr(self.args, ARGUMENT))
        return chunk_layouts(self.memory, self.transformer)

    @functools.cached_property
    def look_ahead(self) -> LookAhead:
        return build_look_ahead(self.args, self.settings, self.memory, self.layouts)

    @functools.cached_property
    def metrics(self) -> RunMetrics:
        path = None
        if self.settings.run_dir is not None:
            self.settings.run_dir.mkdir(parents=True, exist_ok=True)
            path = self.settings.run_dir / METRICS_FILE
        layers = self.memory.layers if self.memory else ()
        max_orders = [bank.max_order for bank in self.memory.banks] if self.memory else []
        return RunMetrics(self.look_ahead, layers, max_orders, path)

    def after_model_is_built(self, model: list[Any]) -> list[Any]:
        self.metrics.attach(model)
        return model

    @functools.cached_property
    def _provider(self) -> DatasetProvider:
        return DatasetProvider(self.look_ahead, pin=_on_cuda())

    def dataset_provider(self, num_samples: Any, vp_stage: int | None = None) -> Any:
        return self._provider(num_samples, vp_stage)

    dataset_provider.is_distributed = True  # type: ignore[attr-defined]

    @functools.cached_property
    def _step(self) -> ForwardStep:
        return ForwardStep(self.look_ahead, [self._verifier(layout) for layout in self.layouts])

    def _verifier(self, layout: MemoryLayout | None) -> Verifier | None:
        if self.memory is None or layout is None or not self.settings.verify_every:
            return None
        return Verifier(self.memory.reference_fetcher(layout), self.settings.verify_every, self.args.rank)

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        return self._step(data_iterator, model)

    def with_metrics(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``training_log``, followed by our metrics for the same step."""

        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            named = dict(zip(_TRAINING_LOG, args, strict=False)) | kwargs
            if named["iteration"] != self._last_logged:
                self._last_logged = named["iteration"]
                self.metrics.after_step(
                    named["loss_dict"], named["iteration"], named["grad_norm"], named["skipped_iter"]
                )
            return result

        return training_log


def _record_command(run_dir: Path, started: float, world_size: int) -> None:
    """Keep the command line, so that evaluation can build the same model."""
    write_json_atomically(run_dir / RUN_FILE, {"arguments": sys.argv[1:], "world_size": world_size, "started": started})
