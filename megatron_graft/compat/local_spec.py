"""Two modules that Megatron's local (Transformer-Engine-free) layer spec lacks, put in by editing a copy of the spec.

* A norm that may be used under sequence parallelism: the stock one refuses it, although all that is missing is the
  ``sequence_parallel`` tag that makes Megatron sum the parameter's gradient over the tensor-parallel group.
* Core attention through torch's scaled-dot-product kernel; the stock one is unfused and slow on CPU. It is a softmax
  under a causal mask and nothing else, so a model with attention dropout, a window, scaling by layer or another softmax
  keeps the stock module. Under context parallelism, which the stock one refuses, it is
  :class:`~megatron_graft.compat.context_attention.ContextParallelAttention`.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_graft.compat.context_attention import ContextParallelAttention
from megatron_graft.errors import ConfigError


class TaggedTorchNorm:
    """``torch.nn.RMSNorm`` or ``LayerNorm`` whose parameters carry Megatron's sequence-parallel tag."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        """Build the norm that ``config.normalization`` names, ``hidden_size`` wide.

        Raises:
            ConfigError: its weights are to be kept less one, which torch's norms know nothing of.
        """
        if config.layernorm_zero_centered_gamma:
            raise ConfigError(
                "--apply-layernorm-1p", "is not known to torch's norms, which --transformer-impl local has here",
                remedy="Leave it out, or use Transformer Engine.",
            )  # fmt: skip
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps).to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class FusedCoreAttention(DotProductAttention):  # type: ignore[misc]
    """Causal attention by ``scaled_dot_product_attention``; same arguments and shapes as the class it replaces."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """``[s, b, heads, d]`` each -> ``[s, b, heads * d]``; the mask is causal whatever is passed.

        Of packed sequences ``[t, heads, d]`` -> ``[t, heads * d]``, document by document.
        """
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            documents = zip(*(part.unsqueeze(1).split(lengths) for part in (query, key, value)), strict=True)
            return torch.cat([self.forward(*parts, attention_mask) for parts in documents]).flatten(1)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def complete_local_spec(spec: Any, config: Any) -> Any:
    """Return a copy of a (nested) local spec with the modules above in place of the stock ones.

    Args:
        spec: Megatron's, of layers or of a block.
        config: Megatron's ``TransformerConfig``.
    """
    replacements: dict[Any, Any] = {WrappedTorchNorm: TaggedTorchNorm}
    if _is_plain(config):
        one = config.context_parallel_size == 1
        replacements[DotProductAttention] = FusedCoreAttention if one else ContextParallelAttention
    return _replace(copy.deepcopy(spec), replacements)


def _is_plain(config: Any) -> bool:
    """Whether attention is softmax under a causal mask, without anything else."""
    return (
        config.attention_dropout == 0.0
        and not config.apply_query_key_layer_scaling
        and config.window_size is None
        and config.softmax_type == "vanilla"
    )


def _replace(node: Any, replacements: dict[Any, Any]) -> Any:
    if isinstance(node, ModuleSpec):
        node.module = replacements.get(node.module, node.module)
        node.submodules = _replace(node.submodules, replacements)
    elif isinstance(node, partial):
        keywords = {name: _replace(value, replacements) for name, value in node.keywords.items()}
        return partial(node.func, *node.args, **keywords)
    elif isinstance(node, list):
        return [_replace(item, replacements) for item in node]
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            setattr(node, field.name, _replace(getattr(node, field.name), replacements))
    elif isinstance(node, type):
        return replacements.get(node, node)
    return node
