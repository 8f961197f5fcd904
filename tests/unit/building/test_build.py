from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.bf16 import float32_from_bf16
from megatron_graft.bank.manifest import Control, Processing
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.building import room
from megatron_graft.building.build import build_bank, build_control
from megatron_graft.building.build_plan import BankBuildConfig, BuildPlan, keep_plan, make_plan, read_plan
from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.packs import Packs
from megatron_graft.building.stages import BuildStages, ReportOn
from megatron_graft.building.tasks import BuildLog, run_stage, task_directory
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import BankError, ConfigError, DonorError, StorageError
from tests.helpers.banks import make_bank, random_counts
from tests.helpers.building import save_llama, write_data_set
from tests.helpers.states import rows_from_states

SHUFFLED, RANDOM = Control(kind="shuffled", seed=3), Control(kind="random", seed=3)


@pytest.fixture
def config(data_prefix: str, tmp_path: Path) -> BankBuildConfig:
    return BankBuildConfig(
        data_prefixes=(data_prefix,), split=None, orders=(2, 3, 4), num_rows=60, min_count=2,
        donor_layers=(1, 2), raw=False, control=None, row_dtype="bfloat16", output=tmp_path / "bank", workers=0,
    )  # fmt: skip


@pytest.fixture
def donor(donor_directory: Path) -> HuggingFaceDonor:
    return HuggingFaceDonor(donor_directory)


def all_rows(bank: Bank) -> np.ndarray:
    """uint16 ``[N, row_dim]``: bfloat16 bits."""
    packed = np.empty((bank.num_rows, bank.row_bytes), dtype=np.uint8)
    bank.gather(np.arange(bank.num_rows, dtype=np.int64), packed)
    return packed.view(np.uint16)


def keys_as_lists(bank: Bank) -> list[list[int]]:
    return [[token for token in ids if token >= 0] for ids in bank.key_ids.tolist()]


def files_of(bank: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in bank.iterdir() if file.name != "bank.json"}


class SilentDonor(HuggingFaceDonor):
    """A donor that must not be run."""

    def states(
        self, packs: Packs, first_pack: int, last_pack: int, layers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray]]]:
        raise DonorError("donor", "was run")


def test_every_row_is_the_donors_state_for_its_keys_text(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    build_bank(config, tokenizer=recipient, encoder=donor)
    bank = open_bank(config.output, verify="full")
    texts = [recipient.ngram_text(ids) or "" for ids in keys_as_lists(bank)]
    assert len(set(texts)) == 60 and set(bank.key_orders.tolist()) == {2, 3, 4}
    states = donor.encode(texts, [1, 2])
    processing = Processing(centred=True, normalised=True)
    expected = np.hstack([rows_from_states(states[layer], processing) for layer in (1, 2)])
    np.testing.assert_array_equal(all_rows(bank), expected)


def test_two_builds_give_the_same_bytes_whatever_the_threads(
    config: BankBuildConfig, recipient: TextTokenizer, donor_directory: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(config, output=tmp_path / "again")
    first = build_bank(config, tokenizer=recipient, encoder=HuggingFaceDonor(donor_directory, threads=1))
    second = build_bank(other, tokenizer=recipient, encoder=HuggingFaceDonor(donor_directory, threads=3))
    assert first.digest == second.digest
    assert files_of(config.output) == files_of(other.output)


def test_the_identity_says_what_was_built(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    identity = build_bank(config, tokenizer=recipient, encoder=donor).identity
    assert identity.tokenizer.fingerprint == recipient.fingerprint
    assert (identity.tokenizer.vocab_size, identity.tokenizer.eod) == (recipient.vocab_size, recipient.eod)
    assert (identity.orders, identity.num_rows, identity.row_dim) == ((2, 3, 4), 60, 64)
    assert (identity.donor.name, identity.donor.revision) == (donor.name, donor.revision)
    assert (identity.donor.layers, identity.control) == ((1, 2), None)
    assert identity.processing == Processing(centred=True, normalised=True)


def test_each_choice_makes_another_identity(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"orders": (2, 3)}, {"num_rows": 59}, {"donor_layers": (1,)}, {"donor_layers": (0, 2)}, {"raw": True},
        {"control": SHUFFLED}, {"control": Control(kind="shuffled", seed=4)}, {"control": RANDOM}, {"split": "1,1"},
        {"row_dtype": "int8"}, {"row_dtype": "int8", "control": RANDOM}, {"row_dtype": "float16"},
        {"rows_by_order": ((2, 30), (3, 20), (4, 10))}, {"count_by": "documents"}, {"num_rows": None, "min_count": 20},
    ]  # fmt: skip
    made = [dataclasses.replace(config, output=tmp_path / f"{number}", **one) for number, one in enumerate(changes)]
    digests = {build_bank(changed, tokenizer=recipient, encoder=donor).digest for changed in made}
    assert len(digests) == len(changes)


def test_validation_text_never_enters_the_bank(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    train, validation = recipient.encode("the whale was near"), recipient.encode("sky so wide")
    prefix = write_data_set(tmp_path / "data", [train, train, validation, validation])
    config = dataclasses.replace(config, data_prefixes=(prefix,), num_rows=1000, min_count=1)
    halved = dataclasses.replace(config, split="1,1,0", output=tmp_path / "halved")
    build_bank(config, tokenizer=recipient, encoder=donor)
    build_bank(halved, tokenizer=recipient, encoder=donor)
    assert tuple(validation[:2]) in open_bank(config.output).rows_of_keys()
    found = set(open_bank(halved.output).rows_of_keys())
    assert tuple(train[:2]) in found and tuple(validation[:2]) not in found


def test_a_complete_bank_with_the_same_settings_is_not_built_again(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, donor_directory: Path
) -> None:
    first = build_bank(config, tokenizer=recipient, encoder=donor)
    again = build_bank(config, tokenizer=recipient, encoder=SilentDonor(donor_directory, threads=1))
    assert again == first


@pytest.mark.parametrize(
    ("change", "difference"),
    [({"num_rows": 61}, "got num_rows 60; expected num_rows 61"), ({"orders": (2, 3)}, "orders"),
     ({"raw": True}, "raw"), ({"min_count": 3}, "min_count"), ({"donor_layers": (1,)}, "donor_layers"),
     ({"split": "9,1"}, "split"), ({"count_by": "documents"}, "count_by occurrences; expected count_by documents"),
     ({"rows_by_order": ((2, 60),)}, "num_rows 60, rows_by_order None; expected num_rows None"),
     ({"data_weights": (2.0,)}, "data_weights"), ({"pack_tokens": 64}, "pack_tokens 256; expected pack_tokens 64"),
     ({"control": RANDOM}, "control None, seed None; expected control random, seed 3")],
)  # fmt: skip
def test_a_bank_with_other_settings_is_refused_by_naming_them(
    config: BankBuildConfig,
    recipient: TextTokenizer,
    donor: HuggingFaceDonor,
    change: dict[str, Any],
    difference: str,
) -> None:
    build_bank(config, tokenizer=recipient, encoder=donor)
    with pytest.raises(BankError, match=f"other settings.*{difference}"):
        build_bank(dataclasses.replace(config, **change), tokenizer=recipient, encoder=donor)


def test_a_bank_of_another_donor_or_other_data_is_refused(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    build_bank(config, tokenizer=recipient, encoder=donor)
    other = HuggingFaceDonor(save_llama(tmp_path / "other", seed=6))
    with pytest.raises(BankError, match="got donor [0-9a-f]+; expected donor"):
        build_bank(config, tokenizer=recipient, encoder=other)
    prefix = write_data_set(tmp_path / "data", [recipient.encode("the whale was near")])
    with pytest.raises(BankError, match="got data "):
        build_bank(dataclasses.replace(config, data_prefixes=(prefix,)), tokenizer=recipient, encoder=donor)


def test_a_build_that_fails_leaves_no_bank_and_goes_on_where_it_failed(
    config: BankBuildConfig, recipient: TextTokenizer, donor_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DonorError, match="was run"):
        build_bank(config, tokenizer=recipient, encoder=SilentDonor(donor_directory))
    assert not config.output.exists() and (config.work / "pack" / "00000").is_dir()
    donor = HuggingFaceDonor(donor_directory)

    def full_disk(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("megatron_graft.files.os.rename", full_disk)
        with pytest.raises(StorageError, match="No space left"):
            build_bank(config, tokenizer=recipient, encoder=donor)
    assert not config.output.exists() and not list((config.work / "encode").glob("[0-9]*"))
    build_bank(config, tokenizer=recipient, encoder=donor)
    stages = [record["stage"] for record in BuildLog(config.log).records() if record["event"] == "task"]
    assert len(stages) == len(set(stages)), "a finished stage was run again"
    assert not config.work.exists()


def test_a_build_killed_in_its_report_goes_on_with_it(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report_on(_plan: BuildPlan) -> ReportOn:
        def report(_norms: object) -> dict[str, Any]:
            reports.append(1)
            if len(reports) == 1:
                raise StorageError("report", "cannot be written")
            return {}

        return report

    reports: list[int] = []
    with pytest.raises(StorageError):
        build_bank(config, tokenizer=recipient, encoder=donor, report_on=report_on)
    assert config.output.exists()
    monkeypatch.setattr(room, "check_room", lambda *_, **__: pytest.fail("asked for room that it needs no more"))
    build_bank(config, tokenizer=recipient, encoder=donor, report_on=report_on)
    assert len(reports) == 2 and not config.work.exists()


def test_a_work_directory_with_something_else_in_it_is_not_touched(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    config.work.mkdir()
    (config.work / "thesis.txt").write_text("mine")
    with pytest.raises(BankError, match="is not empty and holds no plan of a build .got thesis.txt"):
        build_bank(config, tokenizer=recipient, encoder=donor)
    (config.work / "thesis.txt").rename(config.work / ".plan.json.partial-killed")  # what a kill may leave
    keep_plan(make_plan(config, tokenizer=recipient, encoder=donor), config.work)
    (config.work / "thesis.txt").write_text("mine")
    build_bank(config, tokenizer=recipient, encoder=donor)
    assert [path.name for path in config.work.iterdir()] == ["thesis.txt"]


def test_output_and_work_directory_may_not_lie_one_within_the_other(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    for work in (config.output, config.output.parent, config.output / "work"):
        with pytest.raises(ConfigError, match="--work-dir.*one within the other"):
            build_bank(dataclasses.replace(config, work_dir=work), tokenizer=recipient, encoder=donor)


def test_a_resumed_build_takes_this_starts_memory_and_keeps_how_the_work_was_cut(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    first = keep_plan(make_plan(config, tokenizer=recipient, encoder=donor), config.work)
    other = dataclasses.replace(config, memory_gb=1.5, encode_tasks=7, workers=2, count_slices=3)
    second = keep_plan(make_plan(other, tokenizer=recipient, encoder=donor), config.work)
    assert second.counts.memory_bytes == (3 << 29) // 2 and second.config.workers == 2
    assert (second.encode_tasks, second.counts.slices) == (first.encode_tasks, first.counts.slices)
    config.work.rename(tmp_path / "moved")
    assert read_plan(tmp_path / "moved").config.work == tmp_path / "moved"
    elsewhere = dataclasses.replace(config, output=tmp_path / "elsewhere", work_dir=tmp_path / "moved")
    with pytest.raises(BankError, match="other settings .got output .*bank; expected output .*elsewhere"):
        build_bank(elsewhere, tokenizer=recipient, encoder=donor)


def test_one_row_cannot_be_centred(config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor) -> None:
    one = dataclasses.replace(config, num_rows=1)
    with pytest.raises(ConfigError, match="--num-rows: leaves one row"):
        build_bank(one, tokenizer=recipient, encoder=donor)
    raw = dataclasses.replace(one, raw=True, output=config.output.with_name("raw"))
    assert build_bank(raw, tokenizer=recipient, encoder=donor).identity.num_rows == 1


def test_more_tasks_than_files_may_be_open_are_no_hindrance(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    many = dataclasses.replace(config, encode_tasks=40, count_slices=40, count_partitions=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        digest = build_bank(many, tokenizer=recipient, encoder=donor).digest
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    again = dataclasses.replace(config, output=config.output.with_name("few"))
    assert digest == build_bank(again, tokenizer=recipient, encoder=donor).digest


def test_a_bank_whose_task_was_killed_after_it_was_written_is_taken_as_it_is(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    plan = keep_plan(make_plan(config, tokenizer=recipient, encoder=donor), config.work)
    stages = BuildStages(plan, tokenizer=lambda: recipient, encoder=lambda: donor)
    for stage in stages.all[:-2]:
        run_stage(stage, stages.work, stages.log)
    assemble = stages.named("assemble")
    (config.work / "twice").mkdir()
    first = dict(assemble.run(0, config.work / "twice"))
    before = files_of(config.output)
    run_stage(assemble, stages.work, stages.log)
    assert files_of(config.output) == before
    facts = json.loads((task_directory(config.work, "assemble", 0) / "facts.json").read_text())
    assert facts["digest"] == first["digest"] == open_bank(config.output).digest
    assert set(facts["state_norms"]) == {"1", "2"}


def test_the_manifest_keeps_the_statistics_and_nothing_of_when_and_where(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor
) -> None:
    provenance = build_bank(config, tokenizer=recipient, encoder=donor).provenance
    assert set(provenance) == {"settings", "corpus", "selection", "donor", "statistics", "megatron_graft"}
    assert len(provenance["statistics"]["2"]["mean"]) == 32
    assert provenance["selection"]["skipped"].keys() == {"special", "no_text", "blank"}
    assert str(config.output.parent) not in json.dumps(provenance)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"orders": (2, 9)}, ConfigError), ({"min_count": 0}, ConfigError), ({"num_rows": 0}, ConfigError),
     ({"row_dtype": "float32"}, ConfigError), ({"encode_tasks": 0}, ConfigError), ({"workers": -1}, ConfigError),
     ({"memory_gb": 0.001}, ConfigError), ({"memory_gb": float("nan")}, ConfigError),
     ({"rows_by_order": ((7, 3),)}, ConfigError),
     ({"donor_layers": (3,)}, DonorError), ({"min_count": 10**6}, BankError)],
)  # fmt: skip
def test_an_unusable_configuration_is_refused_before_the_donor_runs(
    config: BankBuildConfig,
    recipient: TextTokenizer,
    donor_directory: Path,
    change: dict[str, Any],
    error: type[Exception],
) -> None:
    with pytest.raises(error, match="^(?!donor: was run)"):
        build_bank(dataclasses.replace(config, **change), tokenizer=recipient, encoder=SilentDonor(donor_directory))


def test_int8_rows_are_the_rows_within_half_a_scale(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    build_bank(config, tokenizer=recipient, encoder=donor)
    small = dataclasses.replace(config, row_dtype="int8", output=tmp_path / "small")
    assert build_bank(small, tokenizer=recipient, encoder=donor).identity.row_dtype == "int8"
    whole, quantised = (open_bank(output, verify="full") for output in (config.output, small.output))
    every = np.arange(60)
    values, found = whole.float_rows(every), quantised.float_rows(every)
    for layer, width in ((0, 32), (1, 32)):
        columns = slice(layer * width, (layer + 1) * width)
        largest = np.abs(values[:, columns]).max(axis=1, keepdims=True)
        assert (np.abs(found[:, columns] - values[:, columns]) <= largest / 253).all()
    assert (quantised.row_bytes, whole.row_bytes) == (64 + 8, 128)


def test_controls_of_an_int8_bank(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, row_dtype="int8")
    build_bank(config, tokenizer=recipient, encoder=donor)
    made = build_control(config.output, SHUFFLED, tmp_path / "made")
    scratch = dataclasses.replace(config, control=SHUFFLED, output=tmp_path / "scratch")
    assert made.digest == build_bank(scratch, tokenizer=recipient, encoder=donor).digest
    with pytest.raises(ConfigError, match="--control random: cannot be made from stored rows"):
        build_control(config.output, RANDOM, tmp_path / "random")
    assert not (tmp_path / "random").exists()


def test_a_control_of_a_sharded_bank_is_that_of_the_same_rows_in_one_file(tmp_path: Path) -> None:
    counts = random_counts(20, seed=1)
    for name, shard_rows in (("one", None), ("many", 6)):
        make_bank(tmp_path / name, counts, layers=(12, 3), row_dtype="int8", shard_rows=shard_rows)
        build_control(tmp_path / name, SHUFFLED, tmp_path / f"{name}-shuffled")
    assert files_of(tmp_path / "one-shuffled") == files_of(tmp_path / "many-shuffled")


def test_a_bank_of_an_older_format_in_the_way_is_not_touched(
    config: BankBuildConfig, recipient: TextTokenizer, donor_directory: Path
) -> None:
    config.output.mkdir()
    manifest = config.output / "bank.json"
    manifest.write_text('{"format": "megatron-graft-bank", "version": 1}')
    with pytest.raises(BankError, match="bank of another format version. Remove it or choose another --output"):
        build_bank(config, tokenizer=recipient, encoder=SilentDonor(donor_directory))
    assert manifest.read_text().endswith("1}")


@pytest.mark.parametrize("control", [SHUFFLED, RANDOM])
def test_a_control_made_from_a_bank_equals_one_built_from_scratch(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path, control: Control
) -> None:
    real = build_bank(config, tokenizer=recipient, encoder=donor)
    made = build_control(config.output, control, tmp_path / "made")
    scratch = dataclasses.replace(config, control=control, output=tmp_path / "scratch")
    assert made.digest == build_bank(scratch, tokenizer=recipient, encoder=donor).digest != real.digest
    assert made.identity.control == control
    first, second = open_bank(config.output), open_bank(tmp_path / "made", verify="full")
    assert first.rows_of_keys() == second.rows_of_keys()
    same = (all_rows(first) == all_rows(second)).all(axis=1)
    assert not same.any()
    if control is SHUFFLED:
        assert sorted(map(bytes, all_rows(first))) == sorted(map(bytes, all_rows(second)))
    else:
        norms = [np.linalg.norm(float32_from_bf16(all_rows(bank)), axis=1) for bank in (first, second)]
        np.testing.assert_allclose(norms[1], norms[0], rtol=5e-3)


def test_a_control_is_skipped_when_complete_and_refused_with_another_seed(
    config: BankBuildConfig, recipient: TextTokenizer, donor: HuggingFaceDonor, tmp_path: Path
) -> None:
    build_bank(config, tokenizer=recipient, encoder=donor)
    first = build_control(config.output, SHUFFLED, tmp_path / "control")
    assert build_control(config.output, SHUFFLED, tmp_path / "control") == first
    with pytest.raises(BankError, match="got seed 3; expected seed 4"):
        build_control(config.output, Control(kind="shuffled", seed=4), tmp_path / "control")
    with pytest.raises(BankError, match="itself a control"):
        build_control(tmp_path / "control", RANDOM, tmp_path / "second")
