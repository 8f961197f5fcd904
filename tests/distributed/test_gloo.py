"""Collectives over parts of different sizes, which gloo itself refuses."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_graft.compat.gloo import rebind_collectives
from tests.helpers.ports import free_port

LENGTHS = (3, 0, 5)


def exchange(rank: int, port: int, rebound: bool) -> None:
    """One of three processes: each gives its part and gets all; each gives all and gets its part summed."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    dist.init_process_group("gloo")
    if rebound:
        rebind_collectives()
    mine = torch.full((LENGTHS[rank], 2), float(rank))
    parts = [torch.empty(length, 2) for length in LENGTHS]
    given = [torch.full((length, 2), float(10 * rank + part)) for part, length in enumerate(LENGTHS)]
    kept = [part.clone() for part in given]
    summed = torch.empty(LENGTHS[rank], 2)
    try:
        dist.all_gather(parts, mine)
    except RuntimeError:
        assert not rebound
        return
    dist.reduce_scatter(summed, given)
    assert rebound
    assert all(bool((part == source).all()) for source, part in enumerate(parts))
    assert bool((summed == 30 + 3 * rank).all())
    assert all(torch.equal(part, before) for part, before in zip(given, kept, strict=True))
    even = [torch.empty(2) for _ in LENGTHS]
    dist.all_gather(even, torch.full((2,), float(rank)))
    assert [part[0].item() for part in even] == [0, 1, 2]
    dist.destroy_process_group()


def test_parts_and_sums_of_different_sizes_arrive() -> None:
    mp.spawn(exchange, (free_port(), True), nprocs=3)


def test_gloo_itself_still_refuses_them() -> None:
    mp.spawn(exchange, (free_port(), False), nprocs=3)
