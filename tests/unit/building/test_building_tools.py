from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError
from megatron_graft.jobs.build_flags import add_build_flags, blend, parse_build_flags
from tests.helpers.building import write_data_set
from tests.helpers.tokenizers import small_sentencepiece
from tools import build_bank, build_stage, fetch_donor


@pytest.fixture
def arguments(data_prefix: str, recipient: TextTokenizer, donor_directory: Path, tmp_path: Path) -> list[str]:
    return [
        "--data-prefix", data_prefix, "--tokenizer-model", str(recipient.path), "--donor", str(donor_directory),
        "--donor-layers", "1", "--num-rows", "50", "--output", str(tmp_path / "bank"), "--workers", "0",
    ]  # fmt: skip


def test_a_bank_is_built_and_its_coverage_printed_and_stored(
    arguments: list[str], data_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_bank.main([*arguments, "--coverage", f"heldout={data_prefix}"]) == 0
    table = capsys.readouterr().out
    stored = json.loads((tmp_path / "bank.coverage.json").read_text())
    assert stored["bank"] == open_bank(tmp_path / "bank", verify="full").digest
    assert set(stored["data_sets"]) == {"train", "heldout"}
    assert 0.1 < stored["data_sets"]["train"]["hit_rate"] < 1
    assert f"{stored['data_sets']['heldout']['hit_rate']:.1%}" in table


def test_rows_are_stored_as_asked(arguments: list[str], tmp_path: Path) -> None:
    assert build_bank.main([*arguments, "--row-dtype", "int8"]) == 0
    assert open_bank(tmp_path / "bank", verify="full").manifest.identity.row_dtype == "int8"
    assert build_bank.main(arguments) == 2  # of other settings now


def test_a_control_is_made_from_a_bank(arguments: list[str], tmp_path: Path) -> None:
    assert build_bank.main(arguments) == 0
    control = ["--control", "shuffled", "--seed", "7", "--from-bank", str(tmp_path / "bank")]
    assert build_bank.main([*control, "--output", str(tmp_path / "shuffled")]) == 0
    found = open_bank(tmp_path / "shuffled").manifest.identity.control
    assert found is not None and (found.kind, found.seed) == ("shuffled", 7)


def test_a_control_is_not_told_what_it_takes_from_its_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control = ["--control", "shuffled", "--from-bank", "bank", "--output", str(tmp_path / "control")]
    assert build_bank.main([*control, "--num-rows", "3", "--row-dtype", "int8"]) == 2
    message = "error: --from-bank: reads no flags that say how a bank is built (got --num-rows, --row-dtype; expected"
    assert message in capsys.readouterr().err


def test_data_of_another_tokenizer_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_tokenizer(small_sentencepiece(tmp_path, vocab_size=380))
    prefix = tmp_path / "other"
    write_data_set(prefix, [other.encode("the whale was near")])
    write_sidecar(prefix, other)
    assert build_bank.main([*arguments, "--coverage", f"foreign={prefix}"]) == 2
    assert f"error: {prefix}: was tokenised by another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--coverage", "heldout"], "error: --coverage: is malformed (got heldout; expected NAME=PREFIX)"),
        (["--coverage", "heldout=nowhere"], "nowhere.idx: does not exist"),
        (["--seed", "-1", "--control", "random"], "error: --seed: "),
        (["--from-bank", "nowhere"], "error: --from-bank: needs --control"),
        (["--orders", "2", "4"], "error: --orders: "),
    ],
)
def test_bad_flags_are_named(
    arguments: list[str], more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_bank.main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


def test_a_flag_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_bank.main(["--output", str(tmp_path / "bank")]) == 2
    assert "error: --data-prefix: is missing" in capsys.readouterr().err


def test_fetching_an_unknown_donor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_donor.main(["llama-9000", str(tmp_path / "donor")]) == 2
    assert "error: donor name: " in capsys.readouterr().err


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_build_flags(parser)
    return parse_build_flags(parser, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: 3", "names unknown flags .got rows"),
        ("num-rows: many", "gives num_rows a value it cannot have"),
        ("orders: 3", "gives orders the wrong kind of value .got 3; expected a list"),
        ("donor: [a, b]", "gives donor the wrong kind of value"),
        ("raw: perhaps", "gives raw no truth value"),
        ("row-dtype: float64", "gives row_dtype a value it cannot have .got float64"),
        ("- 3", "is no mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_a_file_of_flags_cannot_say_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"--config .*build.yaml: {message}"):
        parsed("--config", str(tmp_path / "build.yaml"))


def test_a_file_of_flags_is_read_as_the_command_line_is(tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text(
        "orders: [2, 3]\nraw: true\nnum-rows: all\nrows-by-order: {2: 10, 3: 20}\nsplit: 969,30,1\n"
        "memory-gb: 1.5\nthreads: null\nexecutor: datatrove-slurm\nslurm-time: 12:00:00\n"
    )
    flags = parsed("--config", str(tmp_path / "build.yaml"), "--orders", "4")
    assert (flags.orders, flags.raw, flags.num_rows, flags.split) == ([4], True, None, "969,30,1")
    assert (flags.rows_by_order, flags.memory_gb, flags.threads) == (["2=10", "3=20"], 1.5, None)


@pytest.mark.parametrize(
    ("values", "expected"),
    [(["a", "b"], (("a", "b"), None)), (["0.3", "a", "7", "./0.5"], (("a", "./0.5"), (0.3, 7.0)))],
)
def test_data_sets_may_be_a_blend(values: list[str], expected: object) -> None:
    assert blend(values) == expected


@pytest.mark.parametrize("values", [["0.3", "a", "b"], ["a", "0.3"], ["0.3", "0.4"], ["0", "a"], ["nan", "a"]])
def test_what_is_no_blend_is_refused(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data-prefix: is no blend"):
        blend(values)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script without srun
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8"}, (1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}, (2, 4)),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8"}, (7, 8)),
    ],
)
def test_a_worker_knows_its_number(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert build_stage.worker(None, None, environment) == expected
    assert build_stage.worker(2, 3, environment) == (2, 3)
    with pytest.raises(ConfigError, match="--rank: goes with --world-size"):
        build_stage.worker(2, None, environment)


def test_an_array_with_gaps_is_told_so() -> None:
    environment = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID 7: does not follow .*without gaps.*Submit all of it"):
        build_stage.worker(None, None, environment)


def test_a_bank_that_is_there_is_not_planned_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_bank.main(arguments) == 0
    assert build_stage.main(["plan", *arguments]) == 0
    assert not (tmp_path / "bank.build").exists()
    assert build_stage.main(["list", "--work-dir", str(tmp_path / "bank.build")]) == 2
    assert "plan.json: does not exist. Plan the build first" in capsys.readouterr().err


def test_an_estimate_writes_nothing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_bank.main([*arguments, "--estimate"]) == 0
    printed = capsys.readouterr().out
    assert "hit on fresh text" in printed and "bank: total" in printed
    assert not list(tmp_path.glob("bank*"))
