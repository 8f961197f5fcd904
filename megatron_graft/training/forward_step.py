"""One micro-batch through the model: tokens and memory in, losses out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args, get_timers

from megatron_graft.data.look_ahead import LookAhead

_ON_DEVICE = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class ForwardStep:
    """The function that Megatron's schedules call for every micro-batch."""

    def __init__(self, look_ahead: LookAhead) -> None:
        self.look_ahead = look_ahead

    def __call__(self, data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], _Loss]]:
        """Run the model on the iterator's next micro-batch.

        Returns:
            The stage's output (per-token losses ``[b, s]`` on the last stage) and the function that reduces it.
        """
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = next(data_iterator)
        packed = self.look_ahead.take(batch)
        tensors: dict[str, Any] = {
            name: batch[name].cuda(non_blocking=True) if batch.get(name) is not None else None for name in _ON_DEVICE
        }
        timers("batch-generator").stop()
        output = run_model(model, tensors, packed)
        return output, partial(masked_loss, tensors["loss_mask"])


def run_model(model: Any, tensors: dict[str, Any], packed: torch.Tensor | None) -> torch.Tensor:
    """Call a GPT model on one micro-batch.

    Args:
        model: the (wrapped) model of this pipeline stage.
        tensors: ``tokens``, ``position_ids``, ``labels``, ``loss_mask`` ``[b, s]`` and ``attention_mask`` (or None).
        packed: the micro-batch's packed memory, or None on a stage without sites.
    """
    return model(
        tensors["tokens"],
        tensors["position_ids"],
        tensors["attention_mask"],
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        extra_block_kwargs=None if packed is None else {"context": packed},
    )


def masked_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> _Loss:
    """Sum of the unmasked token losses, their number, and both for the log; Megatron divides."""
    weights = loss_mask.reshape(-1).float()
    loss = torch.sum(output.reshape(-1).float() * weights)
    tokens = weights.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        _reject(loss, torch.isnan, "found NaN in local forward loss calculation")
        _reject(loss, torch.isinf, "found Inf in local forward loss calculation")
    report = torch.cat([loss.detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": report}


def _reject(loss: torch.Tensor, condition: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    get_rerun_state_machine().validate_result(
        result=loss, rejection_func=condition, message=message, tolerance=0.0, fatal=True
    )
