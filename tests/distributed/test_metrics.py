"""What a run with memory tells of itself at every log interval: on the console, in TensorBoard and in JSON lines."""

from __future__ import annotations

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.layouts import STEPS
from tests.helpers.tiny_run import Finished

OF_A_SITE = ("gate_mean", "gate_p10", "gate_p50", "gate_p90", "delta_ratio", "participation")
SITE_METRICS = [f"graft/{name}_layer_{layer}" for layer in (2, 3, 4) for name in OF_A_SITE]
METRICS = [
    "graft/stall_ms", "graft/fetch_ms", "graft/hit_rate", *(f"graft/hit_rate_order_{order}" for order in (2, 3, 4)),
    "graft/unique_row_share", "engram/unique_row_share", *SITE_METRICS,
]  # fmt: skip


def test_every_interval_has_every_metric_in_its_range(fresh: Finished) -> None:
    assert len(fresh.records) == STEPS
    for record in fresh.records:
        assert not [name for name in METRICS if name not in record]
        by_order = [record[f"graft/hit_rate_order_{order}"] for order in (2, 3, 4)]
        assert sum(by_order) == pytest.approx(record["graft/hit_rate"])
        assert all(0 < record[name] < 1 for name in METRICS if "rate" in name or "share" in name)
        for layer in (2, 3, 4):
            low, middle, high = (record[f"graft/gate_p{share}_layer_{layer}"] for share in (10, 50, 90))
            assert 0 < low <= middle <= high < 1
            assert low < record[f"graft/gate_mean_layer_{layer}"] < high


def test_a_fresh_site_adds_nothing_and_then_in_several_directions(fresh: Finished) -> None:
    for layer in (2, 3, 4):
        ratios = [record[f"graft/delta_ratio_layer_{layer}"] for record in fresh.records]
        directions = [record[f"graft/participation_layer_{layer}"] for record in fresh.records]
        assert ratios[0] == directions[0] == 0
        assert all(ratio > 0 for ratio in ratios[1:])
        assert all(1 <= ratio <= 64 for ratio in directions[1:])  # of 64 dimensions


def test_tensorboard_has_what_the_json_lines_have(fresh: Finished) -> None:
    events = EventAccumulator(str(fresh.directory / "tensorboard"))
    events.Reload()
    for name in METRICS:
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx({record["iteration"]: record[name] for record in fresh.records}, rel=1e-6)


def test_the_console_has_two_lines_a_step(fresh: Finished) -> None:
    lines = re.findall(
        rf"^graft step (\d+)/{STEPS} \| .* \| hit [\d.]+% \| gate .* \| \|delta\|/\|h\| ", fresh.stdout, re.M
    )
    assert lines == [str(step) for step in range(1, STEPS + 1)]
    site = r"layer {}: gate p10/p50/p90 [\d.]+/[\d.]+/[\d.]+, participation [\d.]+"
    detail = r"order 2: [\d.]+% 3: [\d.]+% 4: [\d.]+% \| distinct rows [\d.]+% \| distinct table rows [\d.]+%"
    detail += "".join(rf" \| {site.format(layer)}" for layer in (2, 3, 4))
    assert re.findall(rf"^graft detail (\d+) \| {detail}$", fresh.stdout, re.M) == lines
