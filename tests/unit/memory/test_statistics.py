"""What a site tells about itself, against NumPy on everything at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.memory.statistics import GATE_BINS, SAMPLED_POSITIONS, WIDTH, SiteStatistics, summary

CPU = torch.device("cpu")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_batch(seed: int, positions: int = 40, sequences: int = 3, hidden: int = 8) -> Batch:
    """Gates crowded towards one end, where most positions read; what is added lies in fewer directions than eight."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.rand(positions, sequences, 1, generator=generator) ** 2
    active = torch.rand(positions, sequences, generator=generator) < 0.7
    mixing = torch.randn(hidden, hidden, generator=generator) * 2.0 ** -torch.arange(hidden).unsqueeze(-1)
    delta = torch.randn(positions, sequences, hidden, generator=generator) @ mixing
    return gate, active, delta, torch.randn(positions, sequences, hidden, generator=generator)


def figures(*batches: Batch) -> dict[str, Any]:
    statistics = SiteStatistics()
    for batch in batches:
        statistics.add(*batch)
    return summary(statistics.drain(CPU).tolist())


def participation(delta_SBH: torch.Tensor) -> float:
    """By the eigenvalues of the second moment: the square of their sum by the sum of their squares."""
    vectors = delta_SBH.reshape(-1, delta_SBH.shape[-1]).double().numpy()
    eigenvalues = np.linalg.eigvalsh(vectors.T @ vectors / len(vectors))
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def adding(vectors_NH: torch.Tensor) -> Batch:
    """A batch of one sequence that adds the given vectors."""
    number = len(vectors_NH)
    return torch.ones(number, 1, 1), torch.ones(number, 1).bool(), vectors_NH.unsqueeze(1), torch.ones(number, 1, 1)


def test_gates_are_described_as_numpy_describes_those_of_positions_that_read() -> None:
    batches = [random_batch(seed) for seed in range(4)]
    gates = np.concatenate([gate[..., 0][active].numpy() for gate, active, _, _ in batches])
    found = figures(*batches)
    assert found["gate_mean"] == pytest.approx(gates.mean(), rel=1e-6)
    for share in (10, 50, 90):
        assert found[f"gate_p{share}"] == pytest.approx(np.quantile(gates, share / 100), abs=1 / GATE_BINS)


def test_gates_where_nothing_is_read_do_not_count() -> None:
    gate, active, delta, hidden = random_batch(0)
    others = torch.where(active.unsqueeze(-1), gate, 1 - gate)
    before, after = figures((gate, active, delta, hidden)), figures((others, active, delta, hidden))
    assert before == after


def test_quantiles_lie_within_a_bin_in_proportion() -> None:
    gates = torch.tensor([0.25] * 3 + [0.75] * 7).view(-1, 1, 1) + 1e-3
    found = figures((gates, torch.ones(10, 1).bool(), torch.zeros(10, 1, 2), torch.ones(10, 1, 2)))
    assert found["gate_p10"] == pytest.approx((16 + 1 / 3) / 64)
    assert found["gate_p50"] == pytest.approx((48 + 2 / 7) / 64)
    assert found["gate_p90"] == pytest.approx((48 + 6 / 7) / 64)


@pytest.mark.parametrize(("gate", "lowest", "highest"), [(0.0, 0.0, 1 / 64), (1.0, 63 / 64, 1.0)])
def test_a_gate_that_is_shut_or_wide_open_is_counted(gate: float, lowest: float, highest: float) -> None:
    batch = (torch.full((5, 1, 1), gate), torch.ones(5, 1).bool(), torch.zeros(5, 1, 2), torch.ones(5, 1, 2))
    assert lowest <= figures(batch)["gate_p50"] <= highest
    assert figures(batch)["gate_mean"] == gate


def test_the_relative_change_is_a_mean_over_all_positions() -> None:
    batches = [random_batch(seed) for seed in range(3)]
    ratios = [np.linalg.norm(delta, axis=-1) / np.linalg.norm(hidden, axis=-1) for _, _, delta, hidden in batches]
    assert figures(*batches)["delta_ratio"] == pytest.approx(np.mean(ratios), rel=1e-6)


def test_participation_is_that_of_the_second_moments_eigenvalues() -> None:
    batches = [random_batch(seed) for seed in range(3)]
    wanted = [participation(delta) for _, _, delta, _ in batches]
    assert 1.2 < min(wanted) < max(wanted) < 6, "the test must meet neither one direction nor all"
    assert figures(*batches)["participation"] == pytest.approx(np.mean(wanted), rel=1e-6)


@pytest.mark.parametrize("number", [1, 7, 400])
def test_participation_of_collinear_vectors_is_one(number: int) -> None:
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    factors = torch.randn(number, 1, generator=torch.Generator().manual_seed(1))
    assert figures(adding(factors * direction))["participation"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("number", [1, 2, 8, 31])
def test_participation_of_n_orthonormal_vectors_is_n(number: int) -> None:
    rotation, _ = torch.linalg.qr(torch.randn(31, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert figures(adding(rotation[:number]))["participation"] == pytest.approx(number, rel=1e-9)


def test_participation_does_not_depend_on_the_scale_even_of_a_barely_trained_site() -> None:
    _, _, delta, _ = random_batch(5)
    small = delta.flatten(0, 1) * 1e-12
    assert figures(adding(small))["participation"] == pytest.approx(participation(delta), rel=1e-5)


def test_participation_looks_at_evenly_spaced_positions_of_a_large_batch() -> None:
    number = 3 * SAMPLED_POSITIONS
    vectors = torch.zeros(number, 4)
    vectors[::3, 0] = 1.0
    vectors[1::3, 1] = 1.0
    assert figures(adding(vectors))["participation"] == pytest.approx(1)  # every third, from the first on
    identity = torch.eye(number)
    assert figures(adding(identity))["participation"] == pytest.approx(SAMPLED_POSITIONS)


def test_a_batch_to_which_nothing_is_added_has_no_participation_and_lowers_no_mean() -> None:
    something = adding(torch.eye(4))
    nothing = adding(torch.zeros(4, 4))
    assert figures(something, nothing)["participation"] == pytest.approx(4)
    assert figures(nothing)["participation"] == 0


def test_sums_of_several_ranks_add_up_to_the_figures_of_all() -> None:
    batches = [random_batch(seed) for seed in range(4)]
    ranks = [SiteStatistics(), SiteStatistics()]
    for number, batch in enumerate(batches):
        ranks[number % 2].add(*batch)
    together = sum(rank.drain(CPU) for rank in ranks)
    assert isinstance(together, torch.Tensor)
    assert summary(together.tolist()) == pytest.approx(figures(*batches))


def test_draining_starts_anew_and_nothing_counted_is_zero() -> None:
    statistics = SiteStatistics()
    statistics.add(*random_batch(0))
    first = statistics.drain(CPU)
    assert first.shape == (WIDTH,) and first.dtype == torch.float64 and first.any()
    assert not statistics.drain(CPU).any()
    assert set(summary([0.0] * WIDTH).values()) == {0}
