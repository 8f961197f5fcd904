"""Site and throughput metrics beside Megatron's own: one greppable line, TensorBoard, and a JSON line per step.

Sums are kept on each rank and reduced over all ranks at every log interval only. Nothing enters Megatron's loss
dictionary. The JSON lines carry the loss in full precision, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer
from megatron.training.utils import is_last_rank

from megatron_graft.data.look_ahead import LookAhead
from megatron_graft.log import format_seconds
from megatron_graft.memory.site import MemorySite
from megatron_graft.memory.statistics import WIDTH, summary


class RunMetrics:
    """Collects, reduces and writes; called once after every training step.

    Args:
        look_ahead: counts hits, rows and waiting on this rank.
        layers: layer numbers of all sites of the run.
        max_orders: the longest n-gram of each bank of the run.
        path: the JSON-lines file, or None.
    """

    def __init__(
        self, look_ahead: LookAhead, layers: tuple[int, ...], max_orders: Sequence[int], path: Path | None
    ) -> None:
        self.look_ahead, self.layers, self.max_orders, self.path = look_ahead, layers, tuple(max_orders), path
        self._sites: dict[int, MemorySite] = {}
        self._interval_started = time.perf_counter()
        self._interval_tokens = 0
        self._interval_steps = 0

    def attach(self, model: list[Any]) -> None:
        """Learn which sites live on this rank."""
        for chunk in unwrap_model(model):
            for module in chunk.modules():
                if isinstance(module, MemorySite):
                    self._sites[module.layer_number] = module

    def after_step(self, loss: dict[str, torch.Tensor], iteration: int, grad_norm: Any, skipped: int) -> None:
        """Write the step's JSON line and, at a log interval, the reduced metrics."""
        args = get_args()
        self._interval_tokens += get_current_global_batch_size() * args.seq_length
        self._interval_steps += 1
        record: dict[str, Any] = {"iteration": iteration, "consumed_samples": args.consumed_train_samples}
        record |= {name: float(value) for name, value in loss.items()}
        record |= {"grad_norm": None if grad_norm is None else float(grad_norm), "skipped": int(skipped)}
        if iteration % args.log_interval == 0:
            record |= self._interval(iteration, args.train_iters)
        if is_last_rank():
            self._write(record)

    def _interval(self, iteration: int, last_iteration: int) -> dict[str, Any]:
        reduced = self._reduce()
        seconds = time.perf_counter() - self._interval_started
        tokens_per_second = self._interval_tokens / seconds
        eta = (last_iteration - iteration) * seconds / self._interval_steps
        reduced |= {"tokens_per_second": tokens_per_second, "eta_seconds": eta}
        self._interval_started, self._interval_tokens, self._interval_steps = time.perf_counter(), 0, 0
        if is_last_rank():
            print(self._line(iteration, last_iteration, reduced), flush=True)
            if self.layers:
                print(self._detail(iteration, reduced), flush=True)
            writer = get_tensorboard_writer()
            for name, value in reduced.items():
                if writer and not isinstance(value, list):
                    writer.add_scalar(name, value, iteration)
        return reduced

    def _reduce(self) -> dict[str, Any]:
        """Sum over ranks. A position is counted by every rank that fetched it, which leaves the ratios unchanged."""
        seen = self.look_ahead.drain_statistics()
        device = torch.cuda.current_device()
        orders = seen.counts.orders or tuple(np.zeros(longest + 1) for longest in self.max_orders)
        rows = [seen.counts.graft_rows, seen.counts.engram_requests, seen.counts.engram_rows]
        counts = torch.from_numpy(np.concatenate([*orders, rows]).astype(np.float64)).to(device)
        sites = torch.zeros(len(self.layers), WIDTH, dtype=torch.float64, device=device)
        for position, layer in enumerate(self.layers):
            if layer in self._sites:
                sites[position] = self._sites[layer].statistics.drain(sites.device)
        waiting = torch.tensor([seen.stall_seconds, seen.fetch_seconds], device=device)
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(sites)
        torch.distributed.all_reduce(waiting, op=torch.distributed.ReduceOp.MAX)
        per_step = 1e3 / max(1, self._interval_steps)
        named = {"graft/stall_ms": float(waiting[0]) * per_step, "graft/fetch_ms": float(waiting[1]) * per_step}
        *by_order, graft_rows, requests, engram_rows = counts.tolist()
        if self.max_orders:
            named |= self._match_figures(by_order, graft_rows)
        if requests:
            named["engram/unique_row_share"] = engram_rows / requests
        for layer, sums in zip(self.layers, sites.tolist(), strict=True):
            named |= {f"graft/{name}_layer_{layer}": value for name, value in summary(sums).items()}
        return named

    def _match_figures(self, by_order: Sequence[float], rows: float) -> dict[str, float]:
        """Hit rates over all banks, and of each of several; and the share of hits that a row was gathered for."""
        starts = np.cumsum([0, *(longest + 1 for longest in self.max_orders)])
        banks = [np.asarray(by_order[first:end]) for first, end in itertools.pairwise(starts)]
        total = np.sum([np.pad(bank, (0, max(self.max_orders) + 1 - len(bank))) for bank in banks], axis=0)
        named = _hit_rates("graft", total)
        if len(banks) > 1:
            for number, bank in enumerate(banks, start=1):
                named |= _hit_rates(f"graft/bank_{number}", bank)
        return named | {"graft/unique_row_share": rows / max(1.0, float(total[1:].sum()))}

    def _line(self, iteration: int, last_iteration: int, values: dict[str, Any]) -> str:
        parts = [
            f"graft step {iteration}/{last_iteration}",
            f"{values['tokens_per_second']:,.0f} tok/s",
            f"stall {values['graft/stall_ms']:.2f} ms",
        ]
        if self.layers:
            gates = " ".join(f"{values[f'graft/gate_mean_layer_{layer}']:.3f}" for layer in self.layers)
            deltas = " ".join(f"{values[f'graft/delta_ratio_layer_{layer}']:.4f}" for layer in self.layers)
            parts += [f"hit {values['graft/hit_rate']:.1%}"] if self.max_orders else []
            parts += [f"gate {gates}", f"|delta|/|h| {deltas}"]
        parts.append(f"ETA {format_seconds(values['eta_seconds'])}")
        return " | ".join(parts)

    def _detail(self, iteration: int, values: dict[str, Any]) -> str:
        """A second line: matches by order, distinct rows, and what each site tells beyond the first line."""
        parts = [f"graft detail {iteration}"]
        if self.max_orders:
            orders = range(2, max(self.max_orders) + 1)
            parts.append("order " + " ".join(f"{n}: {values[f'graft/hit_rate_order_{n}']:.1%}" for n in orders))
            parts.append(f"distinct rows {values['graft/unique_row_share']:.1%}")
        if "engram/unique_row_share" in values:
            parts.append(f"distinct table rows {values['engram/unique_row_share']:.1%}")
        for layer in self.layers:
            gates = "/".join(f"{values[f'graft/gate_p{share}_layer_{layer}']:.2f}" for share in (10, 50, 90))
            directions = values[f"graft/participation_layer_{layer}"]
            parts.append(f"layer {layer}: gate p10/p50/p90 {gates}, participation {directions:.2f}")
        return " | ".join(parts)

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")


def _hit_rates(prefix: str, orders: np.ndarray) -> dict[str, float]:
    """Shares of positions that match, in all and by length of the match, from their counts (entry 0: misses)."""
    positions = max(1.0, float(orders.sum()))
    rates = {f"{prefix}/hit_rate": 1 - float(orders[0]) / positions}
    return rates | {
        f"{prefix}/hit_rate_order_{order}": float(orders[order]) / positions for order in range(2, len(orders))
    }
