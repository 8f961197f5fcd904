"""A plan's arithmetic by hand, and what binds first on a machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout
from megatron_graft.data.memory_layout import EngramReading, GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.training.run_cost import RunShape, SitePlan, forward_flops, stage_costs, state_bytes
from megatron_graft.training.run_terms import TextShape

LAYOUT = RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(16,))
GRAFT = GraftReading(bank=0, columns=(0, 16), row_layout=LAYOUT, max_order=4)
ENGRAM = EngramReading(num_rows=100, num_heads=4, head_dim=3, max_order=3)
TEXT = TextShape(hit_rate=0.5, distinct=1.0, distinct_table=1.0)
H, S, B = 8, 32, 2


def site(layer: int, **reading: object) -> SitePlan:
    return SitePlan(reading=SiteReading(layer_number=layer, **reading), conv_kernel=4, conv_dilation=3)  # type: ignore[arg-type]


def shape(*sites: SitePlan, **changes: object) -> RunShape:
    one = RunShape(
        world_size=1, tensor=1, context=1, pipeline=1, virtual=1, data=1, sequence_parallel=False,
        distributed_optimizer=False, num_layers=4, hidden=H, sequence=S, micro_batch=B, micro_batches=3, look_ahead=2,
        element_bytes=2, sites=sites,
    )  # fmt: skip
    return replace(one, **changes)  # type: ignore[arg-type]


def test_one_rank_holds_all_and_sends_nothing() -> None:
    both = site(2, graft=GRAFT, engram=ENGRAM)
    [cost] = stage_costs(shape(both), TEXT)
    norms_and_convolution = 3 * H + 4 * H
    assert cost.dense == 2 * H * 16 + 2 * H * 12 + norms_and_convolution
    assert cost.table == 100 * 3
    assert cost.rows == 3 * 0.5 * B * S
    assert cost.row_bytes == cost.rows * 32
    assert cost.device_bytes > cost.row_bytes
    every_position = MicroBatchMemory.allocate(MemoryLayout.of([both.reading], Partition()), 0, B, S).packed.numel()
    assert cost.waiting_bytes == every_position * (1 + 2 * (2 + 1))  # in work; of two streams two waiting, one in hand
    assert cost.collectives == ()
    assert cost.state_bytes == (cost.dense + cost.table) * (2 + 4 + 12)


def test_stages_have_their_own_sites() -> None:
    costs = stage_costs(shape(site(1, graft=GRAFT), site(4, engram=ENGRAM), pipeline=2, world_size=2), TEXT)
    assert [(cost.stage, cost.layers) for cost in costs] == [(0, (1,)), (1, (4,))]
    assert costs[0].table == 0 and costs[1].rows == 0


def test_chunks_of_a_stage_are_added_up() -> None:
    sites = (site(1, graft=GRAFT), site(3, graft=GRAFT, engram=ENGRAM), site(4, engram=ENGRAM))
    costs = stage_costs(shape(*sites, pipeline=2, virtual=2, tensor=2, sequence_parallel=True, world_size=4), TEXT)
    assert [(cost.stage, cost.layers) for cost in costs] == [(0, (1, 3)), (1, (4,))]
    alone = [stage_costs(shape(one, tensor=2, sequence_parallel=True, world_size=2), TEXT)[0] for one in sites[:2]]
    for name in ("dense", "table", "state_bytes", "rows", "row_bytes", "device_bytes"):
        assert getattr(costs[0], name) == sum(getattr(cost, name) for cost in alone)
    # Between its forward and backward passes lie one micro-batch of a single stage, two of the first of two stages.
    assert costs[0].waiting_bytes * 7 == sum(cost.waiting_bytes for cost in alone) * 8
    sent = [{one.name: one.handed for one in cost.collectives} for cost in (costs[0], *alone)]
    assert sent[0] == {name: sum(part.get(name, 0) for part in sent[1:]) for name in sent[0]}


def test_context_parallel_ranks_share_positions_and_reduce_gradients() -> None:
    run = shape(site(2, graft=GRAFT, engram=ENGRAM), context=2, world_size=2, distributed_optimizer=True)
    [whole], [half] = stage_costs(shape(*run.sites), TEXT), stage_costs(run, TEXT)
    assert (half.dense, half.table, half.rows) == (whole.dense, whole.table, whole.rows / 2)
    assert half.state_bytes == (half.dense + half.table) * (2 + 4 + 12 / 2)
    sent = {one.name: one.handed for one in half.collectives}
    # Of four chunks the middle two are one rank's: the first and the last halo travel.
    assert sent["halo of the convolution"] == 2 * 3 * 2 * (3 * 3) * B * H * 2 / 2
    assert sent["reduce-scatter of gradients"] == (half.dense + half.table) * 4


def test_sequence_parallel_ranks_share_positions_and_table_rows() -> None:
    run = shape(site(2, graft=GRAFT, engram=ENGRAM), tensor=2, sequence_parallel=True, world_size=2)
    [whole], [half] = stage_costs(shape(*run.sites), TEXT), stage_costs(run, TEXT)
    assert half.dense == whole.dense and half.table == whole.table / 2
    assert half.rows == whole.rows / 2
    sent = {one.name: one.handed for one in half.collectives}
    assert sent["all-to-all of table rows"] == 2 * 3 * 2 * (B * S / 2) * 4 * 3
    assert sent["halo of the convolution"] == 2 * 3 * 2 * (3 * 3) * B * H / 2
    assert sent["all-reduce of replicated gradients"] == half.dense * 4


def test_a_split_of_columns_sums_keys_and_values() -> None:
    [cost] = stage_costs(shape(site(2, graft=GRAFT), tensor=2, world_size=2), TEXT)
    sent = {one.name: one.handed for one in cost.collectives}
    assert sent == {"all-reduce of keys and values": 2 * H * B * S * 2 * 3}
    assert cost.row_bytes == cost.rows * 16


def test_data_parallel_ranks_reduce_gradients_and_may_split_optimizer_state() -> None:
    run = shape(site(2, engram=ENGRAM), data=4, world_size=4)
    [cost] = stage_costs(run, TEXT)
    [reduced] = cost.collectives
    assert (reduced.name, reduced.handed) == ("all-reduce of gradients", (cost.dense + cost.table) * 4)
    assert reduced.on_the_wire == pytest.approx(2 * reduced.handed * 3 / 4)
    split = replace(run, distributed_optimizer=True)
    assert state_bytes(100, run) - state_bytes(100, split) == 100 * 12 * 3 / 4
    names = [one.name for one in stage_costs(split, TEXT)[0].collectives]
    assert names == ["reduce-scatter of gradients", "all-gather of parameters"]


def test_rows_that_are_trained_are_parameters_and_not_gathered() -> None:
    trained = replace(GRAFT, trained_rows=50)
    [cost] = stage_costs(shape(site(2, graft=trained)), TEXT)
    assert cost.table == 50 * 16
    assert cost.rows == cost.row_bytes == 0


def test_operations_of_a_site() -> None:
    assert forward_flops(shape(site(2, graft=GRAFT, engram=ENGRAM))) == 4 * H * (16 + 12) + 2 * H * 5
