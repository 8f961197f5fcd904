"""One micro-batch through the model: tokens and memory in, losses out.

The look-ahead and the verifier see whole sequences; the model sees those positions that its context-parallel rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers

from megatron_graft.data.look_ahead import CHUNK, LookAhead
from megatron_graft.memory.layer import MEMORY_ARGUMENTS
from megatron_graft.training.packing import BOUNDS, LONGEST, packed
from megatron_graft.training.verification import Verifier

_ON_DEVICE = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
Memory = tuple[torch.Tensor, torch.Tensor]  # packed and exchange of a MicroBatchMemory


class ForwardStep:
    """The function that Megatron's schedules call for every micro-batch.

    Args:
        look_ahead: has the memory of every micro-batch.
        verifiers: for each model chunk what compares its memory in some steps, or None.
    """

    def __init__(self, look_ahead: LookAhead, verifiers: Sequence[Verifier | None]) -> None:
        self.look_ahead, self.verifiers = look_ahead, verifiers

    def __call__(self, data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], _Loss]]:
        """Run the model on the iterator's next micro-batch.

        Returns:
            The stage's output (per-token losses ``[b, s]`` on the last stage) and the function that reduces it.

        Raises:
            VerificationError: this step's memory is compared with the reference path, and differs.
        """
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = next(data_iterator)
        memory = self.look_ahead.take(batch)
        if memory is not None:
            self._verify(batch, memory)
        whole, packing = packed({name: batch.get(name) for name in (*_ON_DEVICE, BOUNDS, LONGEST)})
        # Whole sequences go to the device: they lie in page-locked memory, which a rank's part, cut here, would not.
        on_device = {
            name: tensor if tensor is None else tensor.cuda(non_blocking=True) for name, tensor in whole.items()
        }
        tensors: dict[str, Any] = get_batch_on_this_cp_rank(
            on_device, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
        timers("batch-generator").stop()
        output = run_model(model, tensors, memory, packing)
        return output, partial(masked_loss, tensors["loss_mask"])

    def _verify(self, batch: dict[str, Any], memory: Memory) -> None:
        verifier = self.verifiers[batch[CHUNK]]
        if verifier is None:
            return
        args = get_args()  # without training there is no current step
        step = getattr(args, "curr_iteration", args.iteration) + 1  # the steps that are done, until this one is
        if verifier.is_due(step):
            verifier.check(step, batch["tokens"], *memory)


def run_model(
    model: Any, tensors: dict[str, Any], memory: Memory | None, packing: PackedSeqParams | None = None
) -> torch.Tensor:
    """Call a GPT model on one micro-batch.

    Args:
        model: the (wrapped) model of this pipeline stage.
        tensors: ``tokens``, ``position_ids``, ``labels``, ``loss_mask`` ``[b, s]`` and ``attention_mask`` (or None).
        memory: the micro-batch's, or None on a stage without sites.
        packing: where documents lie, if attention ends with them.
    """
    carried = None if memory is None else dict(zip(MEMORY_ARGUMENTS, memory, strict=True))
    return model(
        tensors["tokens"],
        tensors["position_ids"],
        tensors["attention_mask"],
        labels=tensors["labels"],
        loss_mask=tensors["loss_mask"],
        packed_seq_params=packing,
        extra_block_kwargs=carried,
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
