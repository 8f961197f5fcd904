"""What a plan of a run assumes: of the text, of the banks, of the machines. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_graft.bank.row_layout import ROW_DTYPES, RowLayout


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """What a text makes of a bank and of tables.

    Attributes:
        hit_rate: share of positions that match a key.
        distinct: distinct rows over hits, in a micro-batch of one rank.
        distinct_table: distinct rows of tables over those read.
    """

    hit_rate: float = 0.75
    distinct: float = 0.9
    distinct_table: float = 0.9


@dataclass(frozen=True, kw_only=True)
class BankShape:
    """A bank's size.

    Attributes:
        num_rows: N.
        layers: numbers of its donor layers, in the order of their columns.
        widths: elements of a row from each of them.
        max_order: longest n-gram.
        row_dtype: type of an element.
        num_bytes: of all its files.
    """

    num_rows: int
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    max_order: int
    row_dtype: str
    num_bytes: float

    @property
    def layout(self) -> RowLayout:
        """How a row lies."""
        return RowLayout(dtype=ROW_DTYPES[self.row_dtype], widths=self.widths)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a node has. All of it is assumed: defaults are round numbers of a node with eight H100.

    Attributes:
        devices: GPUs of a node.
        cores: of a node.
        device_memory, host_memory: bytes, of one GPU and of the node.
        host_bandwidth: bytes a second of the node's memory.
        link_bandwidth: bytes a second from host to one GPU.
        network: bytes a second of one GPU to other nodes.
        flops: peak of one GPU, operations a second; ``mfu`` is the part that a step reaches.
        lookup: positions a second that one core looks up.
        gather: bytes a second that one core gathers.
    """

    devices: int = 8
    cores: int = 96
    device_memory: float = 80e9
    host_memory: float = 2e12
    host_bandwidth: float = 400e9
    link_bandwidth: float = 50e9
    network: float = 50e9
    flops: float = 989e12
    mfu: float = 0.4
    lookup: float = 40e6
    gather: float = 8e9
