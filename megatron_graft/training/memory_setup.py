"""Opening the memory of a run: its banks, its hashed tables and what every site reads of them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.data.memory_fetcher import MemoryFetcher, MemorySources
from megatron_graft.data.memory_layout import EngramReading, GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.token_compression import CompressedVocabulary, compress_vocabulary
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import ConfigError
from megatron_graft.log import get_logger
from megatron_graft.lookup.hashing import NgramHasher, open_hasher
from megatron_graft.lookup.index import SuffixIndex, open_index
from megatron_graft.memory.initialisation import BankValues
from megatron_graft.memory.site import SiteConfig
from megatron_graft.ngram.hashing import EngramConfig, LayerHash, layer_hashes
from megatron_graft.training.bank_setup import check_tokenizer, checked_banks, open_run_bank, run_tokenizer
from megatron_graft.training.settings import EngramSettings, GraftSettings


@dataclass(frozen=True, kw_only=True)
class RunEngram:
    """The hashed tables of a run.

    Attributes:
        config: their sizes and dialect.
        vocabulary: compressed token ids.
        hashes: constants by layer number.
    """

    config: EngramConfig
    vocabulary: CompressedVocabulary
    hashes: dict[int, LayerHash]


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """The memory of a run.

    Attributes:
        banks: the open banks.
        indexes: the suffix index of each.
        engram: the hashed tables, or None.
        sites: configuration of every site, by global, 1-based layer number.
        tokenizer: the run's.
        lookup: implementation of lookup and hashing.
        threads: of lookup, hashing and gather.
    """

    banks: tuple[Bank, ...]
    indexes: tuple[SuffixIndex, ...]
    engram: RunEngram | None
    sites: dict[int, SiteConfig]
    tokenizer: TextTokenizer
    lookup: str
    threads: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer numbers of the sites, ascending."""
        return tuple(sorted(self.sites))

    def fetcher(self, layout: MemoryLayout, *, pin: bool = False) -> MemoryFetcher:
        """What fetches the memory of a rank with the given layout."""
        sources = self._sources(layout, self.banks, self.indexes, self.lookup)
        return MemoryFetcher(sources, layout, pin=pin)

    def reference_fetcher(self, layout: MemoryLayout) -> MemoryFetcher:
        """The same by the slow, plain implementations of everything, to compare with. Holds all keys in memory."""
        banks = tuple(open_bank(bank.path, rows=bank.num_rows, gather="reference") for bank in self.banks)
        indexes = tuple(open_index(bank, "reference") for bank in banks)
        sources = self._sources(layout, banks, indexes, "reference")
        return MemoryFetcher(dataclasses.replace(sources, implementation="reference"), layout)

    def _sources(
        self, layout: MemoryLayout, banks: tuple[Bank, ...], indexes: tuple[SuffixIndex, ...], lookup: str
    ) -> MemorySources:
        hashers = {rows.layer_number: self._hasher(rows.layer_number, lookup) for rows in layout.engrams}
        pairs = tuple(zip(banks, indexes, strict=True))
        return MemorySources(banks=pairs, hashers=hashers, eod=self.tokenizer.eod)

    def _hasher(self, layer: int, implementation: str) -> NgramHasher:
        if self.engram is None:
            raise RuntimeError(f"the site of layer {layer} reads a table and the run has none")
        return open_hasher(
            self.engram.config,
            self.engram.hashes[layer],
            self.engram.vocabulary.ids,
            eod=self.tokenizer.eod,
            implementation=implementation,  # type: ignore[arg-type]
            threads=self.threads,
        )


def open_run_memory(settings: GraftSettings, args: argparse.Namespace) -> RunMemory | None:
    """Open and check everything that the sites will need; None for the stock model.

    Raises:
        BankError: a bank cannot be used.
        IdentityError: a bank was made for another tokenizer than the run's or its data's.
        ConfigError: the sequence is shorter than an n-gram, a bank has fewer rows than asked for, a site wants donor
            layers that its bank does not have, or a tensor-parallel rank would have no part in a site.
        StorageError: a bank cannot be copied to the node.
        TokenizerError: the tokenizer cannot be read.
    """
    if not settings.has_sites:
        return None
    tokenizer = run_tokenizer(args)
    checked = checked_banks(settings, tokenizer)
    check_tokenizer(tokenizer, args)
    engram = _open_engram(settings.engram, tokenizer) if settings.engram else None
    sites = {
        reading.layer_number: _site_config(reading, settings, args) for reading in _readings(settings, checked, engram)
    }
    _check_sequence(sites, args)
    _check_shares(sites, args)
    # What does not fit the run has been refused: only now may there be much to copy and read.
    banks = tuple(open_run_bank(bank.path, settings) for bank in checked)
    indexes = tuple(_open_run_index(bank, settings) for bank in banks)
    if settings.rows == "trained":
        sites = {layer: _starting_from_the_bank(site, banks) for layer, site in sites.items()}
    for bank in banks:
        get_logger().info(
            "bank %s: %s rows x %d, identity %s", bank.path, f"{bank.num_rows:,}", bank.row_dim, bank.digest
        )
    if settings.trains_rows:
        _log_trained_rows(sites)
    return RunMemory(
        banks=banks, indexes=indexes, engram=engram, sites=sites, tokenizer=tokenizer, lookup=settings.lookup,
        threads=settings.bank_lookup_threads,
    )  # fmt: skip


def _starting_from_the_bank(site: SiteConfig, banks: tuple[Bank, ...]) -> SiteConfig:
    graft = site.reading.graft
    return dataclasses.replace(site, row_values=BankValues(banks[graft.bank], graft.columns)) if graft else site


def _log_trained_rows(sites: dict[int, SiteConfig]) -> None:
    for layer, site in sorted(sites.items()):
        graft = site.reading.graft
        if graft is not None and graft.trained_rows is not None:
            get_logger().info(
                "layer %d: %s %s rows x %d = %s trained parameters", layer, f"{graft.trained_rows:,}", site.rows,
                graft.width, f"{graft.trained_rows * graft.width:,}",
            )  # fmt: skip


def _open_run_index(bank: Bank, settings: GraftSettings) -> SuffixIndex:
    return open_index(
        bank,
        settings.lookup,  # type: ignore[arg-type]
        pages="huge" if settings.bank_huge_pages else "file",
        threads=settings.bank_lookup_threads,
    )


def _open_engram(settings: EngramSettings, tokenizer: TextTokenizer) -> RunEngram:
    if settings.pad_id is not None and not 0 <= settings.pad_id < tokenizer.vocab_size:
        raise ConfigError(
            "--engram-pad-id", "is outside the tokenizer's vocabulary", got=settings.pad_id,
            expected=f"0 to {tokenizer.vocab_size - 1}",
        )  # fmt: skip
    vocabulary = compress_vocabulary(tokenizer)
    config = settings.hashing(eod=tokenizer.eod)
    hashes = layer_hashes(config, vocabulary.size)
    rows = sum(layer.num_rows for layer in hashes.values())
    get_logger().info(
        "engram: %d tables, %s rows x %d = %s trained parameters; %s token ids compressed to %s",
        len(hashes), f"{rows:,}", config.head_dim, f"{rows * config.head_dim:,}", f"{tokenizer.vocab_size:,}",
        f"{vocabulary.size:,}",
    )  # fmt: skip
    return RunEngram(config=config, vocabulary=vocabulary, hashes=hashes)


def _readings(settings: GraftSettings, banks: tuple[Bank, ...], engram: RunEngram | None) -> list[SiteReading]:
    """What each site of the run reads, by layer."""
    grafts = {
        layer: _graft_reading(settings.bank_of_site(site), banks, settings.donor_layers[site])
        for site, layer in enumerate(settings.layers)
    }
    if settings.trains_rows:
        grafts = {layer: _trained(graft, banks, settings) for layer, graft in grafts.items()}
    tables = _table_readings(engram) if engram else {}
    return [
        SiteReading(
            layer_number=layer,
            graft=grafts.get(layer),
            engram=tables.get(layer),
            exclusive=settings.combine == "exclusive",
        )
        for layer in sorted(grafts.keys() | tables.keys())
    ]


def _table_readings(engram: RunEngram) -> dict[int, EngramReading]:
    config = engram.config
    return {
        layer: EngramReading(
            num_rows=hash_.num_rows,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            max_order=config.max_order,
        )
        for layer, hash_ in engram.hashes.items()
    }


def _graft_reading(number: int, banks: tuple[Bank, ...], donor_layers: tuple[int, ...] | None) -> GraftReading:
    bank = banks[number]
    held = bank.manifest.identity.donor.layers
    wanted = held if donor_layers is None else donor_layers
    places = [held.index(layer) for layer in wanted if layer in held]
    if len(places) < len(wanted) or places != list(range(places[0], places[0] + len(places))):
        raise ConfigError(
            "--graft-donor-layers", f"names layers that do not stand side by side in the bank {bank.path}",
            got=",".join(map(str, wanted)), expected=f"adjacent ones of {','.join(map(str, held))}, in that order",
            remedy="Choose others, or build a bank with these --donor-layers.",
        )  # fmt: skip
    ends = [sum(bank.row_layout.widths[: place + 1]) for place in range(len(held))]
    first = ends[places[0]] - bank.row_layout.widths[places[0]]
    return GraftReading(
        bank=number, columns=(first, ends[places[-1]]), row_layout=bank.row_layout, max_order=bank.max_order
    )


def _trained(graft: GraftReading, banks: tuple[Bank, ...], settings: GraftSettings) -> GraftReading:
    return dataclasses.replace(graft, trained_rows=settings.bank_rows or banks[graft.bank].num_rows)


def _site_config(reading: SiteReading, settings: GraftSettings, args: argparse.Namespace) -> SiteConfig:
    return SiteConfig(
        reading=reading,
        gate=settings.gate,  # type: ignore[arg-type]
        conv_kernel=settings.conv_kernel,
        conv_dilation=settings.conv_dilation or reading.max_order,
        seed=args.seed,
        init_std=args.init_method_std,
    )


def _check_sequence(sites: dict[int, SiteConfig], args: argparse.Namespace) -> None:
    longest = max(site.reading.max_order for site in sites.values())
    if args.seq_length < longest:
        raise ConfigError(
            "--seq-length", "is shorter than the memory's longest n-gram", got=args.seq_length,
            expected=f"at least {longest}",
            remedy="Lengthen it, build a bank with shorter --orders, or lower --engram-max-order.",
        )  # fmt: skip


def _check_shares(sites: dict[int, SiteConfig], args: argparse.Namespace) -> None:
    """Refuse tensor-parallel ranks that would be left without a part of a site's work or of its table."""
    for layer, site in sorted(sites.items()):
        graft, engram = site.reading.graft, site.reading.engram
        shared = {f"rows of layer {layer}'s table": engram.num_rows} if engram else {}
        if graft and graft.trained_rows is not None:
            shared[f"trained rows of layer {layer}"] = graft.trained_rows
        if not args.sequence_parallel:
            shared |= {f"columns that layer {layer} reads of its bank": graft.width} if graft else {}
            shared |= {f"heads of layer {layer}'s table": engram.num_heads} if engram else {}
        for what, number in shared.items():
            if number < args.tensor_model_parallel_size:
                raise ConfigError(
                    "--tensor-model-parallel-size", f"leaves a rank none of the {number} {what}",
                    got=args.tensor_model_parallel_size, expected=f"at most {number}",
                    remedy="Use fewer ranks or a larger memory; under --sequence-parallel columns and heads are whole.",
                )  # fmt: skip
