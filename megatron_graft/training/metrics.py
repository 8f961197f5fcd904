"""Site and throughput metrics beside Megatron's own: one greppable line, TensorBoard, and a JSON line per step.

Sums are kept on each rank and reduced over all ranks at every log interval only. Nothing enters Megatron's loss
dictionary. The JSON lines carry the loss in full precision, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer
from megatron.training.utils import is_last_rank

from megatron_graft.data.look_ahead import LookAhead
from megatron_graft.log import format_seconds
from megatron_graft.memory.site import MemorySite, SiteStatistics


class RunMetrics:
    """Collects, reduces and writes; called once after every training step.

    Args:
        look_ahead: counts hits, rows and waiting on this rank.
        layers: layer numbers of all sites of the run.
        max_order: the bank's longest n-gram; 0 without a bank.
        path: the JSON-lines file, or None.
    """

    def __init__(self, look_ahead: LookAhead, layers: tuple[int, ...], max_order: int, path: Path | None) -> None:
        self.look_ahead, self.layers, self.max_order, self.path = look_ahead, layers, max_order, path
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
            writer = get_tensorboard_writer()
            for name, value in reduced.items():
                if writer and not isinstance(value, list):
                    writer.add_scalar(name, value, iteration)
        return reduced

    def _reduce(self) -> dict[str, Any]:
        """Sum over ranks. A position is counted by every rank that fetched it, which leaves the ratios unchanged."""
        seen = self.look_ahead.drain_statistics()
        device = torch.cuda.current_device()
        counts = torch.zeros(self.max_order + 2, dtype=torch.float64, device=device)
        counts[: len(seen.order_counts)] = torch.from_numpy(seen.order_counts).to(device)
        counts[-1] = seen.unique_rows
        sites = torch.zeros(len(self.layers), len(SiteStatistics.NAMES), device=device)
        for position, layer in enumerate(self.layers):
            if layer in self._sites:
                sites[position] = self._sites[layer].statistics.drain(sites.device)
        stall = torch.tensor([seen.stall_seconds, seen.fetch_seconds], device=device)
        torch.distributed.all_reduce(counts)
        torch.distributed.all_reduce(sites)
        torch.distributed.all_reduce(stall, op=torch.distributed.ReduceOp.MAX)
        return self._named(counts.tolist(), sites.tolist(), stall.tolist())

    def _named(self, counts: list[float], sites: list[list[float]], stall: list[float]) -> dict[str, Any]:
        per_step = 1e3 / max(1, self._interval_steps)
        named: dict[str, Any] = {"graft/stall_ms": stall[0] * per_step, "graft/fetch_ms": stall[1] * per_step}
        if not self.layers:
            return named
        orders, unique = counts[:-1], counts[-1]
        positions = max(1.0, sum(orders))
        named["graft/hit_rate"] = 1 - orders[0] / positions
        named |= {f"graft/hit_rate_order_{n}": orders[n] / positions for n in range(2, self.max_order + 1)}
        named["graft/unique_row_share"] = unique / max(1.0, sum(orders[1:]))
        for layer, (hits, gate, seen, delta) in zip(self.layers, sites, strict=True):
            named[f"graft/gate_mean_layer_{layer}"] = gate / max(1.0, hits)
            named[f"graft/delta_ratio_layer_{layer}"] = delta / max(1.0, seen)
        return named

    def _line(self, iteration: int, last_iteration: int, values: dict[str, Any]) -> str:
        parts = [
            f"graft step {iteration}/{last_iteration}",
            f"{values['tokens_per_second']:,.0f} tok/s",
            f"stall {values['graft/stall_ms']:.2f} ms",
        ]
        if self.layers:
            gates = " ".join(f"{values[f'graft/gate_mean_layer_{layer}']:.3f}" for layer in self.layers)
            deltas = " ".join(f"{values[f'graft/delta_ratio_layer_{layer}']:.4f}" for layer in self.layers)
            parts += [f"hit {values['graft/hit_rate']:.1%}", f"gate {gates}", f"|delta|/|h| {deltas}"]
        parts.append(f"ETA {format_seconds(values['eta_seconds'])}")
        return " | ".join(parts)

    def _write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
