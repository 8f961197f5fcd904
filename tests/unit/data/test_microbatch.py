import pytest
import torch

from megatron_graft.data.microbatch import MAGIC, MicroBatchMemory


def test_what_is_written_on_the_host_is_read_back_from_the_packed_tensor() -> None:
    memory = MicroBatchMemory.allocate(41, 2, 5, 3)
    memory.position_BS[:] = torch.arange(10).view(2, 5)
    memory.inverse_BS[:] = torch.arange(10, 20).view(2, 5)
    memory.order_BS[:] = 4
    memory.rows_PD[1:] = torch.arange(30).view(10, 3)
    seen = MicroBatchMemory.unpack(memory.packed.clone(), 2, 5, 3)
    assert seen.header.tolist() == [MAGIC, 41, 2, 5, 3, 1, 0, 0]
    assert seen.sequence_number == 41
    assert seen.position_BS.flatten().tolist() == list(range(10))
    assert seen.inverse_BS.flatten().tolist() == list(range(10, 20))
    assert seen.order_BS.unique().tolist() == [4]
    assert seen.rows_PD.float().flatten().tolist() == [0.0] * 3 + list(range(30))


def test_sections_do_not_overlap_and_are_aligned() -> None:
    memory = MicroBatchMemory.allocate(0, 3, 7, 5)
    base = memory.packed.data_ptr()
    views = [memory.header, memory.position_BS, memory.inverse_BS, memory.order_BS, memory.rows_PD]
    ends = [0]
    for view in views:
        start = view.data_ptr() - base
        assert start % 64 == 0
        assert start >= ends[-1]
        ends.append(start + view.numel() * view.element_size())
    assert ends[-1] <= memory.packed.numel()


def test_used_bytes_end_after_the_rows_in_use() -> None:
    memory = MicroBatchMemory.allocate(0, 2, 4, 6)
    memory.header[5] = 3
    front = memory.packed[: memory.used_bytes()]
    assert memory.used_bytes() == memory.rows_PD[3:].data_ptr() - memory.packed.data_ptr()
    assert front.numel() < memory.packed.numel()


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 6, 3), (3, 5, 3)])
def test_a_tensor_of_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    packed = MicroBatchMemory.allocate(0, 2, 5, 3).packed
    with pytest.raises(ValueError, match="packed memory has"):
        MicroBatchMemory.unpack(packed, *shape)


def test_row_bits_are_the_rows_themselves() -> None:
    memory = MicroBatchMemory.allocate(0, 1, 2, 2)
    memory.row_bits()[1] = 0x3F80  # 1.0 in bfloat16
    assert memory.rows_PD[1].tolist() == [1.0, 1.0]
