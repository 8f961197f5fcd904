"""Uneven slices of a table in a checkpoint: they tile it, none is empty, and each is saved once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_graft.errors import ConfigError
from megatron_graft.memory.sharding import sharded_slice, sharded_whole


@dataclass
class Rank:
    """Stands for a process group: Megatron asks it for nothing but these two."""

    number: int
    of: int = 1

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.of


@pytest.fixture(autouse=True)
def _as_if_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group Megatron takes every rank for 0."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)


def ranges(total: int, parts: int) -> list[tuple[int, int]]:
    """First row and number of rows of each rank."""
    lengths = [total // parts + (part < total % parts) for part in range(parts)]
    return [(sum(lengths[:part]), length) for part, length in enumerate(lengths)]


def table_shards(total: int, parts: int, data_parallel: int = 1, dtype: torch.dtype = torch.float32) -> list[Any]:
    whole = torch.arange(total * 3, dtype=torch.float32).view(total, 3).to(dtype)
    return [
        sharded_slice(
            "table", torch.nn.Parameter(whole[first : first + length]), axis=0, first=first, total=total,
            tp_group=Rank(part, parts), dp_cp_group=Rank(copy, data_parallel),
        )
        for part, (first, length) in enumerate(ranges(total, parts))
        for copy in range(data_parallel)
    ]  # fmt: skip


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 101, 646_403])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 8])
def test_slices_tile_the_table_and_none_is_empty(total: int, parts: int) -> None:
    if parts > total:
        with pytest.raises(ConfigError, match=r"rank .*--tensor-model-parallel-size"):
            table_shards(total, parts)
        return
    shards = table_shards(total, parts)
    covered = torch.zeros(total, dtype=torch.int64)
    for shard in shards:
        assert shard.global_shape == (total, 3)
        assert shard.data.shape == shard.local_shape
        assert shard.local_shape[0] > 0
        rows, columns = shard.global_slice()
        assert (columns.start, columns.stop) == (0, 3)
        assert torch.equal(shard.data[:, 0].long(), torch.arange(rows.start, rows.stop) * 3)
        covered[rows] += 1
    assert bool((covered == 1).all())


def test_slices_need_no_regular_grid() -> None:
    assert not any(shard.has_regular_grid for shard in table_shards(7, 2))


def test_each_slice_is_saved_by_one_data_parallel_rank() -> None:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    shards = table_shards(7, 2, data_parallel=3)
    saved = [shard for shard in shards if is_main_replica(shard.replica_id)]
    assert [shard.global_offset for shard in saved] == [(0, 0), (4, 0)]
    assert len({(shard.global_offset, shard.replica_id) for shard in shards}) == len(shards) == 6


def test_a_slice_is_the_parameter_itself_so_that_the_optimizer_finds_its_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    shard = sharded_slice("t", parameter, axis=0, first=0, total=2, tp_group=Rank(0), dp_cp_group=Rank(0))
    assert shard.data is parameter
    assert shard.dtype == torch.bfloat16


def test_columns_can_be_cut_as_well() -> None:
    columns = torch.ones(5, 2)
    shard = sharded_slice("w", columns, axis=1, first=3, total=7, tp_group=Rank(1, 3), dp_cp_group=Rank(0))
    assert (shard.global_shape, shard.global_offset, shard.local_shape) == ((5, 7), (0, 3), (5, 2))


@pytest.mark.parametrize(("first", "total"), [(-1, 7), (6, 7), (0, 1)])
def test_a_slice_outside_the_table_is_refused(first: int, total: int) -> None:
    with pytest.raises(ConfigError, match=f"elements {first} to {first + 2} of {total}"):
        sharded_slice("t", torch.ones(2, 3), axis=0, first=first, total=total, tp_group=None, dp_cp_group=None)


def test_a_copied_tensor_is_saved_by_one_rank_of_both_groups() -> None:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    copies = [
        sharded_whole("norm", torch.ones(4), tp_group=Rank(tensor, 2), dp_cp_group=Rank(data, 2))
        for tensor in range(2)
        for data in range(2)
    ]
    assert [is_main_replica(copy.replica_id) for copy in copies] == [True, False, False, False]
    assert {copy.global_shape for copy in copies} == {(4,)}
