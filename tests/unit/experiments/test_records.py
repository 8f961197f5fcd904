"""Reading the records of finished runs: what counts, what is passed over, and what is refused where."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.errors import ConfigError, GraftError, IdentityError
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.records import finished_runs, load_records
from megatron_graft.experiments.runs import changed_flags
from megatron_graft.log import get_logger
from tests.helpers.arm_records import make_record, write_experiment, write_records


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return write_experiment(tmp_path)


def test_runs_come_by_arm_and_seed_whatever_their_order(tmp_path: Path, experiment: Experiment) -> None:
    finished = [make_record("sum", 3), make_record("none", 2), make_record("sum", 1), make_record("none", 1)]
    records = load_records(write_records(tmp_path / "r.jsonl", finished), experiment)
    assert {arm: list(seeds) for arm, seeds in records.runs.items()} == {"none": [1, 2], "sum": [1, 3]}
    assert list(records.losses("sum", "heldout")) == [1, 3]
    assert records.losses("engram", "heldout") == {}
    documents = records.documents("heldout")
    assert documents.tokens.size == documents.bytes.size == len(documents.sources) == 65
    text = records.runs["sum"][1].texts["heldout"]
    assert text.memory_off is not None and np.all(text.memory_off > text.losses)
    assert list(text.other_bank) == ["shuffled"]


def test_a_later_record_of_a_run_replaces_an_earlier_one(tmp_path: Path, experiment: Experiment) -> None:
    first, second = make_record("none", 1, effect=0.5), make_record("none", 1)
    records = load_records(write_records(tmp_path / "r.jsonl", [first, second]), experiment)
    assert records.runs["none"][1].texts["heldout"].summary["loss"] == second["texts"]["heldout"]["loss"]


@pytest.mark.parametrize("cut", [1, 200, -2, -30])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_line_without_its_end_is_passed_over_with_a_warning(
    tmp_path: Path, experiment: Experiment, caplog: pytest.LogCaptureFixture, cut: int, goes_on: bool
) -> None:
    path = write_records(tmp_path / "r.jsonl", [make_record("none", 1)])
    with path.open("a") as stream:
        stream.write(json.dumps(make_record("sum", 1))[:cut])
        stream.write("\n" + json.dumps(make_record("engram", 1)) + "\n" if goes_on else "")
    get_logger().addHandler(caplog.handler)
    records = load_records(path, experiment)
    get_logger().removeHandler(caplog.handler)
    assert list(records.runs) == (["none", "engram"] if goes_on else ["none"])
    assert f"{path}:2" in caplog.text


@pytest.mark.parametrize("damaged", ["{]", '{"a": 1}}', "none", "5", '{"arm": "none"}', "[]"])
def test_a_damaged_line_is_named(tmp_path: Path, experiment: Experiment, damaged: str) -> None:
    path = write_records(tmp_path / "r.jsonl", [make_record("none", 1)])
    path.write_text(path.read_text() + damaged + "\n" + json.dumps(make_record("sum", 1)) + "\n")
    with pytest.raises(ConfigError, match=r"r\.jsonl:2: "):
        load_records(path, experiment)


def broken(**text: Any) -> dict[str, Any]:
    record = make_record("none", 2)
    record["texts"]["heldout"] |= text
    return record


def documents_of(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return record["texts"]["heldout"]["documents"] | changes


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        (make_record("none", 2, experiment="another"), ConfigError, "is of another experiment"),
        (make_record("none", 2, texts={"heldout": {"loss": 1.0}}), ConfigError, "KeyError: 'documents'"),
        (broken(loss=9.0), ConfigError, "another loss than its documents"),
        (broken(documents=documents_of(make_record("none", 2), loss=[1.0])), ConfigError, "text heldout: has not one"),
        (
            broken(documents=documents_of(make_record("none", 2), source=["novel"] * 65)),
            IdentityError,
            "was evaluated on other documents of the text heldout than",
        ),
        (make_record("none", 2, bank={"digest": "x", "rows": 1}), IdentityError, "differs in its bank"),
        (make_record("none", 2, parameters={"trained": 1}), IdentityError, "differs in its parameters"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, experiment: Experiment, record: dict[str, Any], kind: type[GraftError], message: str
) -> None:
    path = write_records(tmp_path / "r.jsonl", [make_record("none", 1), record])
    with pytest.raises(kind, match=message) as caught:
        load_records(path, experiment)
    assert f"{path}:2" in str(caught.value)


def test_records_of_no_run_of_the_experiment_are_set_aside_with_the_reason(
    tmp_path: Path, experiment: Experiment
) -> None:
    other = make_record("engram", 1)["command"] + " --lr 0.1"
    strangers = [
        make_record("graft", 2), make_record("none", 3, steps=8), make_record("dropped", 1, effect=0.0),
        make_record("engram", 1, command=other), make_record("none", 1),
        make_record("sum", 1, bank_plan=[{"donor": "another"}]),
    ]  # fmt: skip
    path = write_records(tmp_path / "r.jsonl", [*strangers, make_record("none", 1)])
    records = load_records(path, experiment)
    assert {arm: list(seeds) for arm, seeds in records.runs.items()} == {"none": [1]}
    assert finished_runs(path, experiment) == {("none", 1)}
    assert records.set_aside == (
        "`none`, seed 1: recorded again later",
        "`dropped`, seed 1: the experiment has no such arm",
        "`engram`, seed 1: the experiment asks for other flags: --lr",
        "`graft`, seed 2: the experiment asks for seeds 1",
        "`none`, seed 3: 8 steps, the experiment asks for 40",
        "`sum`, seed 1: the experiment asks for a bank made otherwise",
    )


def test_a_loss_that_is_not_finite_is_kept_as_such(tmp_path: Path, experiment: Experiment) -> None:
    record = make_record("none", 1)
    text = record["texts"]["heldout"]
    text["loss"] = text["documents"]["loss"][3] = None
    records = load_records(write_records(tmp_path / "r.jsonl", [record]), experiment)
    assert math.isnan(records.losses("none", "heldout")[1][3])


def test_a_missing_file_is_named(tmp_path: Path, experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read.*tools/run_arms"):
        load_records(tmp_path / "none.jsonl", experiment)


def test_nothing_is_finished_before_there_is_a_file(tmp_path: Path, experiment: Experiment) -> None:
    assert finished_runs(tmp_path / "none.jsonl", experiment) == set()


def test_commands_are_compared_by_their_flags() -> None:
    one = "run.sh --lr 0.1 --layers 2 3 --swiglu"
    assert changed_flags(one, "other.sh --swiglu --layers 2 3 --lr 0.1") == []
    assert changed_flags(one, "run.sh --lr 0.2 --layers 2 3") == ["--lr", "--swiglu"]
    assert changed_flags(one, "run.sh --lr 0.1 --layers 3 --swiglu") == ["--layers"]
