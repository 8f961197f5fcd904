"""What sites start as: the same in every layout and beside every other memory, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.data.memory_layout import EngramReading, SiteReading
from megatron_graft.data.partition import Partition
from megatron_graft.memory.initialisation import _ROWS_PER_BLOCK as BLOCK
from megatron_graft.memory.initialisation import SiteSeed, site_parameter
from tests.helpers.memories import (
    engram_reading,
    graft_reading,
    model_config,
    ranks,
    small_bank,
    small_site,
    small_tables,
)


def seed_of(seed: int = 7, layer: int = 2, std: float = 0.02) -> SiteSeed:
    return SiteSeed(seed=seed, layer_number=layer, std=std)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return small_bank(tmp_path_factory.mktemp("initialisation") / "bank")


@pytest.fixture
def both(bank: Bank) -> SiteReading:
    return SiteReading(layer_number=2, graft=graft_reading(bank), engram=engram_reading(small_tables()))


def test_drawing_leaves_the_runs_generators_alone(both: SiteReading) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    small_site(both)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("other", [seed_of(seed=8), seed_of(layer=3)])
def test_a_draw_depends_on_seed_and_layer_and_is_repeatable(other: SiteSeed) -> None:
    assert torch.equal(seed_of().normal("part", 5, 3), seed_of().normal("part", 5, 3))
    assert not torch.equal(seed_of().normal("part", 5, 3), other.normal("part", 5, 3))
    assert torch.equal(seed_of().table_rows(0, 9, 3), seed_of().table_rows(0, 9, 3))
    assert not torch.equal(seed_of().table_rows(0, 9, 3), other.table_rows(0, 9, 3))


def test_parts_of_a_site_are_drawn_apart() -> None:
    assert not torch.equal(seed_of().normal("graft key_weight", 5, 3), seed_of().normal("engram key_weight", 5, 3))


def test_draws_are_normal_of_the_given_deviation() -> None:
    for drawn in (seed_of(std=0.3).normal("part", 300, 200), seed_of(std=0.3).table_rows(10, 20_010, 3)):
        assert drawn.dtype == torch.float32
        assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
        assert float(drawn.std()) == pytest.approx(0.3, rel=0.02)
        assert float((drawn.abs() < 0.3).float().mean()) == pytest.approx(0.6827, abs=0.01)


def test_a_parts_values_do_not_depend_on_whether_the_site_has_another(both: SiteReading) -> None:
    whole = small_site(both).state_dict()
    for alone in (
        SiteReading(layer_number=2, graft=both.graft), SiteReading(layer_number=2, engram=both.engram)
    ):  # fmt: skip
        state = small_site(alone).state_dict()
        assert set(state) < set(whole)
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


def test_random_values_are_all_different_and_the_rest_starts_at_zero_or_one(both: SiteReading) -> None:
    state = small_site(both).state_dict()
    drawn = torch.cat([state[name].flatten() for name in ("graft.key_weight", "engram.key_weight", "engram.table")])
    assert len(drawn.unique()) == len(drawn)
    for name in ("graft.value_weight", "engram.value_weight", "conv_kernel"):
        assert not state.pop(name).any(), name
    for name in ("key_norm", "query_norm", "conv_norm"):
        assert (state.pop(name) == 1).all(), name
    assert set(state) == {"graft.key_weight", "engram.key_weight", "engram.table"}


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize(("total", "size"), [(1, 1), (31, 4), (537, 2), (537, 3), (BLOCK, 2), (3 * BLOCK + 7, 2)])
def test_table_rows_drawn_by_shares_are_those_drawn_whole(total: int, size: int, width: int) -> None:
    whole = seed_of().table_rows(0, total, width)
    shares = [seed_of().table_rows(*place.table_rows(total), width) for place in ranks(size, False)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize(
    ("first", "end"), [(0, 1), (7, 7), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (3, 2 * BLOCK + 27)]
)
def test_any_range_of_a_table_can_be_drawn(first: int, end: int) -> None:
    whole = seed_of().table_rows(0, 2 * BLOCK + 28, 1)
    assert torch.equal(seed_of().table_rows(first, end, 1), whole[first:end])


def test_a_tables_rows_are_all_different() -> None:
    rows = seed_of().table_rows(0, 2 * BLOCK + 100, 4)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_layout_starts_from_the_same_values(both: SiteReading, size: int, sequence_parallel: bool) -> None:
    whole = small_site(both).state_dict()
    parts = [small_site(both, place).state_dict() for place in ranks(size, sequence_parallel)]
    for name, value in whole.items():
        slices = [part[name] for part in parts]
        if name == "engram.table":
            assert torch.equal(torch.cat(slices), value)
        elif name.endswith(("key_weight", "value_weight")) and not sequence_parallel:
            assert torch.equal(torch.cat(slices, dim=1), value)
        else:
            assert all(torch.equal(part, value) for part in slices), name


def tags(parameter: torch.nn.Parameter) -> tuple[bool, bool, int | None]:
    """Whether Megatron sums the gradient over ranks, whether it counts every rank in norms, and the split axis."""
    tagged: Any = parameter
    split = getattr(tagged, "tensor_model_parallel", False)
    return tagged.sequence_parallel, split, tagged.partition_dim if split else None


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "projection", "table", "norm"),
    [
        (1, False, (False, False, None), (False, False, None), (False, False, None)),
        (1, True, (True, False, None), (False, False, None), (True, False, None)),
        (2, True, (True, False, None), (False, True, 0), (True, False, None)),
        (2, False, (False, True, 1), (False, True, 0), (False, False, None)),
    ],
)
def test_parameters_tell_megatron_how_ranks_hold_them(
    both: SiteReading, size: int, sequence_parallel: bool, projection: Any, table: Any, norm: Any
) -> None:
    site = small_site(both, Partition(size=size, sequence_parallel=sequence_parallel))
    for reader in (site.graft, site.engram):
        assert tags(reader.key_weight) == tags(reader.value_weight) == projection
    assert tags(site.engram.table) == table
    assert tags(site.key_norm) == tags(site.query_norm) == tags(site.conv_norm) == tags(site.conv_kernel) == norm


def test_the_gradient_of_a_slice_is_not_summed_over_the_ranks_that_hold_others() -> None:
    split = site_parameter(model_config(sequence_parallel=True), torch.ones(4, 3), split_axis=1)
    assert tags(split) == (False, True, 1)


def test_the_table_alone_has_the_learning_rate_of_tables_and_all_else_that_of_sites(both: SiteReading) -> None:
    from megatron_graft.compat.parameter_groups import SITE_RATE, TABLE_ATTRIBUTE, TABLE_RATE

    parameters = dict(small_site(both).named_parameters())
    for attribute in (TABLE_ATTRIBUTE, TABLE_RATE):
        assert {name for name, value in parameters.items() if hasattr(value, attribute)} == {"engram.table"}
    assert {name for name, value in parameters.items() if not hasattr(value, SITE_RATE)} == {"engram.table"}


def test_a_parameter_is_a_copy_of_the_models_dtype() -> None:
    value = torch.ones(3)
    first, second = (site_parameter(model_config(), value) for _ in range(2))
    with torch.no_grad():
        first.add_(1)
    assert second.tolist() == value.tolist() == [1, 1, 1]
    assert site_parameter(model_config(params_dtype=torch.bfloat16), value).dtype == torch.bfloat16


def test_a_table_too_small_for_its_ranks_leaves_the_last_without_rows() -> None:
    reading = EngramReading(num_rows=2, num_heads=2, head_dim=3, max_order=3)
    site = small_site(SiteReading(layer_number=2, engram=reading), Partition(rank=2, size=3, sequence_parallel=True))
    assert site.engram.table.shape == (0, 3)


def test_files_of_a_bank_are_not_read(tmp_path: Path) -> None:
    """A site is built from what a reading says; the rows come with the micro-batches."""
    bank = small_bank(tmp_path / "bank")
    reading = SiteReading(layer_number=2, graft=graft_reading(bank))
    for file in (tmp_path / "bank").iterdir():
        file.unlink()
    small_site(reading)
