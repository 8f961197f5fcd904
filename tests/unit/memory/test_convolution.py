import pytest
import torch

from megatron_graft.memory.convolution import causal_depthwise_convolution
from megatron_graft.memory.halo import SequenceSplit


def by_definition(x: torch.Tensor, kernel: torch.Tensor, dilation: int, position: torch.Tensor) -> torch.Tensor:
    """Term by term: a tap counts if it lies in the sequence and in the document of the position it serves."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            for tap in range(kernel.shape[0]):
                source = t - tap * dilation
                if source >= 0 and tap * dilation <= position[t, b]:
                    out[t, b] += kernel[tap] * x[source, b]
    return out


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("taps", "dilation"), [(1, 3), (2, 1), (4, 3), (4, 4), (3, 20)])
def test_equals_the_definition_inside_and_across_documents(
    generator: torch.Generator, taps: int, dilation: int
) -> None:
    x = torch.randn(17, 2, 5, generator=generator, dtype=torch.float64)
    kernel = torch.randn(taps, 5, generator=generator, dtype=torch.float64)
    position = torch.arange(17).repeat(2, 1).t().clone()
    position[9:, 1] -= 9  # a document starts at position 9 of the second sequence
    expected = by_definition(x, kernel, dilation, position)
    assert torch.allclose(causal_depthwise_convolution(x, kernel, dilation, position, SequenceSplit()), expected)


def test_a_later_input_changes_no_earlier_output(generator: torch.Generator) -> None:
    x = torch.randn(12, 1, 3, generator=generator)
    kernel = torch.randn(4, 3, generator=generator)
    position = torch.arange(12)[:, None]
    before = causal_depthwise_convolution(x, kernel, 2, position, SequenceSplit())
    x[7] += 1
    after = causal_depthwise_convolution(x, kernel, 2, position, SequenceSplit())
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


def test_gradients_are_those_of_the_definition(generator: torch.Generator) -> None:
    x = torch.randn(11, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    position = torch.arange(11).repeat(2, 1).t().clone()
    position[4:, 0] -= 4
    weight = torch.randn(11, 2, 3, generator=generator, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((convolve(x, kernel, 2, position, *split) * weight).sum(), (x, kernel))
        for convolve, split in ((causal_depthwise_convolution, [SequenceSplit()]), (by_definition, []))
    )
    assert all(map(torch.allclose, found, expected))


def test_bf16_keeps_its_type_forward_and_backward(generator: torch.Generator) -> None:
    x = torch.randn(12, 1, 3, generator=generator).bfloat16().requires_grad_()
    kernel = torch.randn(4, 3, generator=generator).bfloat16().requires_grad_()
    position = torch.arange(12)[:, None]
    y = causal_depthwise_convolution(x, kernel, 2, position, SequenceSplit())
    y.sum().backward()
    assert {y.dtype, x.grad.dtype, kernel.grad.dtype} == {torch.bfloat16}  # type: ignore[union-attr]
    expected = by_definition(x.detach().double(), kernel.detach().double(), 2, position)
    assert torch.allclose(y.double(), expected, rtol=0.02, atol=0.05)
