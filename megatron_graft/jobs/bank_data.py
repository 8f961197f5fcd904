"""Data sets and tokenizers as the commands about banks take them: ``NAME=PREFIX`` and ``--tokenizer-model``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.data.sidecar import require_same_tokenizer, sidecar_path
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import ConfigError
from megatron_graft.log import get_logger


def named_prefixes(values: Iterable[str], flag: str, form: str = "NAME=PREFIX") -> dict[str, str]:
    """``NAME=PREFIX`` arguments of ``flag`` as a mapping, in their order.

    Raises:
        ConfigError: one is malformed, or a name is given twice.
    """
    named: dict[str, str] = {}
    for value in values:
        name, separator, prefix = value.partition("=")
        if not (name and separator and prefix):
            raise ConfigError(flag, "is malformed", got=value, expected=form)
        if name in named:
            raise ConfigError(flag, "has a name twice", got=name, expected="different names")
        named[name] = prefix
    return named


def open_documents(prefixes: Sequence[str], split: str | None, tokenizer: TextTokenizer) -> MegatronDocuments:
    """Open data sets that ``tokenizer`` made; a data set without a note about its tokenizer is trusted aloud.

    Raises:
        DataError: a data set cannot be read.
        IdentityError: it was made by another tokenizer.
    """
    documents = MegatronDocuments(prefixes, split=split, vocab_size=tokenizer.vocab_size)
    for prefix in prefixes:
        if not require_same_tokenizer(prefix, tokenizer):
            missing = sidecar_path(prefix)
            get_logger().warning("%s: no such file; trusting that --tokenizer-model made the data", missing)
    return documents
