"""Restart of Megatron's distributed optimizer where neither Transformer Engine nor apex provides Adam.

With torch's AdamW underneath, megatron-core 0.19.2 cannot load what it has saved:

* asking a fresh optimizer for the state to load into asserts that every parameter has a ``step`` already;
* copying the loaded tensors writes into leaf views that require grad, and asks for a ``step`` tensor that the
  checkpoint keeps elsewhere (or brings the fresh optimizer's own zero);
* all parameters are then handed one shared ``step`` tensor, which advances once per parameter and iteration:
  bias correction goes wrong without a sign.

Each is mended by wrapping one method; ``tests/distributed`` resumes a run and compares it bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_graft.compat.rebind import rebind


def mend_optimizer_restart() -> None:
    """Wrap the three methods; does nothing where a fused Adam is installed."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    rebind(optimizer, "sharded_state_dict", ("self", "model_sharded_state_dict", "is_loading"), _create_state_first)
    rebind(optimizer, "_set_main_param_and_optimizer_states", ("self", "model_param", "tensors"), _keep_step)
    rebind(optimizer, "load_state_dict", ("self", "state_dict"), _separate_steps)


def _create_state_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and self.optimizer is not None:
            _create_state(self.optimizer)
        return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    return sharded_state_dict


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _keep_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` was set from the parameter groups before; what is not a tensor is left alone by the original."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        with torch.no_grad():
            return original(self, model_param, {**tensors, "step": None})

    return set_states


def _separate_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        result = original(self, state_dict)
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return result

    return load_state_dict
