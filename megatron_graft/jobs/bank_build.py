"""A bank's build as the commands run it: whole, or one stage at a time."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_graft.bank.reader import open_bank
from megatron_graft.building.build import build_bank
from megatron_graft.building.build_plan import (
    PLAN_NAME,
    BankBuildConfig,
    BuildPlan,
    check_inputs_unchanged,
    keep_plan,
    make_plan,
    read_plan,
)
from megatron_graft.building.coverage import write_coverage
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.estimate import donor_speed, estimate_build
from megatron_graft.building.existing import existing_bank
from megatron_graft.building.norms import LayerNorms
from megatron_graft.building.report import coverages_of, kept_report, report_bank, write_report
from megatron_graft.building.room import check_room, check_room_of_plan, shape_of_plan
from megatron_graft.building.stages import BuildStages, ReportOn
from megatron_graft.building.tasks import BuildLog, remaining_stages, remove_obsolete, run_stage, work_lock
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.jobs.bank_data import named_prefixes, open_documents
from megatron_graft.jobs.build_flags import config_of
from megatron_graft.log import get_logger
from megatron_graft.reporting.bank_page import coverage_table, write_bank_page
from megatron_graft.reporting.cost_page import estimate_page

TRAIN = "train"
"""Name of the counted data sets in a bank's report."""


def build_whole(flags: argparse.Namespace) -> None:
    """Build the bank that flags ask for, on this machine, and print its coverage.

    Raises:
        GraftError: see :func:`~megatron_graft.building.build.build_bank`.
    """
    config = config_of(flags)
    sources = sources_of(flags)
    tokenizer = load_tokenizer(sources["tokenizer_model"])
    _open_sources(config, sources, tokenizer)  # so that a wrong path shows before the work, not after it
    build_bank(
        config,
        tokenizer=tokenizer,
        encoder=donor_of(sources),
        sources=sources,
        report_on=_reporter,
        keep_work=flags.keep_work,
    )
    _print_report(config)


def estimate_whole(flags: argparse.Namespace) -> None:
    """Print what the build that flags ask for would give and cost; refuse it if it does not fit the disk.

    Raises:
        StorageError: there is no room for it.
        GraftError: as above; nothing is written.
    """
    config = config_of(flags)
    sources = sources_of(flags)
    tokenizer, donor = load_tokenizer(sources["tokenizer_model"]), donor_of(sources)
    documents = _open_sources(config, sources, tokenizer)[TRAIN]
    plan = make_plan(config, tokenizer=tokenizer, encoder=donor, sources=sources)
    estimate = estimate_build(
        documents,
        shape_of_plan(plan),
        eod=tokenizer.eod,
        sample_tokens=flags.estimate_tokens,
        text_of=tokenizer.ngram_text,
        measure_donor=lambda texts: donor_speed(donor, texts, config.donor_layers, config.pack_tokens),
    )
    print(estimate_page(estimate.to_json()))
    rows = max(1, min(estimate.shape.rows, int(estimate.qualifying)))
    check_room(config.output, config.work, replace(estimate.shape, rows=rows))


def plan_build(flags: argparse.Namespace) -> BuildPlan | None:
    """Write the plan of the build that flags ask for, or check the one there; None if the bank is there already.

    Raises:
        GraftError: as above; nothing has been built.
    """
    config = config_of(flags)
    sources = sources_of(flags)
    tokenizer = load_tokenizer(sources["tokenizer_model"])
    _open_sources(config, sources, tokenizer)
    plan = make_plan(config, tokenizer=tokenizer, encoder=donor_of(sources), sources=sources)
    if config.output.exists():
        digest = existing_bank(config.output, plan.settings).digest
        if not (config.work / PLAN_NAME).is_file():
            get_logger().info("%s is complete (%s): nothing to do", config.output, digest[:12])
            return None
    check_room_of_plan(plan)
    with work_lock(config.work, alone=False):
        return keep_plan(plan, config.work)


def open_stages(work: Path) -> BuildStages:
    """The stages of a planned build. Tokenizer and donor are opened by the stages that need them.

    Raises:
        BankIncompleteError: nothing is planned there.
        BankError: the plan is of another version or damaged.
    """
    plan = read_plan(work)
    return BuildStages(
        plan,
        tokenizer=lambda: _same_tokenizer(plan),
        encoder=lambda: _same_donor(plan),
        report_on=_reporter(plan),
    )


def run_share(work: Path, stage_name: str, *, rank: int, world_size: int) -> None:
    """Run a worker's share of one stage: tasks ``rank``, ``rank + world_size``, ... that are not done.

    Raises:
        BankIncompleteError: nothing is planned in ``work``.
        ConfigError: there is no such stage or rank.
        GraftError: a task failed; those before it are kept.
    """
    stages = open_stages(work)
    remove_obsolete(stages.all, stages.work)
    stage = stages.named(stage_name)
    if stage not in remaining_stages(stages.all, stages.work):
        get_logger().info("%s: done already", stage.name)
        return
    check_inputs_unchanged(stages.plan)
    with work_lock(stages.work, alone=False):
        run_stage(stage, stages.work, stages.log, rank=rank, world_size=world_size)


def sources_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What a plan keeps so that other processes, wherever they start, can open the same files."""
    coverage = named_prefixes(flags.coverage, "--coverage")
    if TRAIN in coverage:
        raise ConfigError("--coverage", "takes the name of the counted data", got=TRAIN, expected="another name")
    return {
        "tokenizer_model": str(Path(flags.tokenizer_model).absolute()),
        "donor": str(flags.donor.absolute()),
        "donor_dtype": flags.donor_dtype,
        "pack_tokens": flags.pack_tokens,
        "batch_packs": flags.batch_packs,
        "threads": flags.threads,
        "coverage": {name: str(Path(prefix).absolute()) for name, prefix in coverage.items()},
    }


def donor_of(sources: Mapping[str, Any]) -> HuggingFaceDonor:
    """Open the donor."""
    return HuggingFaceDonor(
        sources["donor"],
        dtype=sources["donor_dtype"],
        pack_tokens=sources["pack_tokens"],
        batch_packs=sources["batch_packs"],
        threads=sources["threads"],
    )


def _same_tokenizer(plan: BuildPlan) -> TextTokenizer:
    tokenizer = load_tokenizer(plan.sources["tokenizer_model"])
    _require_same(plan.sources["tokenizer_model"], tokenizer.fingerprint, plan.tokenizer.fingerprint)
    return tokenizer


def _same_donor(plan: BuildPlan) -> HuggingFaceDonor:
    # The type it runs in was chosen when the build was planned; this node, with or without a GPU, must not choose anew.
    donor = donor_of({**plan.sources, "donor_dtype": plan.settings["donor_dtype"]})
    _require_same(plan.sources["donor"], donor.revision, plan.donor.revision)
    return donor


def _require_same(subject: str, found: object, expected: object) -> None:
    if found != expected:
        raise IdentityError(
            subject, "is not what it was when the build was planned", got=found, expected=expected,
            remedy="Put it back, or plan again in an empty work directory.",
        )  # fmt: skip


def _open_sources(
    config: BankBuildConfig, sources: Mapping[str, Any], tokenizer: TextTokenizer
) -> dict[str, MegatronDocuments]:
    opened = {TRAIN: open_documents(config.data_prefixes, config.split, tokenizer)}
    return opened | {name: open_documents([prefix], None, tokenizer) for name, prefix in sources["coverage"].items()}


def _reporter(plan: BuildPlan) -> ReportOn:
    """What the last stage does: measure the bank, and write report and page beside it."""

    def report_on(norms: Mapping[int, LayerNorms]) -> Mapping[str, Any]:
        config, tokenizer = plan.config, _same_tokenizer(plan)
        report = report_bank(
            config.output,
            _open_sources(config, plan.sources, tokenizer),
            log_records=BuildLog(config.log).records(),
            raw_norms=norms,
            text_of=tokenizer.ngram_text,
            threads=max(1, config.workers),
        )
        write_report(config.output, report)
        write_coverage(open_bank(config.output), coverages_of(report))
        page = _page(config)
        write_bank_page(page, report)
        return {"page": page.name}

    return report_on


def _page(config: BankBuildConfig) -> Path:
    return config.output.with_name(config.output.name + ".report")


def _print_report(config: BankBuildConfig) -> None:
    report = kept_report(config.output, open_bank(config.output).digest)
    if report is not None:
        print(coverage_table(report))
        print(f"written to {_page(config)}")
