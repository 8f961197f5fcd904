"""One site: the equations, what it may never do, and every kind of site against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout
from megatron_graft.data.memory_layout import GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.memory.site import MemorySite
from megatron_graft.memory.statistics import summary
from tests.helpers.memories import HIDDEN, model_config, randomise, small_site

POSITIONS, SEQUENCES = 10, 2
BFLOAT16 = RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(6,))
INT8 = RowLayout(dtype=ROW_DTYPES["int8"], widths=(4, 2))


def reading_of(row_layout: RowLayout, layer_number: int = 2) -> SiteReading:
    graft = GraftReading(bank=0, columns=(0, 6), row_layout=row_layout, max_order=3)
    return SiteReading(layer_number=layer_number, graft=graft)


def make_site(
    *, layer_number: int = 2, randomised: bool = False, row_layout: RowLayout = BFLOAT16, **changes: Any
) -> MemorySite:
    site = small_site(reading_of(row_layout, layer_number), **changes)
    if randomised:
        randomise(site)
    return site


def ask(site: MemorySite, hidden: torch.Tensor, memory: MicroBatchMemory) -> torch.Tensor:
    answer: torch.Tensor = site(hidden, memory.packed, memory.exchange)
    return answer


def allocate(row_layout: RowLayout) -> MicroBatchMemory:
    return MicroBatchMemory.allocate(MemoryLayout.of([reading_of(row_layout)], Partition()), 0, SEQUENCES, POSITIONS)


def make_memory(orders: list[list[int]]) -> MicroBatchMemory:
    """One distinct random row per hit; the whole sequence is one document."""
    memory = allocate(BFLOAT16)
    rows_PD = memory.rows_PR(0).view(torch.bfloat16)
    rows_PD[1:] = torch.randn(rows_PD[1:].shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    return with_orders(memory, orders)


def make_scaled_memory(orders: list[list[int]]) -> tuple[MicroBatchMemory, torch.Tensor]:
    """The same with int8 rows; and what the rows mean, float32 ``[P + 1, D]``."""
    memory = allocate(INT8)
    generator = torch.Generator().manual_seed(2)
    elements = torch.randint(-127, 128, (SEQUENCES * POSITIONS + 1, 6), generator=generator, dtype=torch.int8)
    scales = torch.rand(len(elements), 2, generator=generator)
    elements[0], scales[0] = 0, 0
    memory.rows_PR(0)[:, :6] = elements.view(torch.uint8)
    memory.rows_PR(0)[:, 8:] = scales.view(torch.uint8)
    return with_orders(memory, orders), elements * torch.repeat_interleave(scales, torch.tensor([4, 2]), dim=1)


def with_orders(memory: MicroBatchMemory, orders: list[list[int]]) -> MicroBatchMemory:
    memory.order_BS(0)[:] = torch.tensor(orders, dtype=torch.uint8)
    numbered = torch.arange(1, SEQUENCES * POSITIONS + 1, dtype=torch.int32).view(SEQUENCES, POSITIONS)
    memory.inverse_BS(0)[:] = torch.where(memory.order_BS(0) > 0, numbered, 0)
    memory.position_BS[:] = torch.arange(POSITIONS, dtype=torch.int32)
    return memory


HITS_FROM_POSITION_4 = [[0] * 4 + [2] * 6, [0] * 4 + [3] * 6]


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(POSITIONS, SEQUENCES, HIDDEN, generator=torch.Generator().manual_seed(3))


def test_a_fresh_site_is_the_identity_bit_for_bit_and_passes_gradients_through_unchanged(hidden: torch.Tensor) -> None:
    hidden.requires_grad_()
    out = ask(make_site(), hidden, make_memory(HITS_FROM_POSITION_4))
    assert torch.equal(out, hidden)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * weights).sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, weights)


def test_a_site_of_a_bf16_model_answers_in_bf16(hidden: torch.Tensor) -> None:
    site = make_site(model=model_config(params_dtype=torch.bfloat16))
    out = ask(site, hidden.bfloat16(), make_memory(HITS_FROM_POSITION_4))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, hidden.bfloat16())


def test_a_fresh_site_can_learn(hidden: torch.Tensor) -> None:
    site = make_site()
    (ask(site, hidden, make_memory(HITS_FROM_POSITION_4)) ** 2).sum().backward()
    assert site.graft.value_weight.grad is not None and site.graft.value_weight.grad.any()


def test_scaled_rows_get_no_gradient_and_parameters_do(hidden: torch.Tensor) -> None:
    site = make_site(randomised=True, row_layout=INT8)
    memory, _ = make_scaled_memory(HITS_FROM_POSITION_4)
    stored = memory.packed.clone()
    (ask(site, hidden, memory) ** 2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in site.parameters())
    assert memory.packed.grad is None and torch.equal(memory.packed, stored)


def test_a_miss_adds_exactly_nothing(hidden: torch.Tensor) -> None:
    out = ask(make_site(conv_kernel=0, randomised=True), hidden, make_memory(HITS_FROM_POSITION_4))
    assert torch.equal(out[:4], hidden[:4])
    assert (out[4:] - hidden[4:]).abs().amin() > 0


def test_the_convolution_carries_a_hit_to_later_misses_only(hidden: torch.Tensor) -> None:
    orders = [[0] * POSITIONS, [0] * POSITIONS]
    orders[0][4] = 2
    delta = ask(make_site(randomised=True), hidden, make_memory(orders)) - hidden
    reached = delta.abs().amax(dim=-1) > 0
    assert reached[:, 0].nonzero().flatten().tolist() == [4, 6, 8]  # dilation 2; the fourth tap leaves the sequence
    assert not reached[:, 1].any()


def test_the_convolution_stops_at_a_document_start(hidden: torch.Tensor) -> None:
    orders = [[0] * POSITIONS, [0] * POSITIONS]
    orders[0][4] = 2
    memory = make_memory(orders)
    memory.position_BS[0, 7:] -= 7
    delta = ask(make_site(randomised=True), hidden, memory) - hidden
    assert delta[:, 0].abs().amax(dim=-1).nonzero().flatten().tolist() == [4, 6]


def test_equals_the_equations_written_out(hidden: torch.Tensor) -> None:
    site, memory = make_site(conv_kernel=0, randomised=True), make_memory(HITS_FROM_POSITION_4)
    out = ask(site, hidden, memory)
    t, b = 6, 1
    row = memory.rows_PR(0).view(torch.bfloat16)[int(memory.inverse_BS(0)[b, t])].float()
    assert torch.allclose(out[t, b], by_the_equations(site, row, hidden[t, b]), atol=1e-6)


def test_scaled_rows_mean_element_times_scale(hidden: torch.Tensor) -> None:
    site = make_site(conv_kernel=0, randomised=True, row_layout=INT8)
    memory, values_PD = make_scaled_memory(HITS_FROM_POSITION_4)
    out = ask(site, hidden, memory)
    assert torch.equal(out[:4], hidden[:4])
    for t, b in ((4, 0), (9, 1)):
        row = values_PD[int(memory.inverse_BS(0)[b, t])]
        assert torch.allclose(out[t, b], by_the_equations(site, row, hidden[t, b]), rtol=1e-5, atol=1e-5)


def by_the_equations(site: MemorySite, row: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The hidden state of one position after a site without convolution."""

    def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean() + 1e-5).sqrt() * weight

    k, v = site.graft.key_weight @ row, site.graft.value_weight @ row
    gate = torch.sigmoid(rms_norm(k, site.key_norm) @ rms_norm(h, site.query_norm) / HIDDEN**0.5)
    return h + gate * v


def test_bypassed_is_the_identity_whatever_the_weights(hidden: torch.Tensor) -> None:
    site = make_site(randomised=True)
    site.bypassed = True
    assert ask(site, hidden, make_memory(HITS_FROM_POSITION_4)) is hidden


def test_statistics_count_hits_gates_and_relative_change(hidden: torch.Tensor) -> None:
    site, memory = make_site(conv_kernel=0, randomised=True), make_memory(HITS_FROM_POSITION_4)
    out = ask(site, hidden, memory).detach()
    gates = torch.sigmoid(site._logit(site._read(memory)[0], hidden))[4:].detach()
    sums = site.statistics.drain(torch.device("cpu")).tolist()
    assert (sums[0], sums[2]) == (12, 20)  # positions that read, and all
    found = summary(sums)
    assert found["gate_mean"] == pytest.approx(float(gates.mean()), rel=1e-5)
    relative = (out - hidden).norm(dim=-1) / hidden.norm(dim=-1)
    assert found["delta_ratio"] == pytest.approx(float(relative.mean()), rel=1e-5)
    assert 1 < found["participation"] < HIDDEN
    assert not site.statistics.drain(torch.device("cpu")).any()


def test_evaluation_is_not_counted(hidden: torch.Tensor) -> None:
    site = make_site(randomised=True).eval()
    ask(site, hidden, make_memory(HITS_FROM_POSITION_4))
    assert not site.statistics.drain(torch.device("cpu")).any()


def test_nothing_of_the_bank_is_a_parameter_or_in_the_state() -> None:
    norms = {"key_norm", "query_norm", "conv_norm"}
    names = {"graft.key_weight", "graft.value_weight", "conv_kernel", *norms}
    site = make_site()
    assert set(site.state_dict()) == names
    assert {name for name, _ in site.named_parameters()} == names
