"""A donor's model, cut above the highest layer wanted, running packs. No other place runs a model.

A pack is one sequence of M tokens, its positions the depths of its nodes, its attention mask the tree: a node sees
its ancestors and itself. The states are those of every text run alone, up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.building.donor_libraries import as_donor_error
from megatron_graft.building.packs import Pack
from megatron_graft.errors import DonorError
from megatron_graft.log import get_logger

# A tree mask counts as followed if states under it differ from those run alone by less than this share of what
# they differ by when every node sees all before it. Rounding, in bfloat16 too, is a twentieth or less.
_PROBE_SHARE = 0.25
_MOST_BATCHED_PACKS = 256
_MEMORY_SHARE = 0.4  # of a device's memory that the activations of one pass may take


class DonorModel:
    """The model in a directory, ready to give the states of some layers.

    Args:
        directory: a local Hugging Face directory.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of weights and activations.
        device: torch's name of the device to run on.
        num_layers: blocks the model has.
        layers: ascending; block outputs counted from 1, 0 is the embedding.

    Raises:
        DonorError: weights are missing or damaged, or there is no list of blocks.
    """

    def __init__(self, directory: Path, *, dtype: str, device: str, num_layers: int, layers: Sequence[int]) -> None:
        import torch

        self.layers = tuple(layers)
        self._directory, self._dtype, self._device = directory, getattr(torch, dtype), torch.device(device)
        self._seen = threading.local()
        model = _load(directory, self._dtype)
        self._config = model.config.get_text_config()
        self._tap(model, num_layers)
        self._model = model.to(self._device)
        self.follows_trees = self._try_tree()
        if not self.follows_trees:
            get_logger().warning("%s does not follow a tree mask; its texts share no beginnings", directory)

    def default_batch(self, pack_tokens: int) -> int:
        """Packs of one pass: 1 on a CPU; on a GPU what fits its memory, whoever else uses some of it at the moment.

        The memory a device has, not what is free, so that the same device always gets the same number.
        """
        if self._device.type != "cuda":
            return 1
        import torch

        memory = torch.cuda.get_device_properties(self._device).total_memory
        return packs_that_fit(memory, pack_tokens, self._config, self._dtype.itemsize)

    def run(
        self, packs: Sequence[Pack], nodes: Sequence[np.ndarray], batch: int = 1, pack_length: int = 0
    ) -> list[dict[int, np.ndarray]]:
        """States of some nodes of each pack.

        May run in several threads at a time on a CPU.

        Args:
            packs: at most ``batch`` of them.
            nodes: int64 ``[m]`` for each pack, indices of the nodes wanted.
            batch: sequences of the pass. Those that ``packs`` lacks are filled up, so that passes of one build
                have one shape and a pack meets the same arithmetic in whatever company.
            pack_length: tokens of each sequence, where ``batch`` is more than 1: those of the longest pack.

        Returns:
            for each pack: layer -> float32 ``[m, hidden_size]``.
        """
        if not self.follows_trees:
            return [self._run_apart(pack, wanted) for pack, wanted in zip(packs, nodes, strict=True)]
        if batch == 1:
            (pack,) = packs
            inputs = pack.tokens[None], pack.depths[None], pack.ancestors_MM()[None]
        else:
            inputs = _filled_up(packs, batch, pack_length)
        return self._run_trees(*inputs, nodes)

    def run_sequences(self, tokens_BS: np.ndarray) -> dict[int, Any]:
        """Plain causal passes: layer -> tensor ``[B, S, hidden_size]`` on the model's device, in its dtype."""
        import torch

        with torch.inference_mode():
            tokens = torch.from_numpy(tokens_BS.astype(np.int64)).to(self._device)
            return self._pass(input_ids=tokens)

    def _run_trees(
        self, tokens_BM: np.ndarray, depths_BM: np.ndarray, sees_BMM: np.ndarray, nodes: Sequence[np.ndarray]
    ) -> list[dict[int, np.ndarray]]:
        import torch

        with torch.inference_mode():
            sees = torch.from_numpy(sees_BMM).to(self._device)[:, None]
            mask = torch.zeros(sees.shape, dtype=self._dtype, device=self._device)
            mask.masked_fill_(~sees, torch.finfo(self._dtype).min)
            states = self._pass(
                input_ids=torch.from_numpy(tokens_BM.astype(np.int64)).to(self._device),
                position_ids=torch.from_numpy(depths_BM.astype(np.int64)).to(self._device),
                attention_mask=mask,
            )
            return [_taken(states, number, None, wanted) for number, wanted in enumerate(nodes)]

    def _run_apart(self, pack: Pack, nodes: np.ndarray) -> dict[int, np.ndarray]:
        """The same states from whole sequences, equal lengths together: for models that follow no tree mask."""
        import torch

        is_leaf = np.ones(len(pack), dtype=bool)
        is_leaf[pack.parents[pack.parents >= 0]] = False
        (leaves,) = np.nonzero(is_leaf)
        # Depth first, the first leaf from a node on lies below it (or is it).
        carrier = leaves[np.searchsorted(leaves, nodes)]
        width = self._config.hidden_size
        out = {layer: np.empty((len(nodes), width), dtype=np.float32) for layer in self.layers}
        for depth in np.unique(pack.depths[carrier]):
            runs = np.unique(carrier[pack.depths[carrier] == depth])
            path = [runs]
            for _ in range(depth):
                path.append(pack.parents[path[-1]])
            with torch.inference_mode():
                states = self.run_sequences(pack.tokens[np.stack(path[::-1], axis=1)])
                (rows,) = np.nonzero(pack.depths[carrier] == depth)
                sequences = np.searchsorted(runs, carrier[rows])
                for layer, found in _taken(states, sequences, self._device, pack.depths[nodes[rows]]).items():
                    out[layer][rows] = found
        return out

    def _pass(self, **inputs: Any) -> dict[int, Any]:
        import torch

        self._seen.states = {}
        try:
            self._model(use_cache=False, **inputs)
        except torch.OutOfMemoryError as error:
            raise DonorError(
                self._directory,
                "needs more memory than the device has",
                got=f"{tuple(inputs['input_ids'].shape)} tokens in one pass",
                remedy="Give a smaller --batch-packs or --pack-tokens.",
            ) from error
        return {layer: self._seen.states[layer] for layer in self.layers}

    def _tap(self, model: Any, num_layers: int) -> None:
        """Hook the wanted blocks and drop those above the highest."""
        import torch

        blocks = next(
            (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == num_layers),
            None,
        )
        if blocks is None:
            raise DonorError(self._directory, "has no list of blocks that could be tapped", got=type(model).__name__)
        del blocks[max(1, *self.layers) :]

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: Any, _arguments: Any, output: Any) -> None:
                self._seen.states[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        def keep_input(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._seen.states[0] = arguments[0] if arguments else keywords["hidden_states"]

        for layer in self.layers:
            if layer == 0:
                blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)
            else:
                blocks[layer - 1].register_forward_hook(keep(layer))

    def _try_tree(self) -> bool:
        """Whether a small pack gives the states of its texts run alone.

        Not every model takes a mask of four dimensions, or has positions and attention at all.
        """
        tokens = np.array([1, 2, 3, 4, 3, 2, 5], dtype=np.int32) % int(self._config.vocab_size)
        parents = np.array([-1, 0, 1, 1, 0, 4, 5], dtype=np.int32)
        depths = np.array([0, 1, 2, 2, 1, 2, 3], dtype=np.int32)
        pack, nodes = Pack(tokens=tokens, parents=parents, depths=depths), np.arange(3, 7)  # those after a stranger
        alone = self._run_apart(pack, nodes)
        try:
            tree, line = (
                self._run_trees(tokens[None], depths[None], sees[None], [nodes])[0]
                for sees in (pack.ancestors_MM(), np.tri(len(pack), dtype=bool))
            )
        except Exception:  # a model that was not made for this may fail in any way
            return False
        return all(
            _typical_difference(tree[layer], alone[layer])
            <= _PROBE_SHARE * _typical_difference(line[layer], alone[layer])
            for layer in self.layers
        )


def packs_that_fit(memory: int, pack_tokens: int, config: Any, itemsize: int) -> int:
    """How many packs one pass can hold: a power of two, 1 to 256.

    Args:
        memory: bytes of the device.
        pack_tokens: nodes of a pack.
        config: the model's text configuration.
        itemsize: bytes of an activation.
    """
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    # Block input, projections and the feed-forward's halves; scores of all heads as if none were fused; the mask.
    token = itemsize * (16 * width + 4 * inner)
    pair = heads * (4 + itemsize) + itemsize + 1
    fits = int(_MEMORY_SHARE * memory) // (pack_tokens * token + pack_tokens**2 * pair)
    return min(_MOST_BATCHED_PACKS, 1 << max(0, fits.bit_length() - 1))


def _filled_up(packs: Sequence[Pack], batch: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, depths and sight of ``[batch, length]`` nodes; those that fill up see themselves alone."""
    tokens, depths = np.zeros((batch, length), dtype=np.int32), np.zeros((batch, length), dtype=np.int32)
    sees = np.broadcast_to(np.eye(length, dtype=bool), (batch, length, length)).copy()
    for number, pack in enumerate(packs):
        size = len(pack)
        tokens[number, :size], depths[number, :size] = pack.tokens, pack.depths
        sees[number, :size, :size] = pack.ancestors_MM()
    return tokens, depths, sees


def _taken(
    states: dict[int, Any], sequences: int | np.ndarray, device: Any, positions: np.ndarray
) -> dict[int, np.ndarray]:
    """Pick states out of ``[B, S, D]`` tensors, before they are copied from their device."""
    import torch

    at = torch.from_numpy(positions.astype(np.int64))
    run = torch.from_numpy(sequences).to(device) if isinstance(sequences, np.ndarray) else sequences
    return {layer: state[run, at.to(state.device)].float().cpu().numpy() for layer, state in states.items()}


def _typical_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Median difference of a state, as a share of its norm; infinite if it is no number."""
    share = np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float(np.nan_to_num(np.median(share), nan=np.inf))


def _load(directory: Path, dtype: Any) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    # Its bars and its list of unused weights (the language-model head) say nothing of use here.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with as_donor_error(directory, "has weights that transformers cannot load"):
        model, loaded = AutoModel.from_pretrained(
            directory, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    if loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        raise DonorError(directory, "lacks weights of its model", got=sorted(loaded["missing_keys"])[:5])
    return model.eval()
