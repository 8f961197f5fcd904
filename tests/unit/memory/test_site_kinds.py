"""Every kind of site, from tokens to gradients, against the oracle; and what its two memories leave to each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.memory.site import MemorySite
from megatron_graft.memory.statistics import summary
from megatron_graft.training.memory_setup import RunMemory
from tests.helpers.memories import (
    HIDDEN,
    engram_reading,
    graft_reading,
    layout_of,
    model_config,
    random_tokens,
    randomise,
    small_bank,
    small_memory,
    small_site,
    small_tables,
)
from tests.helpers.site_oracle import SiteOracle

KINDS = ["bank", "table", "exclusive", "sum"]
GATES = ["plain", "signed-sqrt"]
CONVOLUTIONS = [(0, 1), (4, 2), (3, 5), (1, 1)]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("site") / "bank")


@dataclass
class World:
    """A site of random weights in float64, and a micro-batch."""

    memory: RunMemory
    site: MemorySite
    tokens: torch.Tensor
    hidden: torch.Tensor
    fetched: MicroBatchMemory

    def answer(self) -> torch.Tensor:
        """``[S, B, H]``, the site's."""
        answer: torch.Tensor = self.site(self.hidden, self.fetched.packed, self.fetched.exchange)
        return answer

    def expected(self) -> torch.Tensor:
        """The oracle's."""
        oracle = SiteOracle(self.memory)
        oracle.tokens_BS = self.tokens.tolist()
        return oracle.forward(self.site, self.hidden)

    def gradients(self, answer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Of a weighted sum of the answer: name and gradient of the hidden states and of every parameter."""
        weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        named = {"hidden": self.hidden, **dict(self.site.named_parameters())}
        return zip(named, torch.autograd.grad((answer * weights).sum(), list(named.values())), strict=True)

    def hits_SB(self) -> torch.Tensor:
        """Where the bank has a match."""
        hits = self.fetched.order_BS(0).t() > 0
        assert 0 < hits.sum() < hits.numel()
        return hits


def make_world(
    bank: Bank,
    kind: str,
    tokens: torch.Tensor | None = None,
    *,
    across: bool = False,
    hidden: int = HIDDEN,
    **site: Any,
) -> World:
    tokens = random_tokens(8, 2, 18) if tokens is None else tokens
    engram = None if kind == "bank" else small_tables(across_documents=across)
    reading = SiteReading(
        layer_number=2,
        graft=None if kind == "table" else graft_reading(bank, 0, (3, 9)),
        engram=engram_reading(engram) if engram else None,
        exclusive=kind == "exclusive",
    )
    memory = small_memory(reading, banks=[] if kind == "table" else [bank], engram=engram, **site)
    model = model_config(params_dtype=torch.float64, hidden_size=hidden)
    built = small_site(reading, model=model, **site)
    randomise(built)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(tokens.shape[1], len(tokens), hidden, generator=generator, dtype=torch.float64)
    fetched = memory.fetcher(layout_of(memory)).fetch(tokens, 0).memory
    return World(memory, built, tokens, states.requires_grad_(), fetched)


@pytest.mark.parametrize(("kernel", "dilation"), CONVOLUTIONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("kind", "across"), [*((kind, False) for kind in KINDS), ("table", True), ("exclusive", True)])
def test_answers_and_gradients_are_the_oracles(
    bank: Bank, kind: str, across: bool, gate: str, kernel: int, dilation: int
) -> None:
    world = make_world(bank, kind, across=across, gate=gate, conv_kernel=kernel, conv_dilation=dilation)
    answer, expected = world.answer(), world.expected()
    assert torch.allclose(answer, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(answer, world.hidden, atol=1e-2)
    for (name, found), (_, wanted) in zip(world.gradients(answer), world.gradients(expected), strict=True):
        assert wanted.any(), name
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(bank: Bank, kind: str, gate: str) -> None:
    world = make_world(bank, kind, random_tokens(8, 2, 6), hidden=4, gate=gate)
    world.site.eval()
    names, values = zip(*world.site.named_parameters(), strict=True)
    memory = (world.fetched.packed, world.fetched.exchange)

    def answer(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, parameters, strict=True))
        out: torch.Tensor = torch.func.functional_call(world.site, given, (hidden, *memory))
        return out

    assert torch.autograd.gradcheck(answer, (world.hidden, *values), fast_mode=False)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_site_of_every_kind_is_the_identity_and_can_learn(bank: Bank, kind: str, gate: str) -> None:
    world = make_world(bank, kind, gate=gate)
    fresh = small_site(world.site.site.reading, model=world.site.config, gate=gate)
    world.site = fresh
    answer = world.answer()
    assert torch.equal(answer, world.hidden)
    gradients = dict(world.gradients(answer))
    learning = [gradient for name, gradient in gradients.items() if name.endswith("value_weight")]
    assert learning and all(gradient.any() for gradient in learning)


def changed(world: World, prefix: str) -> torch.Tensor:
    """Bool ``[S, B]``: where the answer is another when the parameters of one reader are."""
    with torch.no_grad():
        before = world.answer()
        for name, parameter in world.site.named_parameters():
            if name.startswith(prefix):
                parameter.mul_(1.5)
        return (world.answer() != before).any(dim=-1)


def test_an_exclusive_site_leaves_hits_to_the_bank_and_misses_to_the_table(bank: Bank) -> None:
    world = make_world(bank, "exclusive", conv_kernel=0)
    hits = world.hits_SB()
    assert torch.equal(changed(world, "graft."), hits)
    assert torch.equal(changed(world, "engram."), ~hits)


def test_a_summing_site_reads_the_table_everywhere_and_the_bank_at_hits(bank: Bank) -> None:
    world = make_world(bank, "sum", conv_kernel=0)
    hits = world.hits_SB()
    assert torch.equal(changed(world, "graft."), hits)
    assert changed(world, "engram.").all()


def test_a_site_without_a_table_adds_exactly_nothing_at_a_miss_whatever_its_gate(bank: Bank) -> None:
    for gate in GATES:
        world = make_world(bank, "bank", conv_kernel=0, gate=gate)
        unchanged = (world.answer() == world.hidden).all(dim=-1)
        assert torch.equal(unchanged, ~world.hits_SB())


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(bank: Bank, kind: str) -> None:
    tokens = random_tokens(8, 2, 18).clamp_min(1)
    other = tokens.clone()
    other[:, 9] = tokens[:, 9] % 10 + 1
    first, second = (make_world(bank, kind, batch).answer() for batch in (tokens, other))
    assert torch.equal(first[:9], second[:9])
    assert not torch.equal(first[9:], second[9:])


@pytest.mark.parametrize("kind", ["bank", "table", "exclusive", "sum"])
def test_nothing_crosses_a_document_start_unless_it_is_let(bank: Bank, kind: str) -> None:
    tokens = random_tokens(8, 2, 18).clamp_min(1)
    tokens[:, 8] = 0  # ends a document
    other = tokens.clone()
    other[:, :8] = tokens[:, :8] % 10 + 1
    first, second = (make_world(bank, kind, batch).answer() for batch in (tokens, other))
    assert torch.equal(first[9:], second[9:])
    if kind != "bank":
        first, second = (make_world(bank, kind, batch, across=True).answer() for batch in (tokens, other))
        assert not torch.equal(first[9:], second[9:])


@pytest.mark.parametrize(("kind", "positions"), [("bank", "hits"), ("table", "all"), ("exclusive", "all")])
def test_gates_are_counted_where_either_memory_is_read(bank: Bank, kind: str, positions: str) -> None:
    world = make_world(bank, kind, conv_kernel=0)
    world.answer()
    sums = world.site.statistics.drain(torch.device("cpu")).tolist()
    assert sums[0] == (world.hits_SB().sum() if positions == "hits" else world.tokens.numel())
    assert 0 < summary(sums)["gate_mean"] < 1
