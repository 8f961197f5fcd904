"""A whole build on this machine: plan -> count -> select -> pack -> encode -> assemble -> report."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import megatron_graft
from megatron_graft.bank.manifest import Control, Manifest
from megatron_graft.bank.quantise import StoredRows
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.building.build_plan import (
    PLAN_NAME,
    BankBuildConfig,
    BuildPlan,
    check_inputs_unchanged,
    keep_plan,
    make_plan,
)
from megatron_graft.building.controls import control_rows
from megatron_graft.building.encode import Encoder
from megatron_graft.building.existing import existing_bank
from megatron_graft.building.pool import CountingPool
from megatron_graft.building.room import check_room_of_plan
from megatron_graft.building.select import NgramTokenizer
from megatron_graft.building.stages import BuildStages, ReportOn
from megatron_graft.building.tasks import (
    LOCK_NAME,
    BuildLog,
    Stage,
    remaining_stages,
    remove_obsolete,
    run_stage,
    work_lock,
)
from megatron_graft.errors import BankError
from megatron_graft.files import scratch_prefix
from megatron_graft.log import format_seconds, get_logger
from megatron_graft.processes import available_processors


def build_bank(
    config: BankBuildConfig,
    *,
    tokenizer: NgramTokenizer,
    encoder: Encoder,
    sources: Mapping[str, Any] | None = None,
    report_on: Callable[[BuildPlan], ReportOn] | None = None,
    keep_work: bool = False,
) -> Manifest:
    """Build a bank, go on with a build that was interrupted, or return the manifest of the bank that is there already.

    Args:
        config: what to build.
        tokenizer: the recipient's. That it made the data sets is for the caller to check; ids outside its
            vocabulary are refused here.
        encoder: the donor.
        sources: kept in the plan for commands that run single stages.
        report_on: makes the last stage's function from the plan.
        keep_work: leave the work directory where it is.

    Raises:
        ConfigError: the configuration is unusable.
        BankError: the output or the work directory holds something else, another process builds there, or no n-gram
            qualifies.
        DataError: a data set cannot be read, or changed under a half-done build.
        DonorError: the donor lacks a layer or cannot read a text.
        PlatformError: a worker process died.
        StorageError: the build does not fit the disk, or something could not be written. What is done is kept, and the
            bank is whole or absent.
    """
    plan = make_plan(config, tokenizer=tokenizer, encoder=encoder, sources=sources)
    if config.output.exists():
        manifest = existing_bank(config.output, plan.settings).manifest
        if not (config.work / PLAN_NAME).is_file():
            get_logger().info("%s is complete (%s): nothing to do", config.output, manifest.digest[:12])
            return manifest
    check_room_of_plan(plan)
    with work_lock(config.work, alone=True):
        plan = keep_plan(plan, config.work)
        stages = BuildStages(
            plan,
            tokenizer=lambda: tokenizer,
            encoder=lambda: encoder,
            report_on=report_on(plan) if report_on else None,
        )
        run_locally(stages, workers=config.workers)
        manifest = open_bank(config.output).manifest
        if not keep_work:
            _remove_work(stages)
    return manifest


def run_locally(stages: BuildStages, *, workers: int) -> None:
    """Run what is left of a build, a stage at a time.

    Raises:
        GraftError: whatever a stage finds wrong.
        PlatformError: a worker process died.
    """
    remove_obsolete(stages.all, stages.work)
    left = remaining_stages(stages.all, stages.work)
    if len(left) < len(stages.all):
        get_logger().info("%s: going on with %s", stages.work, left[0].name if left else "nothing")
    check_inputs_unchanged(stages.plan)
    with contextlib.ExitStack() as stack:
        pool: CountingPool | None = None
        for stage in left:
            started = time.monotonic()
            if stage.in_pool and workers:
                pool = pool or stack.enter_context(CountingPool(stages.plan.counts, stages.work, stages.log, workers))
                pool.run(stage)
            else:
                run_stage(stage, stages.work, stages.log)
            _note(stage, stages.log, time.monotonic() - started)


def _remove_work(stages: BuildStages) -> None:
    """Remove what this build made; the directory goes with it unless somebody else put something there.

    The plan first: a directory with a plan and without its stages is a build that has to begin again.
    """
    (stages.work / PLAN_NAME).unlink(missing_ok=True)
    for stage in stages.all:
        shutil.rmtree(stages.work / stage.name, ignore_errors=True)
    for left in stages.work.glob(f"{scratch_prefix(Path(PLAN_NAME))}*"):
        left.unlink(missing_ok=True)
    (stages.work / LOCK_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        stages.work.rmdir()


def _note(stage: Stage, log: BuildLog, seconds: float) -> None:
    log.stage(stage.name, stage.num_tasks, seconds)
    get_logger().info("%s: done in %s", stage.name, format_seconds(seconds))


def build_control(source: Path, control: Control, output: Path) -> Manifest:
    """Make a control bank from a bank on disk, without its donor.

    Args:
        source: a real bank.
        control: kind and seed.
        output: the directory to create.

    Raises:
        BankError: ``source`` is no usable bank or is itself a control, or ``output`` holds something else.
        ConfigError: that control cannot be made from these rows.
        StorageError: the bank could not be written; nothing is left behind.
    """
    bank = open_bank(source, verify="full")
    identity = bank.manifest.identity
    if identity.control is not None:
        raise BankError(
            "--from-bank", "is itself a control bank", got=identity.control.kind, remedy="Give the real bank."
        )
    settings = {"from_bank": bank.digest, "control": control.kind, "seed": control.seed}
    if output.exists():
        manifest = existing_bank(output, settings).manifest
        get_logger().info("%s is complete (%s): nothing to do", output, manifest.digest[:12])
        return manifest
    started = time.monotonic()
    rows = control_rows(_rows_of(bank), control)
    manifest = write_bank(
        output,
        keys=bank.keys,
        layers=rows.layers,
        scales=rows.scales,
        row_dtype=rows.row_dtype,
        threads=available_processors(),
        tokenizer=identity.tokenizer,
        donor=identity.donor,
        processing=identity.processing,
        control=control,
        provenance={"settings": settings, "megatron_graft": megatron_graft.__version__},
    )
    announce(output, manifest, time.monotonic() - started)
    return manifest


def _rows_of(bank: Bank) -> StoredRows:
    """All rows of a bank, without a copy where a layer is one file."""
    layers, scales = {}, {}
    for layer, rows in bank.rows_by_layer.items():
        layers[layer] = _joined(rows.shards)
        if rows.scales:
            scales[layer] = _joined(rows.scales)
    return StoredRows(row_dtype=bank.manifest.identity.row_dtype, layers=layers, scales=scales)


def _joined(shards: Sequence[np.ndarray]) -> np.ndarray:
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def announce(output: Path, manifest: Manifest, seconds: float) -> None:
    """Say what was built and how long it took."""
    identity = manifest.identity
    get_logger().info(
        "%s: %s rows x %s %s, digest %s, in %s",
        output, f"{identity.num_rows:,}", identity.row_dim, identity.row_dtype, manifest.digest[:12],
        format_seconds(seconds),
    )  # fmt: skip
