"""Reading an experiment: what a file may say, what is refused and where, and which runs it makes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_graft.errors import ConfigError
from megatron_graft.experiments.experiment import load_experiment
from megatron_graft.experiments.programs import training_script
from megatron_graft.experiments.runs import SCRIPT_VARIABLES, Places, flag_list, plan_runs

PLACES = Places(work=Path("/w"), runs=Path("/r"), records=Path("/r/records.jsonl"))
HYPOTHESIS = {"name": "H1", "better": "graft", "worse": "none", "claim": "it pays"}


def small() -> dict[str, Any]:
    return {
        "name": "small",
        "seeds": [1, 2],
        "primary": "heldout",
        "baseline": "none",
        "texts": {"foreign": ["email"]},
        "recipient": {"train-iters": 8, "hidden-size": 32, "swiglu": True},
        "banks": {
            "real": {"donor": "smollm2-135m", "flags": {"num-rows": 100}},
            "shuffled": {"from": "real", "control": "shuffled"},
            "other": {"donor": "gemma3-270m"},
        },
        "arms": {
            "more": {"group": "sweep", "sweeps": {"rows": 50}, "seeds": [1], "bank": "real"},
            "none": {"label": "no memory", "group": "core"},
            "graft": {"group": "core", "bank": "real", "flags": {"graft-layers": [1, 2], "train-iters": 9}},
        },
        "hypotheses": [HYPOTHESIS],
    }


def write(directory: Path, value: Any) -> Path:
    path = directory / "arms.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def test_a_file_says_all_there_is(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, small()))
    graft = experiment.arms["graft"]
    assert (graft.label, graft.steps, graft.seeds, graft.bank) == ("graft", 9, (1, 2), "real")
    assert experiment.arms["none"].steps == 8
    assert experiment.arms["more"].sweeps == {"rows": "50"}
    assert experiment.hypotheses[0].better == "graft"
    assert [plan.name for plan in experiment.plans_of("shuffled")] == ["real", "shuffled"]
    assert experiment.same_keys("real", "shuffled") and not experiment.same_keys("other", "shuffled")
    assert experiment.reads_like(graft, "shuffled")
    assert not experiment.reads_like(graft, "real") and not experiment.reads_like(experiment.arms["none"], "real")
    trained = replace(graft, flags={**graft.flags, "graft-rows": "trained"})
    assert not experiment.reads_like(trained, "shuffled")


def test_core_runs_come_first_and_every_arm_before_a_second_seed(tmp_path: Path) -> None:
    runs = plan_runs(load_experiment(write(tmp_path, small())))
    assert [run.name for run in runs] == ["none-seed1", "graft-seed1", "none-seed2", "graft-seed2", "more-seed1"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("core", {"none-seed1", "graft-seed1", "none-seed2", "graft-seed2"}),
        ("graft", {"graft-seed1", "graft-seed2"}),
        ("*-seed2", {"none-seed2", "graft-seed2"}),
    ],
)
def test_runs_are_chosen_by_pattern(tmp_path: Path, pattern: str, names: set[str]) -> None:
    assert {run.name for run in plan_runs(load_experiment(write(tmp_path, small())), [pattern])} == names


def test_a_pattern_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grafts.*none-seed1"):
        plan_runs(load_experiment(write(tmp_path, small())), ["grafts"])


def test_flags_of_an_arm_win_and_the_seed_is_the_runs(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, small()))
    run = next(run for run in plan_runs(experiment) if run.name == "graft-seed2")
    flags = run.flags(experiment, PLACES)
    assert flags[:6] == ["--train-iters", "9", "--hidden-size", "32", "--swiglu", "--graft-layers"]
    assert flags[flags.index("--seed") + 1] == "2"
    environment = run.environment(PLACES, processes=1, threads=2, port=6000)
    assert environment["GRAFT_BANK"] == "/w/banks/real"
    assert plan_runs(experiment)[0].environment(PLACES, processes=1, threads=2, port=6000)["GRAFT_BANK"] == "none"


def test_what_an_arm_is_trained_with_is_the_experiments_and_not_its_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ENGRAM_LAYERS", "NUM_EXPERTS", "GPUS_PER_NODE"):
        monkeypatch.setenv(name, "2 3")
    monkeypatch.setenv("DEVICE", "cpu")
    run = plan_runs(load_experiment(write(tmp_path, small())))[0]
    environment = run.environment(PLACES, processes=1, threads=2, port=6000)
    assert not {"ENGRAM_LAYERS", "NUM_EXPERTS"} & environment.keys()
    assert (environment["GPUS_PER_NODE"], environment["DEVICE"]) == ("1", "cpu")


def test_all_that_the_script_reads_is_decided_or_left_to_the_caller_knowingly() -> None:
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+):?[-+?]", training_script().read_text()))
    left = {
        "DEVICE", "PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    }  # fmt: skip
    own = {"EVALUATION_DATA"}  # no variable of the environment
    assert read - set(SCRIPT_VARIABLES) == left | own


def test_flags_as_a_command_line() -> None:
    assert flag_list({"lr": 0.5, "swiglu": True, "layers": [2, 3]}) == ["--lr", "0.5", "--swiglu", "--layers", "2", "3"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("arms", "graft", "group"), "cores", "arms.graft.group: is unknown .*cores"),
        (("arms", "graft", "bank"), "rael", "arms.graft.bank: names what is not there .*rael"),
        (("arms", "graft", "varies"), "rael", "arms.graft.varies: names what is not there .*rael"),
        (("arms", "graft", "flgas"), {}, "arms.graft: has members that nothing reads .*flgas"),
        (("arms", "graft", "flags"), {"swiglu": False}, "arms.graft.flags.swiglu: is no flag's value"),
        (("arms", "graft"), "real", "arms.graft: is of the wrong kind"),
        (("recipient",), {}, "arms.more: has no number of steps"),
        (("seeds",), ["one"], r"seeds\[0\]: is of the wrong kind"),
        (("baseline",), "nothing", "baseline: names what is not there"),
        (("hypotheses",), [{"name": "H1"}], r"hypotheses\[0\].better: is missing"),
        (("pairs",), [{"first": "none", "second": "rael"}], r"pairs\[0\].second: names what is not there .*rael"),
        (("banks", "shuffled", "from"), "shuffled", "banks.shuffled.from: names a control"),
        (("banks", "real", "control"), "shuffled", "banks.real.*: is neither a bank nor a control"),
        (("texts", "held_out_fraction"), "much", "texts.held_out_fraction: is of the wrong kind"),
        (("evaluation",), {"classify_by": "none"}, "evaluation.classify_by: names what is not there"),
        (
            ("evaluation",),
            {"memory_off": ["heldout", "mail"]},
            r"evaluation.memory_off\[1\]: names .*untouched, email",
        ),
        (("primary",), "heldut", "primary: names what is not there .*heldut.*heldout"),
        (("arms", "graft", "against"), {"nnoe": "none", "none": "more"}, "arms.graft.against: nnoe: names what is not"),
        (("hypotheses",), [HYPOTHESIS, HYPOTHESIS], "hypotheses: have one name .*H1"),
        (("seeds",), [], "arms.none: has no seeds"),
        (("banks", "shuffled", "flags"), {"num-rows": 9}, "banks.shuffled.flags: says what a control takes .*num-rows"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, place: tuple[str, ...], value: Any, message: str) -> None:
    bad = small()
    inner = bad
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path, bad))


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", ""])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="arms.yaml"):
        load_experiment(path)
