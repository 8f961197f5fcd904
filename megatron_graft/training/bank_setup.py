"""Opening the banks of a run and checking that they, the run and its data sets have one tokenizer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_graft.bank.node_copy import node_copy
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.commands import is_number
from megatron_graft.data.sidecar import read_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import BankError, ConfigError, IdentityError
from megatron_graft.log import get_logger
from megatron_graft.training.settings import GraftSettings


def checked_banks(settings: GraftSettings, tokenizer: TextTokenizer) -> tuple[Bank, ...]:
    """The run's banks where they lie, found to fit the run. Cheap: nothing is copied, no key and no row is read.

    Raises:
        BankError: a bank cannot be used.
        IdentityError: a bank was made for another tokenizer.
        ConfigError: a bank has fewer rows than asked for.
    """
    banks = tuple(open_bank(path) for path in settings.banks)
    for bank in banks:
        if settings.bank_rows is not None and settings.bank_rows > bank.num_rows:
            raise ConfigError(
                "--bank-rows", f"is more than the bank {bank.path} has", got=settings.bank_rows,
                expected=f"at most {bank.num_rows}", remedy="Leave it out to use all rows.",
            )  # fmt: skip
        _check_normalised(bank, settings)
        check_bank_tokenizer(bank, tokenizer)
    return banks


def open_run_bank(path: Path, settings: GraftSettings) -> Bank:
    """A bank of the run, or of it the rows that the run uses, from the node's copy if that is wanted.

    Raises:
        BankError: the bank is not what it should be, as deeply as ``--graft-verify-bank`` looks.
        StorageError: it cannot be copied to the node.
    """
    if settings.bank_node_copy is not None:
        path = node_copy(path, settings.bank_node_copy)
    return open_bank(
        path,
        verify=settings.verify_bank,  # type: ignore[arg-type]
        rows=settings.bank_rows,
        threads=settings.bank_lookup_threads,
    )


def _check_normalised(bank: Bank, settings: GraftSettings) -> None:
    if not bank.manifest.identity.processing.normalised and not settings.allow_raw_bank:
        raise BankError(
            bank.path, "holds raw rows, whose scale differs by orders of magnitude between n-grams",
            remedy="Rebuild it without --raw, or accept it with --graft-allow-raw-bank.",
        )  # fmt: skip


def run_tokenizer(args: argparse.Namespace) -> TextTokenizer:
    """The tokenizer file that Megatron's ``--tokenizer-model`` names, as ours."""
    if not args.tokenizer_model:
        raise ConfigError("--tokenizer-model", "is required: a memory's n-grams are ids of one tokenizer")
    path = Path(args.tokenizer_model)
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def check_bank_tokenizer(bank: Bank, tokenizer: TextTokenizer) -> None:
    """Compare a bank's tokenizer with the run's.

    Raises:
        IdentityError: they differ.
    """
    if tokenizer.fingerprint != bank.tokenizer_fingerprint:
        raise IdentityError(
            f"--tokenizer-model {tokenizer.path}", f"is not the tokenizer of the bank {bank.path}",
            got=tokenizer.fingerprint, expected=bank.tokenizer_fingerprint,
            remedy="Use the bank's tokenizer, or rebuild the bank with this one.",
        )  # fmt: skip


def check_tokenizer(tokenizer: TextTokenizer, args: argparse.Namespace) -> None:
    """Compare the run's tokenizer with the one that made each of its data sets.

    Raises:
        IdentityError: they differ.
    """
    for prefix in data_prefixes(args):
        sidecar = read_sidecar(prefix)
        if sidecar is None:
            get_logger().warning(
                "%s has no tokenizer fingerprint beside it: that its ids are this tokenizer's is taken on trust", prefix
            )
        elif sidecar.fingerprint != tokenizer.fingerprint:
            raise IdentityError(
                f"data set {prefix}", f"was tokenised by another tokenizer than {tokenizer.path}",
                got=sidecar.fingerprint, expected=tokenizer.fingerprint,
                remedy="Tokenise the data again with this tokenizer, or give the run the data's.",
            )  # fmt: skip


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Every data set prefix that the run's flags name, and the files that they name (weights of blends left out).

    Raises:
        ConfigError: such a file cannot be read.
    """
    blends = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    if args.data_args_path is not None:
        blends.append(_read("--data-args-path", args.data_args_path, str.split))
    if args.per_split_data_args_path is not None:
        by_split = _read("--per-split-data-args-path", args.per_split_data_args_path, json.loads)
        blends += [blend.split() if isinstance(blend, str) else blend for blend in by_split.values()]
    return list(dict.fromkeys(str(item) for blend in blends for item in blend or [] if not is_number(str(item))))


def _read(flag: str, path: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(flag, f"cannot be read: {error}", got=path) from error
