"""A donor from a local Hugging Face directory, run with transformers. No other place runs a model."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_graft.building.donor_text import DonorText
from megatron_graft.building.fetch import missing_extra, offline, recorded_name
from megatron_graft.building.plan import DonorBatch, plan_batches
from megatron_graft.errors import DonorError
from megatron_graft.files import canonical_json, sha256_of_file
from megatron_graft.log import Progress, get_logger

DonorDtype = Literal["bfloat16", "float16", "float32"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


class HuggingFaceDonor:
    """A causal language model in a local directory: ``config.json``, ``*.safetensors`` and tokenizer files.

    Nothing is fetched and no code from the directory is run. Making one reads the configuration, the
    tokenizer and the weights' digest; :meth:`encode` loads the model itself and runs it only up to the
    highest layer asked for.

    Args:
        directory: the model's directory.
        dtype: type of weights and activations.
        batch_tokens: most donor tokens of one forward pass.
        threads: forward passes that run at a time, each on one CPU thread. The states do not depend on it.

    Raises:
        DonorError: the directory has no weights, tokenizer or configuration, or is no causal language model.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        dtype: DonorDtype = "bfloat16",
        batch_tokens: int = 1024,
        threads: int = 2,
    ) -> None:
        self.directory = Path(directory)
        self._dtype, self._batch_tokens, self._threads = dtype, batch_tokens, threads
        if dtype not in get_args(DonorDtype):
            known = ", ".join(get_args(DonorDtype))
            raise DonorError("--donor-dtype", "is unknown", got=dtype, expected=known)
        if batch_tokens < 1 or threads < 1:
            flag, value = ("--batch-tokens", batch_tokens) if batch_tokens < 1 else ("--threads", threads)
            raise DonorError(flag, "is not positive", got=value, expected="at least 1")
        weights = _weight_files(self.directory)
        config = _load_config(self.directory)
        text_config = config.get_text_config()
        self.hidden_size = int(text_config.hidden_size)
        self.num_layers = int(text_config.num_hidden_layers)
        self._max_tokens = getattr(text_config, "max_position_embeddings", None)
        self._text = DonorText(_load_tokenizer(self.directory), config, self.directory)
        self.name = recorded_name(self.directory)
        self.revision = _revision(weights)

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
        """The type it runs in and the token that every text begins with."""
        bos = {"donor_bos_id": self._text.bos_id, "donor_bos": self._text.bos_source}
        return {"donor_dtype": self._dtype, **bos}

    def encode(self, texts: Sequence[str], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Run BOS + text for every text; take the state of its last token after each of ``layers``.

        Args:
            texts: N strings, none empty; a leading space counts.
            layers: block outputs counted from 1, before the final norm; 0 is the embedding.

        Returns:
            layer -> float32 ``[N, hidden_size]``.

        Raises:
            DonorError: a layer does not exist, or a text is too long for the model.
        """
        self.check_layers(layers)
        token_lists = self._text.token_lists(texts)
        self._check_lengths(texts, token_lists)
        batches = plan_batches(token_lists, self._batch_tokens)
        tokens = sum(batch.tokens_BS.size for batch in batches)
        get_logger().info("%s: %s rows cost %s donor tokens", self.name, f"{len(texts):,}", f"{tokens:,}")
        states = {layer: np.empty((len(texts), self.hidden_size), dtype=np.float32) for layer in layers}
        with offline():
            model = _load_model(self.directory, self._dtype)
        run = _runner(model, self.num_layers, layers, self.directory)
        progress = Progress("encoding", len(texts), "rows")
        for batch, taken in zip(batches, _in_threads(run, batches, self._threads), strict=True):
            for layer, states_MD in taken.items():
                states[layer][batch.rows] = states_MD
            progress.advance(len(batch.rows))
        progress.finish()
        return states

    def _check_lengths(self, texts: Sequence[str], token_lists: Sequence[Sequence[int]]) -> None:
        longest = max(range(len(texts)), key=lambda row: len(token_lists[row]))
        if self._max_tokens is not None and len(token_lists[longest]) > self._max_tokens:
            raise DonorError(
                self.directory,
                "is too short for an n-gram's text",
                got=f"{len(token_lists[longest])} tokens for {texts[longest]!r}",
                expected=f"at most {self._max_tokens} (its max_position_embeddings)",
                remedy="Count shorter orders, or take another donor.",
            )


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
        with _as_donor_error(directory, "has a config.json that transformers cannot read"):
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
    with offline(), _as_donor_error(directory, "has a tokenizer that transformers cannot load"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True, split_special_tokens=True)


def _load_model(directory: Path, dtype: DonorDtype) -> Any:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    # Its bars and its list of unused weights (the language-model head) say nothing of use here.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with _as_donor_error(directory, "has weights that transformers cannot load"):
        model, loaded = AutoModel.from_pretrained(
            directory, local_files_only=True, dtype=getattr(torch, dtype), output_loading_info=True
        )
    if loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        raise DonorError(directory, "lacks weights of its model", got=sorted(loaded["missing_keys"])[:5])
    return model.eval()


def _runner(
    model: Any, num_layers: int, layers: Sequence[int], subject: object
) -> Callable[[DonorBatch], dict[int, np.ndarray]]:
    """Hook the wanted blocks, drop those above the highest, and return a function that runs a batch.

    The function may run in several threads at a time.
    """
    import torch

    blocks = next(
        (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers),
        None,
    )
    if blocks is None:
        raise DonorError(subject, "has no list of blocks that could be tapped", got=type(model).__name__)
    del blocks[max(1, *layers) :]
    seen = threading.local()

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            seen.states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.states[0] = arguments[0] if arguments else keywords["hidden_states"]

    for layer in layers:
        if layer == 0:
            blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        else:
            blocks[layer - 1].register_forward_hook(keep(layer))

    def run(batch: DonorBatch) -> dict[int, np.ndarray]:
        seen.states = {}
        sequences, positions = torch.from_numpy(batch.sequences), torch.from_numpy(batch.positions)
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(batch.tokens_BS), use_cache=False)
            return {layer: seen.states[layer][sequences, positions].float().numpy() for layer in layers}

    return run


def _in_threads(
    run: Callable[[DonorBatch], dict[int, np.ndarray]], batches: Sequence[DonorBatch], threads: int
) -> Iterator[dict[int, np.ndarray]]:
    """Run the batches ``threads`` at a time and yield their results in order.

    Batches side by side, one CPU thread each, instead of several threads inside one pass: the operations are
    so small that the threads would mostly wait for each other (several times slower as soon as the machine
    does anything else), and a pass on one thread gives the same bits however many run beside it.
    """
    import torch

    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from executor.map(run, batches)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@contextlib.contextmanager
def _as_donor_error(directory: Path, problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken file surfaces as almost any exception from these libraries
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise DonorError(directory, problem, got=f"{type(error).__name__}: {first_line[:200]}") from error
