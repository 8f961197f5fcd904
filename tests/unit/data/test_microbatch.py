import pytest
import torch

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout
from megatron_graft.data.microbatch import MAGIC, MicroBatchMemory

BFLOAT16 = RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(3, 3))
INT8 = RowLayout(dtype=ROW_DTYPES["int8"], widths=(3, 3))


def test_what_is_written_on_the_host_is_read_back_from_the_packed_tensor() -> None:
    memory = MicroBatchMemory.allocate(41, 2, 5, BFLOAT16)
    memory.position_BS[:] = torch.arange(10).view(2, 5)
    memory.inverse_BS[:] = torch.arange(10, 0, -1).view(2, 5)
    memory.order_BS[:] = 4
    memory.rows_PR.view(torch.bfloat16)[1:] = torch.arange(60).view(10, 6)
    seen = MicroBatchMemory.unpack(memory.packed.clone(), 2, 5, BFLOAT16)
    assert seen.header.tolist() == [MAGIC, 41, 2, 5, 6, 1, 12, 0]
    assert seen.sequence_number == 41
    assert seen.position_BS.flatten().tolist() == list(range(10))
    assert seen.inverse_BS.flatten().tolist() == list(range(10, 0, -1))
    assert seen.order_BS.unique().tolist() == [4]
    assert seen.rows_PR.view(torch.bfloat16).float().flatten().tolist() == [0.0] * 6 + list(range(60))


@pytest.mark.parametrize("row_layout", [BFLOAT16, INT8])
def test_sections_do_not_overlap_and_are_aligned(row_layout: RowLayout) -> None:
    memory = MicroBatchMemory.allocate(0, 3, 7, row_layout)
    base = memory.packed.data_ptr()
    views = [memory.header, memory.position_BS, memory.inverse_BS, memory.order_BS, memory.rows_PR]
    ends = [0]
    for view in views:
        start = view.data_ptr() - base
        assert start % 64 == 0
        assert start >= ends[-1]
        ends.append(start + view.numel() * view.element_size())
    assert ends[-1] == memory.packed.numel()


@pytest.mark.parametrize("row_layout", [BFLOAT16, INT8])
def test_used_bytes_end_after_the_rows_in_use(row_layout: RowLayout) -> None:
    memory = MicroBatchMemory.allocate(0, 2, 4, row_layout)
    memory.header[5] = 3
    assert memory.used_bytes() == memory.rows_PR[3:].data_ptr() - memory.packed.data_ptr()
    assert memory.used_bytes() < memory.packed.numel()


@pytest.mark.parametrize(
    ("sequences", "positions", "row_layout"),
    [
        (2, 5, RowLayout(dtype=ROW_DTYPES["bfloat16"], widths=(4, 4))),
        (2, 5, INT8),
        (2, 6, BFLOAT16),
        (3, 5, BFLOAT16),
    ],
)
def test_a_tensor_of_another_shape_is_refused(sequences: int, positions: int, row_layout: RowLayout) -> None:
    packed = MicroBatchMemory.allocate(0, 2, 5, BFLOAT16).packed
    with pytest.raises(ValueError, match="packed memory has"):
        MicroBatchMemory.unpack(packed, sequences, positions, row_layout)


def test_rows_come_by_position_and_are_zero_at_a_miss() -> None:
    memory = MicroBatchMemory.allocate(0, 2, 2, INT8)
    memory.rows_PR[1:] = 255  # rows not in use: elements -1, scales NaN
    memory.rows_PR[1, :6] = torch.tensor([1, 2, 3, 4, 5, 6])
    memory.rows_PR[1, 8:] = torch.tensor([2.0, 0.5]).view(torch.uint8)
    memory.inverse_BS[:] = torch.tensor([[0, 1], [0, 0]])
    rows_SBD = memory.rows_SBD(torch.float32)
    assert rows_SBD[1, 0].tolist() == [2.0, 4.0, 6.0, 2.0, 2.5, 3.0]
    assert rows_SBD[0].abs().sum() == rows_SBD[1, 1].abs().sum() == 0
