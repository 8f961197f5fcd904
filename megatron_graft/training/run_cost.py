"""What memory sites hold and move, from formulas alone, for any number of ranks, of which none has to exist.

Each rank's parameters and their state, the rows that arrive, the collectives that sites add. Arithmetic on a
:class:`RunShape` only; :mod:`megatron_graft.training.run_plan` makes one from a run's own flags. Bytes of a collective
are those that a rank hands to it in one step; what a ring puts on the wire is told beside it. Expectations (shares of
hits and of distinct rows) are those of one micro-batch on one rank.

Shapes: B sequences of a micro-batch, S positions, s positions of a rank, H hidden size, T tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_graft.data.memory_layout import MemoryLayout, SiteReading
from megatron_graft.data.microbatch import content_bytes, packed_bytes
from megatron_graft.data.partition import Partition
from megatron_graft.memory.halo import moves
from megatron_graft.training.run_terms import TextShape

GRADIENT_BYTES = 4
"""Of one element: Megatron reduces gradients in float32."""


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One memory site: what it reads, and the taps and their distance of its convolution."""

    reading: SiteReading
    conv_kernel: int
    conv_dilation: int


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What of a run decides the cost of its memory.

    Attributes:
        world_size: ranks.
        tensor, context, pipeline, data: T, context-parallel ranks, pipeline stages, data-parallel ranks.
        virtual: model chunks of each pipeline rank.
        sequence_parallel: whether hidden states are split over the tensor-parallel ranks.
        distributed_optimizer: whether optimizer state is split over the data- and context-parallel ranks.
        num_layers: of the model.
        hidden: H.
        sequence: S.
        micro_batch: B.
        micro_batches: of a step, on each rank.
        look_ahead: micro-batches whose memory may wait ready, for each model chunk.
        element_bytes: of a parameter and of an activation: 2 or 4.
        sites: of the run.
    """

    world_size: int
    tensor: int
    context: int
    pipeline: int
    virtual: int
    data: int
    sequence_parallel: bool
    distributed_optimizer: bool
    num_layers: int
    hidden: int
    sequence: int
    micro_batch: int
    micro_batches: int
    look_ahead: int
    element_bytes: int
    sites: tuple[SitePlan, ...]

    def place_of(self, layer: int) -> tuple[int, int]:
        """Pipeline stage and chunk of a layer, from 0; layers are split evenly."""
        chunk, stage = divmod((layer - 1) * self.pipeline * self.virtual // self.num_layers, self.pipeline)
        return stage, chunk

    @property
    def positions(self) -> int:
        """Positions of a micro-batch on one rank, B * s."""
        return self.micro_batch * self.sequence // (self.context * (self.tensor if self.sequence_parallel else 1))

    @property
    def copies(self) -> int:
        """Ranks that hold the same parameters and share their optimizer state: data- and context-parallel ones."""
        return self.data * self.context


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Bytes of one step that one rank hands to a kind of collective, and what a ring sends for them."""

    name: str
    handed: float
    on_the_wire: float

    def plus(self, other: Collective) -> Collective:
        """Of this and another one of the same name together."""
        handed, on_the_wire = self.handed + other.handed, self.on_the_wire + other.on_the_wire
        return Collective(name=self.name, handed=handed, on_the_wire=on_the_wire)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What the sites of one pipeline stage add to each of its ranks.

    Attributes:
        stage: number of the stage, from 0.
        layers: of its sites.
        dense: parameters of projections, norms and convolutions.
        table: parameters of trained rows, of this rank's share.
        state_bytes: parameters, gradients and optimizer state of both.
        rows: gathered from banks, in a step.
        row_bytes: that these have.
        device_bytes: copied to the device, in a step.
        waiting_bytes: on the device, of the micro-batches in work and of those that wait, for training and validation.
        collectives: see :class:`Collective`.
    """

    stage: int
    layers: tuple[int, ...]
    dense: int
    table: int
    state_bytes: float
    rows: float
    row_bytes: float
    device_bytes: float
    waiting_bytes: float
    collectives: tuple[Collective, ...]

    def plus(self, other: StageCost) -> StageCost:
        """Of this and another chunk of the same stage together."""
        merged = {one.name: one for one in self.collectives}
        for one in other.collectives:
            merged[one.name] = merged[one.name].plus(one) if one.name in merged else one
        return StageCost(
            stage=self.stage,
            layers=tuple(sorted(self.layers + other.layers)),
            dense=self.dense + other.dense,
            table=self.table + other.table,
            state_bytes=self.state_bytes + other.state_bytes,
            rows=self.rows + other.rows,
            row_bytes=self.row_bytes + other.row_bytes,
            device_bytes=self.device_bytes + other.device_bytes,
            waiting_bytes=self.waiting_bytes + other.waiting_bytes,
            collectives=tuple(merged.values()),
        )


def stage_costs(run: RunShape, text: TextShape) -> list[StageCost]:
    """The stages that hold a site, in order."""
    chunks: dict[tuple[int, int], list[SitePlan]] = {}
    for site in sorted(run.sites, key=lambda site: site.reading.layer_number):
        chunks.setdefault(run.place_of(site.reading.layer_number), []).append(site)
    stages: dict[int, StageCost] = {}
    for (stage, _), sites in sorted(chunks.items()):
        cost = _chunk_cost(run, text, stage, sites)
        stages[stage] = stages[stage].plus(cost) if stage in stages else cost
    return list(stages.values())


def state_bytes(parameters: float, run: RunShape) -> float:
    """Bytes of parameters with float32 gradients and Adam's two moments, and a float32 copy of 16-bit ones."""
    kept = 8 if run.element_bytes == 4 else 12
    return parameters * (run.element_bytes + GRADIENT_BYTES + kept / (run.copies if run.distributed_optimizer else 1))


def forward_flops(run: RunShape) -> float:
    """Operations per token that all sites add to a forward pass: projections, gate and convolution."""
    flops = 0.0
    for site in run.sites:
        widths = [reading.width for reading in (site.reading.graft, site.reading.engram) if reading]
        flops += 4 * run.hidden * sum(widths) + 2 * run.hidden * (1 + site.conv_kernel)
    return flops


def _chunk_cost(run: RunShape, text: TextShape, stage: int, sites: list[SitePlan]) -> StageCost:
    partition = Partition(size=run.tensor, sequence_parallel=run.sequence_parallel, context_size=run.context)
    layout = MemoryLayout.of([site.reading for site in sites], partition)
    dense = sum(_dense_parameters(run, site, partition) for site in sites)
    table = sum(_table_parameters(site.reading, partition) for site in sites)
    rows = [run.positions * text.hit_rate * text.distinct for _ in layout.grafts]
    gathered = sum(one * graft.row_layout.row_bytes() for one, graft in zip(rows, layout.grafts, strict=True))
    positions = run.positions // run.micro_batch
    content = content_bytes(
        layout, run.micro_batch, positions,
        rows=[one + 1 for one in rows], requests=_requests(run, text, layout),
    )  # fmt: skip
    return StageCost(
        stage=stage,
        layers=tuple(site.reading.layer_number for site in sites),
        dense=dense,
        table=table,
        state_bytes=state_bytes(dense + table, run),
        rows=sum(rows) * run.micro_batches,
        row_bytes=gathered * run.micro_batches,
        device_bytes=content * run.micro_batches,
        waiting_bytes=packed_bytes(layout, run.micro_batch, positions) * _held_at_once(run),
        collectives=tuple(_collectives(run, text, sites, layout, dense, table)),
    )


def _held_at_once(run: RunShape) -> int:
    """Micro-batches whose memory a device holds at most: between forward and backward on the first stage, and ready.

    The streams of training and of validation each have one in their thread's hands beside those that wait.
    """
    return min(run.pipeline, run.micro_batches) + 2 * (run.look_ahead + 1)


def _dense_parameters(run: RunShape, site: SitePlan, partition: Partition) -> int:
    graft, engram = site.reading.graft, site.reading.engram
    columns = [partition.columns(graft.width)] if graft else []
    if engram:
        first, end = partition.heads(engram.num_heads)
        columns.append((first * engram.head_dim, end * engram.head_dim))
    norms = 3 if site.conv_kernel else 2
    return run.hidden * (2 * sum(end - first for first, end in columns) + norms + site.conv_kernel)


def _table_parameters(reading: SiteReading, partition: Partition) -> int:
    tables = [(reading.engram.num_rows, reading.engram.head_dim)] if reading.engram else []
    if reading.graft and reading.graft.trained_rows is not None:
        tables.append((reading.graft.trained_rows, reading.graft.width))
    shares = [(partition.table_rows(rows), width) for rows, width in tables]
    return sum((end - first) * width for (first, end), width in shares)


def _requests(run: RunShape, text: TextShape, layout: MemoryLayout) -> list[float]:
    """Rows of this rank's share that all ranks ask for, in one micro-batch: what one rank asks for in all."""
    reads = [
        (1 - text.hit_rate if rows.skip_hits_of is not None else 1.0) * (rows.heads[1] - rows.heads[0])
        for rows in layout.engrams
    ]
    asked = [run.positions * share * text.distinct_table for share in reads]
    return [*asked, *(run.positions * text.hit_rate * text.distinct for _ in layout.trained)]


def _collectives(
    run: RunShape, text: TextShape, sites: list[SitePlan], layout: MemoryLayout, dense: int, table: int
) -> Iterable[Collective]:
    """What sites add. Forward and backward passes of one step, and the reduction of gradients at its end."""
    ranks, activation = run.tensor, run.element_bytes
    if ranks > 1:
        yield from _tensor_parallel(run, text, sites, layout, dense)
    if sent := _halo_bytes(run, sites, layout.partition):
        yield Collective(name="halo of the convolution", handed=sent, on_the_wire=sent)
    if run.copies > 1:
        gradients = (dense + table) * GRADIENT_BYTES
        ring = (run.copies - 1) / run.copies
        if run.distributed_optimizer:
            parameters = (dense + table) * activation
            yield Collective(name="reduce-scatter of gradients", handed=gradients, on_the_wire=gradients * ring)
            yield Collective(
                name="all-gather of parameters", handed=parameters / run.copies, on_the_wire=parameters * ring
            )
        else:
            yield Collective(name="all-reduce of gradients", handed=gradients, on_the_wire=2 * gradients * ring)


def _tensor_parallel(
    run: RunShape, text: TextShape, sites: list[SitePlan], layout: MemoryLayout, dense: int
) -> Iterable[Collective]:
    ranks, activation = run.tensor, run.element_bytes
    ring = (ranks - 1) / ranks
    widths = [rows.reading.head_dim for rows in layout.engrams]
    requests = _requests(run, text, layout)
    exchanged = (
        2.0
        * run.micro_batches
        * activation
        * sum(asked * width for asked, width in zip(requests, widths, strict=False))
    )
    for site in sites:
        number = layout.trained_of(site.reading)
        if number is not None and site.reading.graft:
            exchanged += 2.0 * run.micro_batches * activation * requests[number] * site.reading.graft.width
    if exchanged:
        yield Collective(name="all-to-all of table rows", handed=exchanged, on_the_wire=exchanged * ring)
    if run.sequence_parallel:
        yield Collective(
            name="all-reduce of replicated gradients", handed=dense * GRADIENT_BYTES,
            on_the_wire=2 * dense * GRADIENT_BYTES * ring,
        )  # fmt: skip
    else:
        summed = 2.0 * run.hidden * run.positions * activation * run.micro_batches * len(sites)
        yield Collective(name="all-reduce of keys and values", handed=summed, on_the_wire=2 * summed * ring)


def _halo_bytes(run: RunShape, sites: list[SitePlan], partition: Partition) -> float:
    """What a rank sends to others, on average over the ranks of a sequence, forward and back."""
    positions = 0.0
    for site in sites:
        halo = max(0, site.conv_kernel - 1) * site.conv_dilation
        away = [move.count for move in moves(partition, run.sequence, halo) if move.source != move.target]
        positions += sum(away) / len(partition.others())
    return 2.0 * run.micro_batches * run.element_bytes * positions * run.micro_batch * run.hidden
