import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.look_ahead import CHUNK, SEQUENCE_NUMBER, Batch, LookAhead
from megatron_graft.data.memory_layout import MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.transfer import HostTransfer
from tests.helpers.banks import make_bank
from tests.helpers.memories import contents, engram_reading, graft_reading, layout_of, small_memory, small_tables


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank", {(1, 2): 3, (2, 3): 2, (1, 2, 3): 1})


def look_ahead_over(bank: Bank | None, depth: int = 2) -> LookAhead:
    """Of a site that reads the bank, and a hashed table where that has no match."""
    if bank is None:
        return LookAhead([None], HostTransfer(), depth)
    engram = small_tables()
    site = SiteReading(layer_number=2, graft=graft_reading(bank), engram=engram_reading(engram), exclusive=True)
    memory = small_memory(site, banks=[bank], engram=engram)
    return LookAhead([memory.fetcher(layout_of(memory))], HostTransfer(), depth)


def taken(look_ahead: LookAhead, batch: Batch) -> MicroBatchMemory:
    """The memory of a batch of one sequence of four tokens."""
    memory = look_ahead.take(batch)
    fetcher = look_ahead.fetchers[batch[CHUNK]]
    assert memory is not None and fetcher is not None
    layout: MemoryLayout = fetcher.layout
    return MicroBatchMemory.unpack(layout, *memory, 1, 4)


def batches(count: int) -> list[Batch]:
    return [{"tokens": torch.tensor([[1, 2, 3, number + 4]])} for number in range(count)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "graft-look-ahead"]


def test_batches_come_in_order_with_numbers_and_their_own_memory(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    numbers = []
    for position, batch in enumerate(look_ahead.stream(batches(7))):
        assert batch["tokens"][0, 3] == position + 4
        memory = taken(look_ahead, batch)
        assert memory.sequence_number == batch[SEQUENCE_NUMBER]
        assert memory.order_BS(0).tolist() == [[0, 2, 3, 0]]
        assert (memory.reads_BSh(0)[..., 0] > 0).tolist() == [[True, False, False, True]]
        assert memory.exchange.sum() > 0
        numbers.append(batch[SEQUENCE_NUMBER])
    assert numbers == list(range(7))


def test_two_streams_never_share_a_number(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    train, valid = look_ahead.stream(batches(5)), look_ahead.stream(batches(5))
    numbers = [next(stream)[SEQUENCE_NUMBER] for _ in range(5) for stream in (train, valid)]
    assert len(set(numbers)) == 10


def test_a_replayed_batch_gets_the_same_memory_again(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    batch = next(look_ahead.stream(batches(1)))
    first, again = taken(look_ahead, batch), taken(look_ahead, batch)
    assert again.packed is not first.packed
    assert torch.equal(again.header, first.header)
    assert contents(again) == contents(first)


def test_a_rank_without_sites_reads_tokens_and_fetches_nothing() -> None:
    look_ahead = look_ahead_over(None)
    batch = next(look_ahead.stream(batches(1)))
    assert look_ahead.take(batch) is None
    assert look_ahead.drain_statistics().fetch_seconds == 0


def test_no_more_than_the_depth_is_read_ahead() -> None:
    read: list[int] = []

    def source() -> Iterator[Batch]:
        for number in range(100):
            read.append(number)
            yield {"tokens": torch.zeros(1, 4, dtype=torch.int64)}

    stream = look_ahead_over(None, depth=3).stream(source())
    next(stream)
    deadline = time.monotonic() + 5
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # long enough for a faulty thread to run on
    assert len(read) == 5  # one handed out, three waiting, one in the thread's hands


def test_what_nobody_took_is_let_go_and_found_again_if_it_is_taken_after_all(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    first, second = look_ahead.stream(batches(6)), look_ahead.stream(batches(6))
    passed = [next(first) for _ in range(5)]
    waiting = next(second)
    assert set(look_ahead._tickets) == {passed[-1][SEQUENCE_NUMBER], waiting[SEQUENCE_NUMBER]}
    for batch in (*passed, waiting):
        assert taken(look_ahead, batch).sequence_number == batch[SEQUENCE_NUMBER]
    assert not look_ahead._tickets


def test_an_error_of_the_loader_reaches_the_consumer_and_stays() -> None:
    def source() -> Iterator[Batch]:
        yield batches(1)[0]
        raise OSError("the disk is gone")

    stream = look_ahead_over(None).stream(source())
    next(stream)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(stream)


def test_the_end_is_the_end() -> None:
    stream = look_ahead_over(None).stream(batches(2))
    assert len(list(stream)) == 2
    with pytest.raises(StopIteration):
        next(stream)


def test_dropping_a_stream_ends_its_thread() -> None:
    stream = look_ahead_over(None).stream(batches(50))
    next(stream)
    thread = stream._thread
    assert thread is not None and thread in readers()
    del stream
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_waiting_for_a_slow_source_is_reported_as_stall() -> None:
    def source() -> Iterator[Batch]:
        for batch in batches(3):
            time.sleep(0.1)
            yield batch

    look_ahead = look_ahead_over(None)
    assert len(list(look_ahead.stream(source()))) == 3
    statistics = look_ahead.drain_statistics()
    assert statistics.stall_seconds > 0.2
    assert statistics.micro_batches == 3


def test_statistics_count_training_and_not_validation(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    for stream in (look_ahead.stream(batches(4)), look_ahead.stream(batches(7), counted=False)):
        for batch in stream:
            look_ahead.take(batch)
    statistics = look_ahead.drain_statistics()
    assert [orders.tolist() for orders in statistics.counts.orders] == [[8, 0, 4, 4]]
    assert statistics.counts.graft_rows == 8
    assert statistics.counts.engram_requests == 4 * 2 * 6  # two misses of six heads in each
    assert 0 < statistics.counts.engram_rows <= statistics.counts.engram_requests
    assert statistics.micro_batches == 4
    assert statistics.fetch_seconds > 0
    fresh = look_ahead.drain_statistics().counts
    assert (int(fresh.orders[0].sum()), fresh.graft_rows, fresh.engram_requests, fresh.engram_rows) == (0, 0, 0, 0)


def test_drained_statistics_are_not_counted_on(bank: Bank) -> None:
    look_ahead = look_ahead_over(bank)
    stream = look_ahead.stream(batches(3))
    next(stream)
    first = look_ahead.drain_statistics()
    list(stream)
    assert first.counts.orders[0].tolist() == [2, 0, 1, 1]
    assert look_ahead.drain_statistics().counts.orders[0].tolist() == [4, 0, 2, 2]


# The process ends in the middle of a batch, and takes longer to end than the batch.
ENDING = """
import sys, threading, time, torch
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(3)
slow = Slow()
from megatron_graft.bank.reader import open_bank
from megatron_graft.data.look_ahead import LookAhead
from megatron_graft.data.transfer import HostTransfer
from tests.helpers.memories import SiteReading, graft_reading, layout_of, small_memory
bank = open_bank(sys.argv[1])
memory = small_memory(SiteReading(layer_number=2, graft=graft_reading(bank)), banks=[bank])
look_ahead = LookAhead([memory.fetcher(layout_of(memory))], HostTransfer(), 1)
few, many = (torch.ones(size, 4096, dtype=torch.int64) for size in (1, 2000))
(index,), looking = memory.indexes, threading.Event()
def lookup(tokens, *, original=index.lookup, **options):
    if tokens.shape == many.shape:
        looking.set()
    return original(tokens, **options)
index.lookup = lookup
stream = look_ahead.stream([{"tokens": few}, {"tokens": many}, {"tokens": many}])
next(stream)
looking.wait()
"""


def test_a_process_that_ends_while_it_looks_ahead_ends_well(bank: Bank) -> None:
    """The interpreter would abort it: a thread in native code finds no interpreter to come back to."""
    ended = subprocess.run([sys.executable, "-c", ENDING, str(bank.path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
