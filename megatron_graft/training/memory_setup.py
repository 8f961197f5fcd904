"""Opening the bank of a run and checking that it belongs to the run's tokenizer and model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_graft.bank.node_copy import node_copy
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.data.sidecar import read_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import BankError, ConfigError, IdentityError
from megatron_graft.log import get_logger
from megatron_graft.lookup.index import SuffixIndex, open_index
from megatron_graft.memory.site import SiteConfig
from megatron_graft.training.arguments import GraftSettings


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """The memory of a run: its bank, how it is searched, and what its sites are.

    Attributes:
        bank: the open bank.
        index: its suffix index.
        layers: global, 1-based layer numbers of the sites.
        site: configuration shared by the sites.
    """

    bank: Bank
    index: SuffixIndex
    layers: tuple[int, ...]
    site: SiteConfig


def open_run_memory(settings: GraftSettings, args: argparse.Namespace) -> RunMemory | None:
    """Open and check everything that the sites will need; None for the stock model.

    Raises:
        BankError: the bank cannot be used.
        IdentityError: the bank was made for another tokenizer than the run's or its data's.
        ConfigError: the sequence is shorter than an n-gram, or the bank has fewer rows than asked for.
        StorageError: the bank cannot be copied to the node.
    """
    if settings.bank is None:
        return None
    bank = open_bank(settings.bank)  # cheap: what does not fit the run is refused before anything is copied or read
    if settings.bank_rows is not None and settings.bank_rows > bank.num_rows:
        raise ConfigError(
            "--bank-rows", f"is more than the bank {bank.path} has", got=settings.bank_rows,
            expected=f"at most {bank.num_rows}", remedy="Leave it out to use all rows.",
        )  # fmt: skip
    _check_normalised(bank, settings)
    check_tokenizer(bank, args)
    if args.seq_length < bank.max_order:
        raise ConfigError(
            "--seq-length", "is shorter than the bank's longest n-gram", got=args.seq_length,
            expected=f"at least {bank.max_order}", remedy="Lengthen it, or build a bank with shorter --orders.",
        )  # fmt: skip
    bank = _open_run_bank(settings.bank, settings)
    site = SiteConfig(
        row_layout=bank.row_layout,
        conv_kernel=settings.conv_kernel,
        conv_dilation=settings.conv_dilation or bank.max_order,
        seed=args.seed,
        init_std=args.init_method_std,
    )
    index = open_index(
        bank,
        settings.lookup,  # type: ignore[arg-type]
        pages="huge" if settings.bank_huge_pages else "file",
        threads=settings.bank_lookup_threads,
    )
    get_logger().info("bank %s: %s rows x %d, identity %s", bank.path, f"{bank.num_rows:,}", bank.row_dim, bank.digest)
    return RunMemory(bank=bank, index=index, layers=settings.layers, site=site)


def _open_run_bank(path: Path, settings: GraftSettings) -> Bank:
    """The run's bank, or of it the rows that the run uses, from the node's copy if one is wanted."""
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
        raise ConfigError("--tokenizer-model", "is required: the bank's n-grams are ids of one tokenizer")
    path = Path(args.tokenizer_model)
    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def check_tokenizer(bank: Bank, args: argparse.Namespace) -> None:
    """Compare the bank's tokenizer with the run's, and with the sidecar of every data set.

    Raises:
        IdentityError: they differ.
    """
    tokenizer = run_tokenizer(args)
    if tokenizer.fingerprint != bank.tokenizer_fingerprint:
        raise IdentityError(
            f"--tokenizer-model {args.tokenizer_model}", f"is not the tokenizer of the bank {bank.path}",
            got=tokenizer.fingerprint, expected=bank.tokenizer_fingerprint,
            remedy="Use the bank's tokenizer, or rebuild the bank with this one.",
        )  # fmt: skip
    for prefix in data_prefixes(args):
        sidecar = read_sidecar(prefix)
        if sidecar is None:
            get_logger().warning(
                "%s has no tokenizer fingerprint beside it: that its ids are this tokenizer's is taken on trust", prefix
            )
        elif sidecar.fingerprint != bank.tokenizer_fingerprint:
            raise IdentityError(
                f"data set {prefix}", f"was tokenised by another tokenizer than the bank {bank.path}",
                got=sidecar.fingerprint, expected=bank.tokenizer_fingerprint,
                remedy="Tokenise the data again with the bank's tokenizer, or rebuild the bank on this data.",
            )  # fmt: skip


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Every data set prefix named by the run's flags (weights of blends left out)."""
    prefixes: list[str] = []
    for value in (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path):
        prefixes += [item for item in value or [] if not _is_number(item)]
    return list(dict.fromkeys(prefixes))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
