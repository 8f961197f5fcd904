"""A donor from a local Hugging Face directory: what it is, its texts' ids, and the states of packs."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_graft.building.donor_libraries import as_donor_error, missing_extra, offline
from megatron_graft.building.donor_model import DonorModel
from megatron_graft.building.donor_text import DonorText
from megatron_graft.building.fetch import recorded_name
from megatron_graft.building.packs import DEFAULT_PACK_TOKENS, Packs, flat_token_lists, plan_packs
from megatron_graft.errors import DonorError
from megatron_graft.files import canonical_json, sha256_of_file
from megatron_graft.log import get_logger
from megatron_graft.processes import available_processors

DonorDtype = Literal["auto", "bfloat16", "float16", "float32"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_WAITING_PER_THREAD = 4  # finished passes that may wait for their turn


class HuggingFaceDonor:
    """A causal language model in a local directory: ``config.json``, ``*.safetensors`` and tokenizer files.

    Nothing is fetched and no code from the directory is run. Making one reads the configuration, the tokenizer
    and the weights' digest; the model itself is loaded when states are first asked for, and kept.

    On a CPU a pack is one pass on one thread, so its states do not depend on threads, tasks or processes. On a
    GPU several packs share a pass; states are the same for the same device, libraries and ``batch_packs``, and
    differ otherwise by rounding.

    Args:
        directory: the model's directory.
        dtype: type of weights and activations; ``auto`` is bfloat16 on a GPU and float32 on a CPU (many CPUs
            have no bfloat16 arithmetic and emulate it at a tenth of the speed).
        pack_tokens: most donor tokens of a pack, where :meth:`encode` makes the packs.
        threads: passes that run at a time on a CPU, each on one thread. None: the process's processors, divided
            by ``LOCAL_WORLD_SIZE`` where a launcher such as torchrun has set it.
        batch_packs: packs of one pass. None: one on a CPU, what fits the device's memory on a GPU.
        device: torch's name of a device; ``auto`` is the GPU of ``LOCAL_RANK``, or the CPU where there is none.

    Raises:
        DonorError: the directory has no weights, tokenizer or configuration, is no causal language model, or an
            option is out of range.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        dtype: DonorDtype = "auto",
        pack_tokens: int = DEFAULT_PACK_TOKENS,
        threads: int | None = None,
        batch_packs: int | None = None,
        device: str = "auto",
    ) -> None:
        self.directory = Path(directory)
        self._pack_tokens, self._batch_packs = pack_tokens, batch_packs
        if dtype not in get_args(DonorDtype):
            known = ", ".join(get_args(DonorDtype))
            raise DonorError("--donor-dtype", "is unknown", got=dtype, expected=known)
        for flag, value in (
            ("--pack-tokens", pack_tokens), ("--threads", threads), ("--batch-packs", batch_packs),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise DonorError(flag, "is not positive", got=value, expected="at least 1")
        weights = _weight_files(self.directory)
        config = _load_config(self.directory)
        text_config = config.get_text_config()
        self.hidden_size = int(text_config.hidden_size)
        self.num_layers = int(text_config.num_hidden_layers)
        self._max_tokens = _longest_text(text_config)
        self._text = DonorText(_load_tokenizer(self.directory), config, self.directory)
        self.name = recorded_name(self.directory)
        self.revision = _revision(weights)
        self._threads = threads or default_threads()
        self._device = _default_device() if device == "auto" else device
        self._dtype = ("float32" if self._device == "cpu" else "bfloat16") if dtype == "auto" else dtype
        self._model: DonorModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel between processes without the model, which loads again where it is needed."""
        return self.__dict__ | {"_model": None}

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise :class:`DonorError` unless ``layers`` are distinct, ascending and exist."""
        fits = bool(layers) and list(layers) == sorted(set(layers))
        if not fits or layers[0] < 0 or layers[-1] > self.num_layers:
            raise DonorError(
                "--donor-layers",
                f"does not name layers of {self.name}",
                got=" ".join(map(str, layers)) or "none",
                expected=f"distinct layers in ascending order, 1 to {self.num_layers} (0 is the embedding)",
            )

    def settings(self) -> dict[str, Any]:
        """The type it runs in, the token that every text begins with and, on a GPU, the packs of a pass."""
        bos = {"donor_bos_id": self._text.bos_id, "donor_bos": self._text.bos_source}
        # On a GPU the number of packs of a pass decides how sums are rounded.
        batch = {} if self._device == "cpu" else {"donor_batch_packs": self._batch_packs or "auto"}
        return {"donor_dtype": self._dtype, **bos, **batch}

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """Donor ids of every text, BOS first; a leading space counts.

        Raises:
            DonorError: a text is too long for the model.
        """
        token_lists = self._text.token_lists(texts)
        longest = max(range(len(token_lists)), key=lambda row: len(token_lists[row]), default=None)
        if longest is not None and len(token_lists[longest]) > self._max_tokens:
            raise DonorError(
                self.directory,
                "is too short for an n-gram's text",
                got=f"{len(token_lists[longest])} tokens for {texts[longest][:200]!r}",
                expected=f"at most {self._max_tokens} (its context or its attention window)",
                remedy="Count shorter orders, or take another donor.",
            )
        return token_lists

    def states(
        self, packs: Packs, first_pack: int, last_pack: int, layers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray]]]:
        """Run packs ``first_pack`` to ``last_pack``, the last not included.

        Yields:
            for each pack in turn: the places in ``packs`` that rows take, int64 ``[m]``, ascending, and their
            states, layer -> float32 ``[m, hidden_size]``.

        Raises:
            DonorError: a layer does not exist, the weights cannot be loaded, or a state is not finite.
        """
        self.check_layers(layers)
        if first_pack == last_pack:
            return
        model = self.model(layers)
        longest = int(np.diff(packs.pack_starts).max())
        batch = self._batch_packs or model.default_batch(longest)

        def run(numbers: Sequence[int]) -> list[tuple[np.ndarray, dict[int, np.ndarray]]]:
            places = [packs.taken_in(number, number + 1) for number in numbers]
            nodes = [at - packs.pack_starts[number] for number, at in zip(numbers, places, strict=True)]
            found = model.run([packs[number] for number in numbers], nodes, batch, longest)
            return list(zip(places, found, strict=True))

        groups = itertools.batched(range(first_pack, last_pack), batch)
        threads = self._threads if self._device == "cpu" else 1
        for results in in_threads(run, groups, threads):
            for places, states in results:
                self._require_finite(packs, places, states)
                yield places, states

    def encode(self, texts: Sequence[str], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Run BOS + text for every text; take the state of its last token after each of ``layers``.

        Args:
            texts: N strings, none empty; a leading space counts.
            layers: block outputs counted from 1, before the final norm; 0 is the embedding.

        Returns:
            layer -> float32 ``[N, hidden_size]``.

        Raises:
            DonorError: a layer does not exist, a text is too long for the model, or a state is not finite.
        """
        self.check_layers(layers)
        packs = plan_packs(*flat_token_lists(self.token_lists(texts)), self._pack_tokens)
        states = {layer: np.empty((len(packs.taken), self.hidden_size), dtype=np.float32) for layer in layers}
        done = 0
        for places, found in self.states(packs, 0, len(packs), layers):
            for layer, states_MD in found.items():
                states[layer][done : done + len(places)] = states_MD
            done += len(places)
        row = np.searchsorted(packs.taken, packs.node_of_row)
        return {layer: states_KD[row] for layer, states_KD in states.items()}

    def model(self, layers: Sequence[int]) -> DonorModel:
        """The loaded model that gives the states of ``layers``; one is kept.

        Raises:
            DonorError: its weights are missing or damaged.
        """
        if self._model is None or self._model.layers != tuple(layers):
            self._model = None  # not two of them at a time
            with offline():
                self._model = DonorModel(
                    self.directory,
                    dtype=self._dtype,
                    device=self._device,
                    num_layers=self.num_layers,
                    layers=layers,
                )
            get_logger().info("%s: layers %s in %s on %s", self.name, [*layers], self._dtype, self._device)
        return self._model

    def _require_finite(self, packs: Packs, places: np.ndarray, states: dict[int, np.ndarray]) -> None:
        for layer, states_MD in states.items():
            broken = ~np.isfinite(states_MD).all(axis=1)
            if broken.any():
                text = self._text.text(packs.token_path(int(places[np.argmax(broken)]))[1:])
                raise DonorError(
                    self.directory,
                    "gives a state that is not finite",
                    got=f"layer {layer} of {text[:200]!r} in {self._dtype}",
                    remedy="Run the donor with --donor-dtype float32.",
                )


def default_threads() -> int:
    """Processors of this process, divided by the processes that a launcher has started on the node; at least 1."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, available_processors() // max(1, processes))


def _default_device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    # Ranks that see one GPU each call it 0, whatever their local rank.
    return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"


def _longest_text(config: Any) -> int:
    """Most tokens of a text: the model's context, and the window of its attention, which a tree mask does not have."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((int(limit) for limit in limits if limit), default=np.iinfo(np.int32).max)


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise DonorError(directory, "is not a directory", expected="a local Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise DonorError(directory, "has no config.json", expected="a local Hugging Face model directory")
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise DonorError(
            directory,
            "has no weights",
            expected="*.safetensors files",
            remedy="Download the whole model, or save it with save_pretrained.",
        )
    return weights


def _revision(weights: Sequence[Path]) -> str:
    digests = {file.name: sha256_of_file(file) for file in weights}
    return hashlib.sha256(canonical_json(digests)).hexdigest()


def _load_config(directory: Path) -> Any:
    with offline():
        try:
            from transformers import AutoConfig
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        except ImportError as error:
            raise missing_extra(error) from error
        with as_donor_error(directory, "has a config.json that transformers cannot read"):
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
    known = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    architectures = list(config.architectures or [])
    causal = any(name in known for name in architectures) or (
        not architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if not causal or config.is_encoder_decoder:
        raise DonorError(
            directory,
            "is not a causal language model",
            got=", ".join(architectures) or config.model_type,
            expected="an architecture such as LlamaForCausalLM",
        )
    return config


def _load_tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise DonorError(
            directory, "has no tokenizer", expected="one of " + ", ".join(_TOKENIZER_FILES),
            remedy="Copy the model's tokenizer files into it.",
        )  # fmt: skip
    with offline(), as_donor_error(directory, "has a tokenizer that transformers cannot load"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True, split_special_tokens=True)


def in_threads[Work, Result](run: Callable[[Work], Result], work: Iterator[Work], threads: int) -> Iterator[Result]:
    """Run ``threads`` pieces at a time and yield their results in order, few of them ahead of time.

    Packs side by side, one CPU thread each, instead of several threads inside one pass: the operations are so
    small that the threads would mostly wait for each other (several times slower as soon as the machine does
    anything else), and a pass on one thread gives the same bits however many run beside it.
    """
    import torch

    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for piece in work:
            waiting.append(executor.submit(run, piece))
            if len(waiting) >= threads * _WAITING_PER_THREAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
