from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.bank.index_file import read_index_header
from megatron_graft.bank.manifest import KEYS_NAME
from megatron_graft.building.bank_size import bank_bytes
from megatron_graft.building.cost import (
    BuildShape,
    Fleet,
    OrderShape,
    Rates,
    bank_size,
    build_cost,
    combined,
    kept_ngrams,
    peak_work_bytes,
    records,
)
from megatron_graft.building.cost_check import compare_with_log, shape_of_log
from megatron_graft.building.log_summary import summarise_stages
from megatron_graft.building.room import cautious, check_room
from megatron_graft.errors import ConfigError, DataError, StorageError
from megatron_graft.reporting.cost_page import check_table, shown_bytes
from tests.helpers.banks import make_bank, random_counts
from tools import plan

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = REPOSITORY / "docs" / "building-cost.md"
ORDERS = {
    2: OrderShape(candidates=1.0, distinct=0.1, growth=0.5, kept_scale=10, rarity=1),
    3: OrderShape(candidates=0.5, distinct=0.4, growth=1.0, kept_scale=0.01, rarity=1),
}
SHAPE = BuildShape(
    tokens=180e6, rows=1000, hidden_size=8, layers=2, orders=(2, 3, 4), by_order=ORDERS, slice_tokens=180e6,
    chunk_ngrams=45e6, vocab_size=5000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("num_keys", "vocab_size", "max_order", "layers", "row_dtype"),
    [
        (50, 50, 4, (3,), "bfloat16"),
        (3000, 3000, 4, (3, 7), "int8"),
        (9000, 49_152, 3, (1,), "float32"),
        (40, 50, 1, (1,), "float16"),
    ],
)
def test_sizes_of_a_bank_are_those_of_its_files(
    tmp_path: Path, num_keys: int, vocab_size: int, max_order: int, layers: tuple[int, ...], row_dtype: str
) -> None:
    counts = random_counts(num_keys, 1, vocab_size=vocab_size, max_order=max_order)
    bank = make_bank(tmp_path / "bank", counts, vocab_size=vocab_size, layers=layers, row_dtype=row_dtype)
    header = read_index_header(bank.index_path)
    entries = {level["order"]: level["entries"] for level in header["levels"]}
    if header["min_order"] == 1:
        entries[1] = header["unigrams"]
    size = bank_bytes(
        num_rows=bank.num_rows, entries=entries, nodes=bank.num_rows + header["phantoms"], vocab_size=vocab_size,
        widths=bank.layer_widths, row_dtype=row_dtype,
    )  # fmt: skip
    assert size.keys == (bank.path / KEYS_NAME).stat().st_size
    assert size.index == bank.index_path.stat().st_size
    assert size.rows == sum(file.stat().st_size for file in bank.path.glob("rows-*"))
    assert size.total == size.keys + size.index + size.rows


def test_an_index_has_about_13_bytes_an_entry() -> None:
    shape = replace(SHAPE, rows=100_000_000, vocab_size=1 << 17)
    assert bank_size(shape).index / shape.rows == pytest.approx(12.8, abs=0.01)


def test_records_are_candidates_combined_in_chunks() -> None:
    assert combined(SHAPE, 2) == pytest.approx(0.1)  # the chunk that was measured
    assert combined(replace(SHAPE, chunk_ngrams=45e6 / 4), 2) == pytest.approx(0.2)
    assert combined(replace(SHAPE, chunk_ngrams=45), 2) == 1
    assert combined(replace(SHAPE, slice_tokens=45e6 / 4), 2) == pytest.approx(0.2)
    assert combined(replace(SHAPE, chunk_ngrams=1), 3) == pytest.approx(0.4)  # does not grow denser
    assert records(SHAPE, 2) == pytest.approx(18e6)
    assert records(SHAPE, 3) == records(SHAPE, 4) == pytest.approx(180e6 * 0.5 * 0.4)


def test_kept_ngrams_follow_their_law_up_to_what_there_can_be() -> None:
    assert kept_ngrams(SHAPE) == pytest.approx({2: 10 * 180e6**0.5 / 2, 3: 0.9e6, 4: 0.9e6})
    assert kept_ngrams(replace(SHAPE, min_count=20))[3] == pytest.approx(0.09e6)
    many = replace(SHAPE, by_order={2: replace(ORDERS[2], kept_scale=1e9)})
    assert kept_ngrams(many)[2] == 90e6


def test_bytes_and_seconds_of_every_stage() -> None:
    rates = Rates(count_tokens=4e6, reduce_share=0.25, donor_tokens=100.0, spill_bytes=1e12)
    cost = build_cost(SHAPE, rates, Fleet(nodes=2, cores=4))
    stages = {stage.name: stage for stage in cost.stages}
    kept = kept_ngrams(SHAPE)
    counting = [f"count-{order}-{part}" for order in (2, 3, 4) for part in ("map", "reduce")]
    assert list(stages) == [*counting, "select", "pack", "encode", "assemble", "report"]
    written = {name: stages[name].bytes_written for name in counting}
    nodes = 4 * 180e6
    assert written["count-2-map"] == pytest.approx(8 * 18e6)
    assert written["count-3-map"] == pytest.approx(8 * 36e6 + nodes)
    assert written["count-4-map"] == pytest.approx(8 * 36e6)  # the nodes of the last order are not kept
    assert [written[f"count-{order}-reduce"] for order in (2, 3, 4)] == pytest.approx([16 * kept[n] for n in (2, 3, 4)])
    assert stages["count-4-map"].bytes_read == pytest.approx(2 * 180e6 + nodes + 2 * 16 * kept[3])
    assert stages["count-3-reduce"].bytes_read == pytest.approx(8 * 36e6)
    assert sum(stages[name].core_seconds for name in counting) == pytest.approx(180 / 4 * 3 / 4)
    assert stages["count-2-map"].wall_seconds == pytest.approx(180 / 4 / 4 * 0.75 / 8)
    assert stages["encode"].bytes_written == 4 * 1000 * 2 * 8
    assert stages["encode"].core_seconds == pytest.approx(11.5)
    assert stages["encode"].wall_seconds == pytest.approx(11.5 / 8)
    assert cost.donor_tokens == 1150 and cost.device_seconds == 0
    assert cost.peak_work_bytes == pytest.approx(sum(written.values()) + stages["select"].bytes_written)
    assert cost.wall_seconds == pytest.approx(sum(stage.wall_seconds for stage in cost.stages))


def test_a_slow_disk_sets_the_wall_time() -> None:
    slow = build_cost(SHAPE, Rates(spill_bytes=1e6, donor_tokens=1e9), Fleet(cores=1000)).stages[0]
    assert slow.wall_seconds == pytest.approx((slow.bytes_written + slow.bytes_read) / 1e6)


def test_a_donor_on_devices_costs_two_flops_a_parameter_and_token() -> None:
    rates = Rates(donor_flops=1e12, mfu=0.5)
    cost = build_cost(SHAPE, rates, Fleet(nodes=2, cores=4, devices=8), donor_params=1e9)
    encode = next(stage for stage in cost.stages if stage.name == "encode")
    assert encode.device_seconds == pytest.approx(2 * 1e9 * 1150 / 0.5e12) and encode.core_seconds == 0
    with pytest.raises(ConfigError, match="--donor-params"):
        build_cost(SHAPE, rates, Fleet())


def test_states_outweigh_counts_where_rows_are_many() -> None:
    shape = replace(SHAPE, rows=10**8)
    assert peak_work_bytes(shape) == peak_work_bytes(shape, counting=False) > 6 * 10**8 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 1e13, "by_order": {2: replace(ORDERS[2], kept_scale=1e5, growth=0.9)}}, "node ids of 32 bits"),
        ({"rows": 10**9}, "n-grams qualify"),
    ],
)
def test_what_will_not_work_is_said(change: dict[str, Any], words: str) -> None:
    assert not build_cost(SHAPE, Rates(donor_tokens=1), Fleet()).warnings
    warnings = build_cost(replace(SHAPE, **change), Rates(donor_tokens=1), Fleet()).warnings
    assert words in warnings[0] and "--min-count" in warnings[-1]


@pytest.mark.parametrize("change", [{"tokens": 0}, {"rows": -1}, {"min_count": 0}, {"row_dtype": "int3"}])
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SHAPE, **change)


def test_a_build_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    output, work = tmp_path / "bank", tmp_path / "deep" / "work"
    check_room(output, work, SHAPE)
    many_tokens = replace(SHAPE, tokens=1e15)
    with pytest.raises(StorageError, match=r"has no room for this build .*bytes free; expected about .*--work-dir"):
        check_room(output, work, many_tokens)
    with pytest.raises(StorageError, match="has no room"):
        check_room(output, work, replace(SHAPE, rows=10**13))
    assert not output.exists() and not work.exists()


def test_what_a_resumed_build_has_on_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    output, work = tmp_path / "bank", tmp_path / "work"
    shape = replace(SHAPE, tokens=2e12)
    with pytest.raises(StorageError):
        check_room(output, work, shape)
    work.mkdir()
    with (work / "runs").open("wb") as stream:
        stream.truncate(int(peak_work_bytes(shape)))  # takes no room: a hole
    check_room(output, work, shape)


def test_caution_asks_for_more_room() -> None:
    assert 1.2 < peak_work_bytes(cautious(SHAPE)) / peak_work_bytes(SHAPE) <= 1.5


def log_of(cost: Any, shape: BuildShape, bytes_factor: float, seconds_factor: float) -> list[dict[str, Any]]:
    """The log of a build for which the formulas hold but for two factors."""
    records = []
    for stage in cost.stages:
        facts = {"bytes_written": stage.bytes_written * bytes_factor} if stage.name.startswith("count") else {}
        if stage.name == "count-2-map":
            facts["tokens"] = shape.tokens
        if stage.name == "pack":
            facts |= {"rows": shape.rows, "donor_tokens": 2 * cost.donor_tokens}
        cpu_seconds = stage.core_seconds * seconds_factor
        records.append({"event": "task", "stage": stage.name, "task": 0, "cpu_seconds": cpu_seconds, "facts": facts})
    return records


def test_the_formulas_are_compared_with_a_log() -> None:
    rates = Rates(donor_tokens=50.0)
    log = log_of(build_cost(SHAPE, rates, Fleet()), SHAPE, bytes_factor=2.0, seconds_factor=0.5)
    asked = replace(SHAPE, tokens=1, rows=1, orders=(2, 3))
    figures = {figure.name: figure for figure in compare_with_log(summarise_stages(log), asked, rates)}
    assert figures["donor tokens a row"].ratio == pytest.approx(0.5)
    assert figures["counting: bytes written"].ratio == figures["count-3-map: bytes written"].ratio == pytest.approx(0.5)
    for name in ("counting", "count-4-reduce", "encode", "assemble"):
        assert figures[f"{name}: core-seconds"].ratio == pytest.approx(2.0)
    assert "| counting: core-seconds |" in check_table(figure.to_json() for figure in figures.values())


def test_a_log_of_half_a_build_cannot_be_compared() -> None:
    log = log_of(build_cost(SHAPE, Rates(donor_tokens=1), Fleet()), SHAPE, 1, 1)
    with pytest.raises(DataError, match=r"--check: is no log of a whole build \(got no stage pack\)"):
        shape_of_log(summarise_stages(record for record in log if record["stage"] != "pack"), SHAPE)


def test_the_command_compares_a_log_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bank.build.jsonl"
    log = log_of(build_cost(SHAPE, Rates(donor_tokens=1), Fleet()), SHAPE, 1, 1)
    path.write_text("".join(json.dumps(record) + "\n" for record in log))
    assert plan.main(["build", "--check", str(path)]) == 0
    assert "| donor tokens a row | 1.15 | 2.3 | 0.50 |" in capsys.readouterr().out


def update(page: Path) -> subprocess.CompletedProcess[str]:
    """Run the command that the committed page shows, on another copy of it."""
    shown = PAGE.read_text().split(plan.MARK)[1].split("```")[1].split()
    assert shown[:3] == ["python", "tools/plan.py", "build"]
    command = [sys.executable, *shown[1:], "--update-page", str(page)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_page_holds_what_the_command_prints(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    head, table = PAGE.read_text().split(plan.MARK)
    page.write_text(head + plan.MARK + table.replace("TB", "GB"))
    ended = update(page)
    assert ended.returncode == 0, ended.stderr
    assert page.read_text() == PAGE.read_text()
    page.write_text("# Cost\n")
    ended = update(page)
    assert ended.returncode == 2 and "has no place for the plan" in ended.stderr


def test_flags_set_what_counting_meets(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["build", "--orders", "2", "3", "4", "5", "6", "--candidates", "6=0.29", "--distinct", "2=0.5", "6=0.3"]
    assert plan.main(flags) == 0
    printed = capsys.readouterr().out
    assert "2: 1.00, 3: 0.90, 4: 0.62, 5: 0.40, 6: 0.29" in printed and "| count-6-map |" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "two=1"], "error: --candidates: is malformed (got two=1; expected ORDER=SHARE"),
        (["--distinct", "2=3"], "error: --distinct: is malformed"),
        (["--orders", "2", "4"], "error: --orders: "),
        (["--tokens", "0"], "error: --tokens: is out of range"),
        (["--mfu", "0"], "error: --mfu: is out of range"),
        (["--check", "nowhere.jsonl"], "error: nowhere.jsonl: is no log of a build"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["build", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "shown"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (25.9e12, "25.9 TB")])
def test_bytes_are_shown_in_decimal_units(number: float, shown: str) -> None:
    assert shown_bytes(number) == shown


@pytest.mark.parametrize(
    ("shape", "max_order", "message"),
    [
        ("1.2.3x64", 4, "--bank-shape: is malformed .*1.2.3x64"),
        ("1e6x64:int3", 4, "--bank-shape: is malformed"),
        ("1e6x64", 1, "--bank-max-order: is no n-gram's length"),
    ],
)
def test_a_bank_on_paper_has_a_size_and_an_order(shape: str, max_order: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan._bank_shape(argparse.Namespace(bank_shape=shape, bank_max_order=max_order))


def test_a_bank_on_paper_is_read() -> None:
    found = plan._bank_shape(argparse.Namespace(bank_shape="1.5e6x64,32:int8", bank_max_order=3))
    assert found is not None
    assert (found.num_rows, found.widths, found.row_dtype, found.max_order) == (1_500_000, (64, 32), "int8", 3)
