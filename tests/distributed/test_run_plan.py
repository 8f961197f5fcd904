"""What a plan says of four ranks, against four ranks: parameters, bytes to the device, bytes handed to collectives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.layouts import world_flags
from tests.helpers.tiny_run import Finished, World, launch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS, RANKS = 4, 4
# A plan is of the first tensor-parallel rank; what does not divide evenly, here 15 columns and 9 heads over two, leaves
# later ones less.
LEAST = 0.85
PLAN = Path(__file__).resolve().parents[2] / "tools" / "plan.py"
type Stage = dict[str, Any]
LEDGER = "tests.helpers.pretrain_with_ledger"
TP2 = ("--tensor-model-parallel-size", 2)
LAYOUTS = {
    "TP=2, sequence parallel, PP=2": ("sum", (*TP2, "--sequence-parallel", "--pipeline-model-parallel-size", 2)),
    "TP=2, sequence parallel, CP=2": ("sum", (*TP2, "--sequence-parallel", "--context-parallel-size", 2)),
    "dense, TP=2, DP=2": ("dense", TP2),
}
# Function of torch.distributed -> the plan's collectives that end there.
FUNCTIONS = {
    "all_to_all_single": ("all-to-all of table rows",),
    "send": ("halo of the convolution",),
    "all_reduce": (
        "all-reduce of gradients", "all-reduce of replicated gradients", "all-reduce of keys and values",
    ),
}  # fmt: skip


class Measured:
    """One layout, trained with its memory and without."""

    def __init__(self, world: World, directory: Path, name: str) -> None:
        kind, layout = LAYOUTS[name]
        flags = [*world_flags(world, kind), *layout]
        self.flags = [str(flag) for flag in [*flags, "--train-iters", STEPS]]
        self.run = launch(directory / "with", self.flags, processes=RANKS, module=LEDGER).require_success()
        stock = [*world.flags(experts=kind != "dense"), *layout, "--train-iters", STEPS]
        self.stock = launch(directory / "without", stock, processes=RANKS, module=LEDGER).require_success()

    def ledger(self, run: Finished, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run.directory / f"ledger-{rank}.json").read_text())
        return found

    def added(self, function: str, rank: int) -> float:
        """Bytes a step that the memory adds to what a rank hands to a function."""
        with_memory, without = (self.ledger(run, rank)["bytes"].get(function, 0) for run in (self.run, self.stock))
        return float(with_memory - without) / STEPS


@pytest.fixture(scope="module", params=list(LAYOUTS))
def measured(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(world, tmp_path_factory.mktemp("plan"), request.param)


@pytest.fixture(scope="module")
def costs(measured: Measured) -> dict[int, Stage]:
    """What tools/plan.py says of the run's own flags, by pipeline stage; the text's shares are those that it met."""
    records = [record for record in measured.run.records if "graft/hit_rate" in record]
    mean = {name: sum(record[name] for record in records) / len(records) for name in records[0] if "/" in name}
    text = {
        "--hit-rate": mean["graft/hit_rate"], "--distinct": mean["graft/unique_row_share"],
        "--distinct-table": mean["engram/unique_row_share"],
    }  # fmt: skip
    command = [sys.executable, str(PLAN), "train", "--json", "--world-size", str(RANKS)]
    command += [str(word) for pair in text.items() for word in pair]
    planned = subprocess.run([*command, "--", *measured.flags], capture_output=True, text=True, timeout=280)
    assert planned.returncode == 0, planned.stderr[-3000:]
    return {stage["stage"]: stage for stage in json.loads(planned.stdout)["stages"]}


def stage_of(rank: int, costs: dict[int, Stage]) -> Stage:
    return costs[rank * len(costs) // RANKS]


def test_parameters_of_every_rank(measured: Measured, costs: dict[int, Stage]) -> None:
    for rank in range(RANKS):
        found, cost = measured.ledger(measured.run, rank)["parameters"], stage_of(rank, costs)
        for kind in ("dense", "table"):
            assert LEAST * cost[kind] <= found[kind] <= cost[kind]
    first = measured.ledger(measured.run, 0)["parameters"]
    assert (first["dense"], first["table"]) == (costs[0]["dense"], costs[0]["table"])


def test_bytes_to_the_device(measured: Measured, costs: dict[int, Stage]) -> None:
    for rank in range(RANKS):
        found = measured.ledger(measured.run, rank)["device_bytes"]
        assert found > 0
        assert found / STEPS == pytest.approx(stage_of(rank, costs)["device_bytes"], rel=0.1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bytes_handed_to_collectives(measured: Measured, costs: dict[int, Stage], function: str) -> None:
    for stage, cost in costs.items():
        planned = sum(one["handed"] for one in cost["collectives"] if one["name"] in FUNCTIONS[function])
        ranks = [rank for rank in range(RANKS) if stage_of(rank, costs)["stage"] == stage]
        found = sum(measured.added(function, rank) for rank in ranks) / len(ranks)
        if planned == 0:
            assert found <= 4096  # a few numbers of metrics
        else:
            assert LEAST * planned <= found <= 1.1 * planned, (stage, function)
