"""Operations on paper, against Megatron's own count of a training step."""

from __future__ import annotations

import pytest

from megatron_graft.experiments.cost import backbone_flops
from tests.helpers.isolated import run_isolated
from tests.helpers.tiny_run import CPU_FLAGS, TRAINING_FLAGS

BACKWARD = 3  # a forward pass, and twice as much backward
SIZES = {"num_layers": 4, "hidden_size": 192, "ffn_hidden_size": 256, "seq_length": 512}


def counted_by_megatron(flags: list[str]) -> float:
    """Operations per token of a forward and a backward pass; in a process of its own."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron_graft.training.run_plan import plan_run

    return plan_run(flags, 1).backbone_flops


@pytest.mark.parametrize("experts", [0, 8])
def test_the_backbone_costs_what_megatron_says(experts: int) -> None:
    sizes = SIZES | {"num_experts": experts, "moe_router_topk": 2}
    flags = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--num-attention-heads", 4, "--max-position-embeddings", 512, "--swiglu", "--disable-bias-linear"]
    flags += ["--num-experts", 8, "--moe-router-topk", 2] if experts else []
    flags += ["--normalization", "RMSNorm", "--tokenizer-type", "NullTokenizer", "--vocab-size", 8191, "--mock-data"]
    flags += [*TRAINING_FLAGS, *CPU_FLAGS, "--train-iters", 1]
    counted = run_isolated(counted_by_megatron, [str(word) for word in flags])
    assert BACKWARD * backbone_flops(sizes, 8192, gated=True) == pytest.approx(counted, rel=0.01)
