"""A GGUF file made into a plain Hugging Face directory: ``config.json``, ``model.safetensors`` in bf16, tokenizer.

Converted once: the directory loads offline in a second or so, where the quantised file takes half a minute.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from megatron_graft.building.donor_libraries import as_donor_error, missing_extra, offline
from megatron_graft.errors import DonorError
from megatron_graft.log import get_logger

_MAGIC = b"GGUF"


def convert_gguf(file: Path, output: Path) -> None:
    """Dequantise ``file`` and write configuration, weights and tokenizer into the directory ``output``.

    The tensors are read with transformers' GGUF reader and loaded here, because its own loader asks for one
    more package and yields a model that refuses to be saved.

    Raises:
        DonorError: it is no GGUF file, of a model that transformers cannot read, or does not fit its own
            configuration; or the packages that read it are missing.
    """
    _require_gguf(file)
    get_logger().info("converting %s to bf16 safetensors", file.name)
    with offline():
        try:
            import gguf  # noqa: F401  (transformers asks for it only deep inside)
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        except ImportError as error:
            raise missing_extra(error) from error
        with as_donor_error(file, "cannot be read by transformers"):
            config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with contextlib.redirect_stderr(io.StringIO()):  # the readers draw their own progress bars
                tensors = load_gguf_checkpoint(
                    str(file), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
                )["tensors"]
                tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            outcome = model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        left_over = (set(outcome.missing_keys) - tied) | set(outcome.unexpected_keys)
        if left_over:
            raise DonorError(file, "its tensors do not fit the model", got=sorted(left_over)[:5])
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    for written in output.iterdir():
        written.chmod(0o644)  # the weights come out readable by their owner alone


def _require_gguf(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_MAGIC))
    except OSError as error:
        raise DonorError(file, "cannot be read", got=error.strerror, expected="a GGUF file") from error
    if start != _MAGIC:
        raise DonorError(file, "is no GGUF file", got=f"it begins with {start!r}", expected=f"{_MAGIC!r}")
