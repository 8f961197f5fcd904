"""One process: a model whose sites matter, saved without optimizer, and what it answers on the next global batch.

Run as ``-m tests.helpers.randomised_checkpoint RESULT ITERATION <flags of the run>``. Writes to the file RESULT
(torch.save) the loss and every gradient with the sites as written and with the oracle in their place, the loss
with the sites bypassed, and how far a changed token reaches.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 30


def main() -> None:
    """Build, randomise, measure, save."""
    from megatron_graft.compat import cpu

    cpu.install()
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_graft.training.run import model_config, parse_arguments

    result, iteration = Path(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:3]
    args, _, memory = parse_arguments()
    initialize_megatron()
    config = model_config(args, memory)
    chunks = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    (model,) = unwrap_model(chunks)
    randomise_sites(model)
    args.consumed_train_samples = iteration * args.global_batch_size
    torch.save(Measurement(model, args, memory).run(), result)
    save_checkpoint(iteration, chunks, None, None, 0)


def sites_of(model: Any) -> Iterator[Any]:
    """The memory sites of a model, in the order of their layers."""
    from megatron_graft.memory.site import MemorySite

    return (module for module in model.modules() if isinstance(module, MemorySite))


def randomise_sites(model: Any) -> None:
    """Fresh sites add nothing: give every parameter a value that makes its part of the layer matter."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for site in sites_of(model):
            for name, parameter in site.named_parameters():
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if name.endswith("_norm") else noise)


class Measurement:
    """The model on the global batch that a run from this checkpoint trains first."""

    def __init__(self, model: Any, args: Any, memory: Any) -> None:
        from megatron_graft.training.data_provider import build_datasets
        from megatron_graft.training.run import chunk_layouts

        self.model, self.args, self.memory = model.train(), args, memory
        (layout,) = chunk_layouts(memory, model.config)
        self.fetcher = memory.fetcher(layout)
        train, _, _ = build_datasets(args, (args.train_iters * args.global_batch_size, 0, 0))
        first = args.consumed_train_samples
        self.samples = [train[index] for index in range(first, first + args.global_batch_size)]

    def run(self) -> dict[str, Any]:
        """Everything that the tests compare."""
        from tests.helpers.site_oracle import SiteOracle

        loss, gradients = self.loss_and_gradients()
        causality = self.reach_of_a_token()
        for site in sites_of(self.model):
            site.bypassed = True
        bypassed, _ = self.loss_and_gradients()
        oracle = SiteOracle(self.memory)
        for site in sites_of(self.model):
            site.bypassed = False
            site.forward = functools.partial(self._ask, oracle, site)
        oracle_loss, oracle_gradients = self.loss_and_gradients()
        for site in sites_of(self.model):
            del site.forward
        return {
            "loss": loss, "gradients": gradients, "bypassed": bypassed, "causality": causality,
            "oracle_loss": oracle_loss, "oracle_gradients": oracle_gradients,
        }  # fmt: skip

    def _ask(self, oracle: Any, site: Any, hidden_SBH: Any, packed: Any, exchange: Any) -> Any:
        oracle.tokens_BS = self.tokens_BS
        if hidden_SBH.shape[1] == len(self.tokens_BS):
            return oracle.forward(site, hidden_SBH)
        apart = hidden_SBH.view(len(self.tokens_BS), -1, hidden_SBH.shape[-1]).transpose(0, 1)  # packed
        return oracle.forward(site, apart).transpose(0, 1).reshape(hidden_SBH.shape)

    def loss_and_gradients(self) -> tuple[float, dict[str, Any]]:
        """Mean loss over the global batch, and the gradient of each parameter, micro-batch by micro-batch."""
        import torch
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
        from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

        size = self.args.micro_batch_size
        parts = [self.samples[start : start + size] for start in range(0, len(self.samples), size)]
        for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
            scaler.set_loss_scale(torch.tensor(1 / len(parts)))
        self.model.zero_grad()
        total = 0.0
        for part in parts:
            batch = {name: torch.stack([sample[name] for sample in part]) for name in part[0]}
            losses = self.answer(batch["tokens"], batch["labels"])
            (losses.mean() / len(parts)).backward()
            total += float(losses.detach().double().mean()) / len(parts)
        named = self.model.named_parameters()
        return total, {name: value.grad.clone() for name, value in named if value.grad is not None}

    def answer(self, tokens_BS: Any, labels_BS: Any) -> Any:
        """Token losses ``[b, s]``; logits ``[b, s, v]`` without labels."""
        import torch

        from megatron_graft.training.forward_step import run_model
        from megatron_graft.training.packing import document_bounds, packed

        self.tokens_BS = tokens_BS.tolist()
        positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        tensors = {"tokens": tokens_BS, "labels": labels_BS, "position_ids": positions}
        tensors |= {"loss_mask": torch.ones(tokens_BS.shape), "attention_mask": None}
        if self.args.dataloader_inter_document_masking:
            tensors |= document_bounds(tokens_BS, self.memory.tokenizer.eod)
        tensors, packing = packed(tensors)
        memory = self.fetcher.fetch(tokens_BS, 0).memory
        answer = run_model(self.model, tensors, (memory.packed, memory.exchange), packing)
        return answer.view(*tokens_BS.shape, *answer.shape[2:])

    def reach_of_a_token(self) -> dict[str, float]:
        """Largest change of any logit before, of those from there on, and in other documents, when a token is another.

        The tokens that are changed, and what they are changed to, end no document.
        """
        import torch

        from megatron_graft.ngram.windows import positions_in_document

        before, after, elsewhere, eod = 0.0, float("inf"), 0.0, self.memory.tokenizer.eod
        tokens_BS = torch.stack([sample["tokens"] for sample in self.samples])
        with torch.no_grad():
            original = self.answer(tokens_BS, None)
            for changed in (5, 20, 33, 50):
                other = tokens_BS.clone()
                other[:, changed] = torch.where(
                    other[:, changed] == eod, other[:, changed], (other[:, changed] + 57) % 300 + 3
                )
                difference = (self.answer(other, None) - original).abs()
                before = max(before, float(difference[:, :changed].max()))
                after = min(after, float(difference[:, changed:].max()))
                documents = torch.from_numpy((positions_in_document(tokens_BS.numpy(), eod) == 0).cumsum(axis=1))
                elsewhere = max(elsewhere, float(difference[documents != documents[:, changed, None]].max()))
        return {"before": before, "after": after, "elsewhere": elsewhere}


if __name__ == "__main__":
    main()
