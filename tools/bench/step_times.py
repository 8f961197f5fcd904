"""Step times of several runs in one process, in turn: only what differs between them can make them differ.

    python tools/bench/step_times.py FILE

FILE is JSON: ``runs`` (name -> flags), ``pairs``, ``steps``. Every run gets a model, an optimizer and a stream of its
own, by the functions that a training run uses. Then come so many rounds; in each, every run trains a block of so many
steps, and the order turns around from round to round. Prints one line of JSON: for each run the seconds of every block,
what its look-ahead did, and its sites' share of the operations.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WARM_UP_BLOCKS = 2


class TimedRun:
    """One of the runs."""

    def __init__(self, flags: list[str]) -> None:
        from megatron.training.global_vars import unset_global_variables

        from megatron_graft.training.run import model_config, parse_arguments

        unset_global_variables()  # of the run before; Megatron reads those of the last one
        sys.argv = ["step_times", *flags]
        self.args, self.settings, self.memory = parse_arguments()
        self.config = model_config(self.args, self.memory)
        self.seconds: list[float] = []

    def set_up(self) -> None:
        """Make model, optimizer and stream; Megatron must be initialised."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.training import setup_model_and_optimizer

        from megatron_graft.training.data_provider import DatasetProvider
        from megatron_graft.training.forward_step import ForwardStep
        from megatron_graft.training.run import build_look_ahead, chunk_layouts

        container = pretrain_cfg_container_from_args(self.args, self.config)
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.model_config = get_model_config(self.model[0])
        self.model_config.grad_scale_func = self.optimizer.scale_loss
        self.model_config.finalize_model_grads_func = finalize_model_grads
        layouts = chunk_layouts(self.memory, self.config.transformer)
        self.look_ahead = build_look_ahead(self.args, self.settings, self.memory, layouts)
        samples = self.args.train_iters * self.args.global_batch_size
        stream, _, _ = DatasetProvider(self.look_ahead)((samples, 0, 0))
        self.stream = RerunDataIterator(stream)
        self.forward_step = ForwardStep(self.look_ahead, [None] * len(layouts))
        self.forward_backward = get_forward_backward_func()
        self.steps = 0

    def train(self, steps: int) -> float:
        """Seconds that so many steps take."""
        from megatron.training.training import train_step

        started = time.perf_counter()
        for _ in range(steps):
            train_step(
                self.forward_step, self.stream, self.model, self.optimizer, self.scheduler, self.model_config,
                self.forward_backward, iteration=self.steps,
            )  # fmt: skip
            self.steps += 1
        return time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        """What is told of it."""
        from megatron_graft.experiments.cost import backbone_flops, site_flops
        from megatron_graft.training.identity import memory_identity

        seen, args = self.look_ahead.drain_statistics(), self.args
        backbone = backbone_flops(vars(args), args.padded_vocab_size, gated=args.swiglu)
        sites = site_flops(memory_identity(self.memory), args.hidden_size)
        return {
            "block_seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_step": args.global_batch_size * args.seq_length,
            "stall_ms_per_step": 1e3 * seen.stall_seconds / self.steps,
            "look_ahead_ms_per_step": 1e3 * seen.fetch_seconds / self.steps,
            "parameters": sum(parameter.numel() for parameter in self.model[0].parameters()),
            "flops": {"backbone": backbone, "sites": sites, "share": sites / backbone},
        }


def main(path: Path) -> None:
    """Set up, warm up, measure, print."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron.training.initialize import initialize_megatron

    asked = json.loads(path.read_text(encoding="utf-8"))
    runs = {name: TimedRun(flags) for name, flags in asked["runs"].items()}
    initialize_megatron()
    for run in runs.values():
        run.set_up()
        run.train(WARM_UP_BLOCKS * asked["steps"])
        run.look_ahead.drain_statistics()
        run.steps = 0
    order = list(runs.values())
    for round_ in range(asked["pairs"]):
        for run in order:
            run.seconds.append(run.train(asked["steps"]))
        order.reverse()
        print(f"round {round_ + 1}/{asked['pairs']}", file=sys.stderr, flush=True)
    print(json.dumps({name: run.report() for name, run in runs.items()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
