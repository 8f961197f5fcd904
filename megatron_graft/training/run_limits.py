"""A planned run held against a machine: time of a step, what is asked of each resource, and which binds first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_graft.bank.manifest import MAX_NODES
from megatron_graft.training.run_cost import RunShape, StageCost, forward_flops
from megatron_graft.training.run_plan import RunPlan
from megatron_graft.training.run_terms import Machine

_COPIES = 3
"""Times that gathered bytes cross host memory: read from the bank, written packed, read by the device."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of one resource: ``asked`` of ``available``, both in ``unit``."""

    resource: str
    asked: float
    available: float
    unit: str

    @property
    def share(self) -> float:
        """Part of it that is asked for; above one, it does not suffice."""
        return self.asked / self.available


def step_seconds(plan: RunPlan, machine: Machine) -> float:
    """Time of a step in which nothing waits: the operations of model and sites at the assumed rate."""
    operations = plan.tokens * (plan.backbone_flops + 3 * forward_flops(plan.shape))
    return operations / (plan.shape.world_size * machine.flops * machine.mfu)


def demands(plan: RunPlan, costs: Sequence[StageCost], machine: Machine, seconds: float) -> list[Demand]:
    """What the memory asks of every resource, the one that binds first at the head.

    Ranks of a node are taken to hold sites as often as ranks of the run do, but at least one of them.

    Args:
        plan: the run.
        costs: its stages with sites.
        machine: a node.
        seconds: of a step.
    """
    run = plan.shape
    fullest = max((cost.state_bytes + cost.waiting_bytes for cost in costs), default=0.0)
    busiest = max(costs, key=lambda cost: cost.device_bytes, default=None)
    found = [
        Demand(
            resource="device memory, without activations", asked=(plan.backbone_state + fullest) / 1e9,
            available=machine.device_memory / 1e9, unit="GB a GPU",
        ),
        Demand(
            resource="host memory, one copy of the banks", asked=sum(bank.num_bytes for bank in plan.banks) / 1e9,
            available=machine.host_memory / 1e9, unit="GB a node",
        ),
    ]  # fmt: skip
    if busiest is not None:
        found += _rates(run, costs, busiest, machine, seconds)
    return sorted(found, key=lambda demand: -demand.share)


def _rates(
    run: RunShape, costs: Sequence[StageCost], busiest: StageCost, machine: Machine, seconds: float
) -> list[Demand]:
    with_sites = max(1.0, min(machine.devices, run.world_size) * len(costs) / run.pipeline)  # ranks of one node
    crossing = busiest.row_bytes * (_COPIES - 1) + busiest.device_bytes
    looked_up = run.micro_batch * run.sequence * run.micro_batches
    core_seconds = looked_up / machine.lookup + busiest.row_bytes / machine.gather
    wire = sum(one.on_the_wire for one in busiest.collectives)
    return [
        Demand(
            resource="host memory bandwidth", asked=with_sites * crossing / seconds / 1e9,
            available=machine.host_bandwidth / 1e9, unit="GB/s a node",
        ),
        Demand(
            resource="host to device", asked=busiest.device_bytes / seconds / 1e9,
            available=machine.link_bandwidth / 1e9, unit="GB/s a GPU",
        ),
        Demand(
            resource="cores, lookup and gather", asked=with_sites * core_seconds / seconds,
            available=float(machine.cores), unit="cores a node",
        ),
        Demand(
            resource="collectives that sites add, all over the network", asked=wire / seconds / 1e9,
            available=machine.network / 1e9, unit="GB/s a GPU",
        ),
    ]  # fmt: skip


def most_rows(plan: RunPlan, machine: Machine, share: float) -> float:
    """Rows of a bank at which one copy takes ``share`` of a node's memory, at most those that a bank can have.

    0 for a run without banks.
    """
    if not plan.banks:
        return 0.0
    per_row = sum(bank.num_bytes / bank.num_rows for bank in plan.banks)
    return min(share * machine.host_memory / per_row, MAX_NODES)
