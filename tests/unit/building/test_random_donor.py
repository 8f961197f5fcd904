"""A donor with random weights: everything of another one but what it has learnt."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.random_donor import make_random_donor
from megatron_graft.errors import DonorError
from tests.helpers.building import save_llama
from tools import fetch_donor


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("like") / "donor")


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_seeds_decide_the_weights_and_nothing_else_changes(like: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert make_random_donor(like, seed, tmp_path / name)
    assert weights(tmp_path / "one") == weights(tmp_path / "again") != weights(tmp_path / "two")
    assert weights(tmp_path / "one") != weights(like)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()


def test_it_is_a_donor_under_a_name_of_its_own(like: Path, tmp_path: Path) -> None:
    make_random_donor(like, 1, tmp_path / "one")
    donor, trained = (HuggingFaceDonor(directory) for directory in (tmp_path / "one", like))
    assert donor.name == "donor-random-1"
    assert donor.revision != trained.revision


def test_a_complete_one_stays_and_another_is_refused(like: Path, tmp_path: Path) -> None:
    assert make_random_donor(like, 1, tmp_path / "one")
    assert not make_random_donor(like, 1, tmp_path / "one")
    with pytest.raises(DonorError, match="exists and is another donor"):
        make_random_donor(like, 2, tmp_path / "one")
    with pytest.raises(DonorError, match="is no donor's directory"):
        make_random_donor(tmp_path, 1, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_the_command_wants_one_of_three(like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "made")
    assert fetch_donor.main(["--random-weights", "3", "--like", str(like), target]) == 0
    assert fetch_donor.main(["smollm2-135m", "--random-weights", "3", "--like", str(like), target]) == 2
    assert fetch_donor.main(["--random-weights", "3", target]) == 2
    assert "--like" in capsys.readouterr().err
