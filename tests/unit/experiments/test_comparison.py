"""The figures of a comparison, from records whose effects are known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.experiments import statistics
from megatron_graft.experiments.comparison import Summary, difference, references_of, summarise
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.records import RunRecord, load_records
from megatron_graft.experiments.training_curves import curve_of
from megatron_graft.reporting.figures import round_all
from tests.helpers.arm_records import EFFECTS, YAML, all_records, make_record, write_experiment, write_records

Summarise = Callable[[list[dict[str, Any]]], Summary]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistics.resampled_ratios.__defaults__ == (statistics.RESAMPLES, statistics.BOOTSTRAP_SEED)
    monkeypatch.setattr(statistics.resampled_ratios, "__defaults__", (500, statistics.BOOTSTRAP_SEED))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return write_experiment(tmp_path)


@pytest.fixture
def summary_of(tmp_path: Path, experiment: Experiment) -> Summarise:
    def make(records: list[dict[str, Any]]) -> Summary:
        return summarise(experiment, load_records(write_records(tmp_path / "r.jsonl", records), experiment))

    return make


def states(summary: Summary) -> dict[str, tuple[str, str]]:
    return {name: (one["state"], one["reason"]) for name, one in summary["hypotheses"].items()}


def test_the_rival_is_the_arm_that_most_hypotheses_name(experiment: Experiment, tmp_path: Path) -> None:
    assert references_of(experiment) == ["none", "engram"]
    without = write_experiment(tmp_path, YAML[: YAML.index("hypotheses:")])
    assert references_of(without) == ["none"]


def test_effects_are_found_and_none_is_not(summary_of: Summarise) -> None:
    records = all_records_with({"sum_shuffled": -0.2})
    summary = summary_of(records)
    assert states(summary) | {"H3": None} == {"H1": ("shown", ""), "H2": ("shown", ""), "H3": None}
    assert summary["hypotheses"]["H3"]["state"] == "open"
    assert summary["hypothesis_level"] == pytest.approx(1 - 0.05 / 3)
    for name, arm in summary["arms"].items():
        for text in ("heldout", "email"):
            found = arm["texts"][text]["minus"].get("none")
            assert (found is None) == (name == "none")
            assert found is None or found["mean"] == pytest.approx(EFFECTS[name], abs=0.01)


def all_records_with(effects: dict[str, float]) -> list[dict[str, Any]]:
    arms = ("none", "engram", "sum", "sum_shuffled")
    return [make_record(arm, seed, effects.get(arm)) for arm in arms for seed in (1, 2, 3)]


def test_the_opposite_of_a_claim_contradicts_it(summary_of: Summarise) -> None:
    assert states(summary_of(all_records_with({"sum": 0.1})))["H2"] == ("contradicted", "")


def test_the_interval_of_a_hypothesis_is_wider_than_that_of_a_table(summary_of: Summarise) -> None:
    summary = summary_of(all_records_with({}))
    (judged, shown) = (
        summary["hypotheses"]["H1"]["difference"],
        summary["arms"]["engram"]["texts"]["heldout"]["minus"],
    )
    for kind in ("documents", "over_seeds"):
        assert judged[kind]["low"] < shown["none"][kind]["low"] < shown["none"][kind]["high"] < judged[kind]["high"]
    assert judged["mean"] == shown["none"]["mean"]


def test_a_pair_without_a_hypothesis_has_the_difference_of_a_table_and_no_part_in_the_correction(
    summary_of: Summarise,
) -> None:
    summary = summary_of(all_records_with({}))
    pair = summary["pairs"]["sum_shuffled_minus_none"]
    assert (pair["first"], pair["second"]) == ("sum_shuffled", "none")
    assert pair["difference"] == summary["arms"]["sum_shuffled"]["texts"]["heldout"]["minus"]["none"]
    assert summary["hypothesis_level"] == pytest.approx(1 - 0.05 / 3)
    assert summary_of([make_record("none", 1)])["pairs"]["sum_shuffled_minus_none"]["difference"] is None


def test_partial_results_leave_out_what_is_not_there(summary_of: Summarise) -> None:
    summary = summary_of([make_record("none", 1), make_record("engram", 1), make_record("engram", 2)])
    assert states(summary) == {
        "H1": ("open", "1 of 3 seeds have been run"),
        "H2": ("open", "not run yet"),
        "H3": ("open", "not run yet"),
    }
    assert list(summary["arms"]) == ["none", "engram"]
    assert summary["not_run"]["none"] == [2, 3] and summary["not_run"]["engram"] == [3]
    assert summary["not_run"]["graft"] == [1]
    assert summary["runs"]["finished"] == 3 and summary["runs"]["planned"] == 21
    minus = summary["arms"]["engram"]["texts"]["heldout"]["minus"]["none"]
    assert list(minus["by_seed"]) == ["1"] and minus["sd"] is None and minus["over_seeds"] is None
    nothing = summary_of([])
    assert nothing["arms"] == {} and set(states(nothing).values()) == {("open", "not run yet")}


def test_figures_do_not_depend_on_the_order_of_records(summary_of: Summarise, experiment: Experiment) -> None:
    records = all_records(experiment)
    assert json.dumps(summary_of(records)) == json.dumps(summary_of(records[::-1]))


def test_the_untouched_text_is_not_looked_at_before_a_tuning_round(summary_of: Summarise) -> None:
    before = summary_of(all_records_with({}))
    assert before["round"] is None and '"untouched"' not in json.dumps(before)
    after = summary_of([*all_records_with({}), make_record("tuned", 1)])
    assert '"untouched"' not in json.dumps(after["arms"])
    assert list(after["round"]["arms"]) == ["none", "engram", "sum", "sum_shuffled", "tuned"]
    tuned = after["round"]["arms"]["tuned"]["minus"]
    assert list(tuned) == ["none", "engram", "sum", "sum_shuffled"]
    assert tuned["sum"]["mean"] == pytest.approx(-0.05, abs=0.01)


def test_arms_of_other_steps_are_not_compared(tmp_path: Path) -> None:
    longer = YAML.replace(
        "label: hashed tables, group: core, flags: {", "label: t, group: core, flags: {train-iters: 80, "
    )
    experiment = write_experiment(tmp_path, longer)
    finished = [make_record(arm, seed, steps=80 if arm == "engram" else 40) for arm in EFFECTS for seed in (1, 2, 3)]
    records = load_records(write_records(tmp_path / "r.jsonl", finished), experiment)
    assert difference(records, "engram", "none", "heldout") is None
    assert difference(records, "sum", "none", "heldout") is not None
    assert states(summarise(experiment, records))["H1"] == (
        "open",
        "its arms are trained for different numbers of steps",
    )


def test_sources_sum_to_their_text(summary_of: Summarise) -> None:
    text = summary_of(all_records_with({}))["arms"]["sum"]["texts"]["heldout"]
    documents = all_records_with({})[0]["texts"]["heldout"]["documents"]
    tokens = dict.fromkeys(("novel", "press"), 0)
    for source, number in zip(documents["source"], documents["tokens"], strict=True):
        tokens[source] += number
    assert list(text["by_source"]) == ["novel", "press"]
    for name in ("loss", "bits_per_byte"):
        weighted = sum(text["by_source"][source][name]["mean"] * number for source, number in tokens.items())
        assert weighted / sum(tokens.values()) == pytest.approx(text[name]["mean"])
    assert text["bits_per_byte"]["mean"] == pytest.approx(text["loss"]["mean"] / math.log(2) / 4)
    weighted = sum(text["by_source"][source]["minus"]["none"]["mean"] * number for source, number in tokens.items())
    assert weighted / sum(tokens.values()) == pytest.approx(text["minus"]["none"]["mean"])


def test_losses_are_split_by_match_and_by_count_where_both_arms_were_split_alike(summary_of: Summarise) -> None:
    records = all_records_with({})
    summary = summary_of(records)
    orders = summary["arms"]["sum"]["texts"]["heldout"]["by_order"]
    assert orders["3"]["minus"]["none"] == {"mean": pytest.approx(-0.4), "sd": pytest.approx(0)}
    assert orders["2"]["minus"]["engram"]["mean"] == pytest.approx(-0.1)
    assert sum(part["share"] for part in orders.values()) == pytest.approx(1)
    assert summary["arms"]["sum"]["hit_rate"]["heldout"]["any"] == pytest.approx(1 - orders["miss"]["share"])
    assert summary["arms"]["none"]["hit_rate"] is None
    grid = summary["grids"]["sum"]
    assert list(summary["grids"]) == ["sum"] and list(grid) == ["none", "engram", "sum_shuffled"]
    assert grid["none"]["2"]["16-63"] == {"tokens": 3000, "mean": pytest.approx(-0.6), "sd": pytest.approx(0)}
    others = copy.deepcopy(records)
    for record in others[:3]:  # the baseline, split by another bank
        text = record["texts"]["heldout"]
        text["by_order"]["2"]["tokens"] += 1
        text["by_order_and_count"]["2"]["2-3"]["tokens"] += 1
    summary = summary_of(others)
    assert "none" not in summary["grids"]["sum"]
    assert list(summary["arms"]["sum"]["texts"]["heldout"]["by_order"]["2"]["minus"]) == ["engram"]


def test_a_control_has_no_grid_of_its_own(tmp_path: Path) -> None:
    favoured = YAML + "  - {name: H4, better: sum_shuffled, worse: none, claim: keys alone pay}\n"
    experiment = write_experiment(tmp_path, favoured)
    path = write_records(tmp_path / "r.jsonl", all_records_with({}))
    assert list(summarise(experiment, load_records(path, experiment))["grids"]) == ["sum"]


def test_training_is_compared_on_the_same_batches(summary_of: Summarise) -> None:
    records = all_records_with({})
    training = summary_of(records)["arms"]["sum"]["training"]
    minus = training["minus"]["none"]
    # The synthetic effect grows with the tokens, and the noise of a seed is the same in all arms.
    assert minus["curve"] == pytest.approx([-0.2 * (place + 1) / 12 for place in range(12)])
    assert {share: at["mean"] for share, at in minus["at"].items()} == {
        "15": pytest.approx(-0.2 / 12), "25": pytest.approx(-0.05), "50": pytest.approx(-0.1),
        "75": pytest.approx(-0.15), "100": pytest.approx(-0.2),
    }  # fmt: skip
    assert training["minus"]["engram"]["at"]["100"]["mean"] == pytest.approx(-0.1)
    assert max(minus["sd"]) == pytest.approx(0, abs=1e-12)
    for record in records[:3]:
        record["training"] = {"tokens": [1.0, 2.0], "loss": [9.0, 8.0]}
    assert set(summary_of(records)["arms"]["sum"]["training"]["minus"]) == {"engram"}


def test_the_tokens_after_which_another_arms_last_loss_is_reached() -> None:
    def runs(*losses: float) -> dict[int, RunRecord]:
        data = {"training": {"tokens": [10.0 * (bin + 1) for bin in range(len(losses))], "loss": list(losses)}}
        return {1: RunRecord(place="", arm="", seed=1, texts={}, data=data)}

    rivals = {"slow": runs(9, 8, 7, 6, 5), "better": runs(9, 8, 7, 6, 3), "shorter": runs(9, 8)}
    found = curve_of(runs(9, 7, 5, 4, 4), rivals)
    assert found is not None
    assert {name: one["reached"] for name, one in found["minus"].items()} == {"slow": 0.6, "better": None}


def test_parts_of_the_positions_have_their_share_of_the_difference_on_every_text(summary_of: Summarise) -> None:
    summary = summary_of(all_records_with({}))
    for one in (summary["hypotheses"]["H2"], summary["pairs"]["sum_shuffled_minus_none"]):
        assert list(one["texts"]) == ["heldout", "email"]
        for text in one["texts"].values():
            order = summary["arms"]["sum"]["texts"]["heldout" if text is one["texts"]["heldout"] else "email"][
                "by_order"
            ]
            effect = -0.1 if one is summary["hypotheses"]["H2"] else -0.2
            # In these records order k is better by (k - 1) times the effect, and a miss not at all.
            expected = {part: order[part]["share"] * effect * place for place, part in enumerate(("miss", "2", "3"))}
            assert {part: found["mean"] for part, found in text["parts"].items()} == pytest.approx(expected)


def test_memory_off_and_other_rows_are_differences_to_the_trained_memory(summary_of: Summarise) -> None:
    text = summary_of(all_records_with({}))["arms"]["sum"]["texts"]["heldout"]
    assert text["memory_off"]["change"]["mean"] == pytest.approx(0.5)
    assert text["memory_off"]["loss"]["mean"] == pytest.approx(text["loss"]["mean"] + 0.5)
    assert text["other_bank"]["shuffled"]["change"]["documents"]["high"] == pytest.approx(0.05)


def test_a_diverged_run_is_told_and_leaves_no_mean(summary_of: Summarise) -> None:
    records = all_records_with({})
    text = records[3]["texts"]["heldout"]  # engram, seed 1
    text["loss"] = text["documents"]["loss"][0] = math.nan
    summary = summary_of(records)
    assert summary["not_finite"] == ["`engram`, seed 1"]
    assert states(summary)["H1"] == ("open", "a loss is not finite")
    assert round_all(summary)["arms"]["engram"]["texts"]["heldout"]["loss"]["mean"] is None


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for member in value.values():
            yield from keys_of(member)


def test_every_figure_has_an_address(summary_of: Summarise, experiment: Experiment) -> None:
    records = all_records(experiment)
    for record in records:
        text = record["texts"]["heldout"]["documents"]
        text["source"] = [f"{source}.txt" for source in text["source"]]
    summary = summary_of(records)
    assert not [key for key in keys_of(summary) if not isinstance(key, str) or set(key) & set(".#<>")]
    assert list(summary["arms"]["sum"]["texts"]["heldout"]["by_source"]) == ["novel_txt", "press_txt"]
