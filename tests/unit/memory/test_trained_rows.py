"""Sites that train rows under a bank's keys: what the rows start as, what is read of them and what comes back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.compat.parameter_groups import ROWS_RATE, SITE_RATE, TABLE_ATTRIBUTE, TABLE_RATE
from megatron_graft.data.memory_layout import SiteReading
from megatron_graft.data.partition import Partition
from megatron_graft.memory.initialisation import _ROWS_PER_BLOCK as BLOCK
from megatron_graft.memory.initialisation import BankValues
from megatron_graft.memory.site import MemorySite
from tests.helpers.memories import (
    engram_reading,
    graft_reading,
    layout_of,
    model_config,
    random_tokens,
    randomise,
    ranks,
    small_bank,
    small_memory,
    small_site,
    small_tables,
)
from tests.helpers.site_oracle import SiteOracle

COLUMNS = (3, 9)
KINDS = ["bank", "exclusive", "sum"]
STARTS = ["trained", "fresh"]


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("rows") / "bank", row_dtype=request.param)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(8, 2, 18)


def reading_of(bank: Bank, kind: str = "bank", *, trained: bool = True) -> SiteReading:
    graft = dataclasses.replace(graft_reading(bank, 0, COLUMNS), trained_rows=bank.num_rows if trained else None)
    table = None if kind == "bank" else engram_reading(small_tables())
    return SiteReading(layer_number=2, graft=graft, engram=table, exclusive=kind == "exclusive")


def start_of(bank: Bank, start: str) -> dict[str, Any]:
    return {"row_values": BankValues(bank, COLUMNS)} if start == "trained" else {}


def site_of(bank: Bank, start: str, kind: str = "bank", place: Partition | None = None, **model: Any) -> MemorySite:
    place = place or Partition()
    model = {"sequence_parallel": place.sequence_parallel} | model
    return small_site(reading_of(bank, kind), place, model=model_config(**model), **start_of(bank, start))


class World:
    """A site of random weights in float64, or a fresh one, and a micro-batch for it."""

    def __init__(self, bank: Bank, start: str, kind: str, tokens: torch.Tensor, *, randomised: bool = True) -> None:
        self.site = site_of(bank, start, kind, params_dtype=torch.float64)
        if randomised:
            randomise(self.site)
        engram = None if kind == "bank" else small_tables()
        self.memory = small_memory(self.site.site.reading, banks=[bank], engram=engram)
        self.tokens = tokens
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(18, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        self.fetched = self.memory.fetcher(layout_of(self.memory)).fetch(tokens, 0).memory

    @property
    def number(self) -> int:
        """Of the exchange of the site's rows."""
        number = self.site.layout.trained_of(self.site.site.reading)
        assert number is not None
        return number

    def answer(self) -> torch.Tensor:
        answer: torch.Tensor = self.site(self.hidden, self.fetched.packed, self.fetched.exchange)
        return answer

    def expected(self) -> torch.Tensor:
        """The oracle's, which finds rows by trying every key; the values of the rows are the table's."""
        oracle = SiteOracle(self.memory)
        table = self.site.graft.table
        before, after = (table.new_zeros(len(table), width) for width in (COLUMNS[0], 10 - COLUMNS[1]))
        oracle.banks[0].rows = torch.cat([before, table, after], dim=1)
        oracle.tokens_BS = self.tokens.tolist()
        return oracle.forward(self.site, self.hidden)

    def gradients(self, answer: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        named = {"hidden": self.hidden, **dict(self.site.named_parameters())}
        found = torch.autograd.grad((answer * weights).sum(), list(named.values()))
        return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_answers_and_gradients_are_the_oracles(bank: Bank, start: str, kind: str, tokens: torch.Tensor) -> None:
    world = World(bank, start, kind, tokens)
    answer, expected = world.answer(), world.expected()
    assert torch.allclose(answer, expected, rtol=1e-10, atol=1e-12)
    found, wanted = world.gradients(answer), world.gradients(expected)
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name
    read = torch.zeros(bank.num_rows, dtype=torch.bool)
    asked = world.fetched.used(f"requests.{world.number}")
    read[world.fetched.requests(world.number)[:asked].long()] = True
    assert 0 < read.sum() < len(read), "the test must leave rows unread"
    assert torch.equal(found["graft.table"].any(dim=1), read)


@pytest.mark.parametrize("kind", KINDS)
def test_before_a_row_is_trained_the_site_is_the_one_of_frozen_rows(
    bank: Bank, kind: str, tokens: torch.Tensor
) -> None:
    """With any projections: the same weights on the same rows, hence the same numbers to the last bit."""
    world = World(bank, "trained", kind, tokens, randomised=False)
    frozen = small_site(reading_of(bank, kind, trained=False), model=world.site.config)
    memory = small_memory(frozen.site.reading, banks=[bank], engram=None if kind == "bank" else small_tables())
    fetched = memory.fetcher(layout_of(memory)).fetch(tokens, 0).memory
    shared = dict(world.site.named_parameters())
    table = shared.pop("graft.table")
    fresh = dict(frozen.named_parameters())
    assert fresh.keys() == shared.keys()
    assert all(torch.equal(value, fresh[name]) for name, value in shared.items()), "every other start value is the same"
    rows = torch.from_numpy(bank.float_rows(np.arange(bank.num_rows), COLUMNS))
    assert torch.equal(table, rows.double())
    randomise(frozen)
    with torch.no_grad():
        for name, value in shared.items():
            value.copy_(fresh[name])
    expected = frozen(world.hidden, fetched.packed, fetched.exchange)
    assert not torch.equal(expected, world.hidden)
    assert torch.equal(world.answer(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", STARTS)
def test_a_fresh_site_is_the_identity_and_can_learn(bank: Bank, start: str, kind: str, tokens: torch.Tensor) -> None:
    world = World(bank, start, kind, tokens, randomised=False)
    answer = world.answer()
    assert torch.equal(answer, world.hidden)
    gradients = world.gradients(answer)
    assert gradients["graft.value_weight"].any()
    assert not gradients["graft.table"].any(), "rows learn once the values are not zero"


def test_a_site_adds_exactly_nothing_at_a_miss(bank: Bank, tokens: torch.Tensor) -> None:
    world = World(bank, "fresh", "bank", tokens)
    with torch.no_grad():
        world.site.conv_kernel.zero_()
    unchanged = (world.answer() == world.hidden).all(dim=-1)
    misses = world.fetched.order_BS(0).t() == 0
    assert torch.equal(unchanged, misses)
    assert torch.equal(world.site.graft.active_SB(world.fetched, world.number), ~misses)


def test_trained_rows_start_as_the_banks_in_the_models_dtype(bank: Bank) -> None:
    values = torch.from_numpy(bank.float_rows(np.arange(bank.num_rows))[:, slice(*COLUMNS)])
    for dtype in (torch.float32, torch.bfloat16):
        table = site_of(bank, "trained", params_dtype=dtype).graft.table
        assert table.dtype == dtype
        assert torch.equal(table, values.to(dtype))


def test_only_the_rows_of_a_smaller_bank_are_trained(bank: Bank) -> None:
    part = open_bank(bank.path, rows=17)
    table = site_of(part, "trained").graft.table
    assert torch.equal(table, site_of(bank, "trained").graft.table[:17])


def test_a_banks_values_come_by_any_range(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Rows:
        """More rows than are read at once; row r is r, r + 0.5."""

        def float_rows(self, rows: np.ndarray, columns: tuple[int, int]) -> np.ndarray:
            assert len(rows) <= BLOCK and columns == (0, 2)
            return np.stack([rows, rows + 0.5], axis=1).astype(np.float32)

    values = BankValues(Rows(), (0, 2))  # type: ignore[arg-type]
    for first, end in ((0, 1), (5, 5), (3, BLOCK + 3), (BLOCK - 1, 2 * BLOCK + 7)):
        rows = torch.arange(first, end, dtype=torch.float32)
        assert torch.equal(values(first, end), torch.stack([rows, rows + 0.5], dim=1))


def test_fresh_rows_are_drawn_apart_from_the_hashed_table_and_from_other_layers(bank: Bank) -> None:
    drawn = site_of(bank, "fresh", "sum").graft.table.detach()
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)
    assert len(drawn.flatten().unique()) == drawn.numel()
    assert torch.equal(drawn, site_of(bank, "fresh").graft.table), "nor do they depend on whether there is one"
    hashed = site_of(bank, "fresh", "sum").engram.table
    assert not torch.isin(drawn, hashed).any()
    other = dataclasses.replace(reading_of(bank), layer_number=3)
    assert not torch.isin(drawn, small_site(other).graft.table).any()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_hold_shares_of_the_rows_and_start_from_the_same_values(bank: Bank, start: str, size: int) -> None:
    whole = site_of(bank, start)
    parts = [site_of(bank, start, place=place) for place in ranks(size, True)]
    assert torch.equal(torch.cat([part.graft.table for part in parts]), whole.graft.table)
    for part in parts:
        assert torch.equal(part.graft.key_weight, whole.graft.key_weight)
        table: Any = part.graft.table
        assert not table.sequence_parallel, "a share's gradients are complete"
        assert getattr(table, "tensor_model_parallel", False) == (size > 1)


@pytest.mark.parametrize("size", [1, 2])
def test_a_table_is_saved_as_whole_rows_under_the_sites_prefix(
    bank: Bank, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.memory.test_sharding import Rank

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    first = 0
    for place in ranks(size, True):
        site = site_of(bank, "fresh", place=place)
        site.tp_group = Rank(place.rank, size)
        entries = site.sharded_state_dict("memory.", (), {"dp_cp_group": Rank(0)})
        assert set(entries) == {f"memory.{name}" for name, _ in site.named_parameters()}
        entry = entries["memory.graft.table"]
        assert (entry.key, entry.data) == ("memory.graft.table", site.graft.table)
        assert (entry.global_shape, entry.global_offset) == ((bank.num_rows, 6), (first, 0))
        first += len(site.graft.table)
    assert first == bank.num_rows


@pytest.mark.parametrize("start", STARTS)
def test_every_parameter_is_in_one_group_of_learning_rates(bank: Bank, start: str) -> None:
    site = site_of(bank, start, "sum")
    groups = {"graft.table": ROWS_RATE, "engram.table": TABLE_RATE}
    for name, parameter in site.named_parameters():
        found = [rate for rate in (TABLE_RATE, ROWS_RATE, SITE_RATE) if hasattr(parameter, rate)]
        assert found == [groups.get(name, SITE_RATE)], name
        assert hasattr(parameter, TABLE_ATTRIBUTE) == (name in groups), name


def test_a_site_says_which_rows_it_reads(bank: Bank) -> None:
    frozen = small_site(reading_of(bank, trained=False))
    alone = small_site(SiteReading(layer_number=2, engram=engram_reading(small_tables())))
    sites = [frozen, alone, site_of(bank, "trained"), site_of(bank, "fresh")]
    assert [site.site.rows for site in sites] == ["frozen", None, "trained", "fresh"]
