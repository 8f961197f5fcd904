"""Small memories in one process: banks, hashed tables, what sites read of them, and the ranks that share the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.row_layout import Columns
from megatron_graft.bank.writer import write_bank
from megatron_graft.data.memory_layout import EngramReading, GraftReading, MemoryLayout, SiteReading
from megatron_graft.data.microbatch import MicroBatchMemory
from megatron_graft.data.partition import Partition
from megatron_graft.data.token_compression import CompressedVocabulary
from megatron_graft.lookup.index import open_index
from megatron_graft.memory.site import MemorySite, SiteConfig
from megatron_graft.ngram.hashing import DIALECTS, EngramConfig, layer_hashes
from megatron_graft.training.memory_setup import RunEngram, RunMemory
from tests.helpers import engram_oracle
from tests.helpers.banks import EOD, bank_arguments

VOCAB, HIDDEN, SEED = 12, 8, 4


def small_bank(path: Path, *, seed: int = 5, row_dtype: str = "bfloat16", width: int = 5, keys: int = 60) -> Bank:
    """A bank of 2- to 4-grams over the small vocabulary and of two donor layers; bf16 rows are ordinary numbers."""
    generator = np.random.default_rng(seed)
    counts = {tuple(map(int, generator.integers(1, VOCAB, order))): 10 for order in (2, 3, 4) for _ in range(keys)}
    arguments: dict[str, Any] = bank_arguments(
        counts, vocab_size=VOCAB, layers=(3, 7), width=width, row_dtype=row_dtype, seed=seed
    )
    if row_dtype == "bfloat16":
        shape = (len(counts), width)
        arguments["layers"] = {
            layer: bf16_from_float32(generator.standard_normal(shape, dtype=np.float32)) for layer in (3, 7)
        }
    write_bank(path, **arguments)
    return open_bank(path)


def small_tables(layers: Sequence[int] = (2,), **changes: Any) -> RunEngram:
    """Hashed tables of the given layers; six heads and rows that divide by nothing. The last two ids become one."""
    settings: dict[str, Any] = {
        "dialect": DIALECTS["deepseek"], "max_order": 3, "heads": 3, "vocab_sizes": (11, 5), "dim": 6, "seed": SEED,
        "pad_id": EOD, "across_documents": False, "layer_ids": tuple((layer, layer - 1) for layer in layers),
    }  # fmt: skip
    config = EngramConfig(**(settings | changes))
    ids = np.minimum(np.arange(VOCAB), VOCAB - 2).astype(np.int32)
    vocabulary = CompressedVocabulary(ids=ids, size=VOCAB - 1)
    return RunEngram(config=config, vocabulary=vocabulary, hashes=layer_hashes(config, vocabulary.size))


def graft_reading(bank: Bank, number: int = 0, columns: Columns | None = None) -> GraftReading:
    """What a site reads of a bank; all columns by default."""
    columns = (0, bank.row_dim) if columns is None else columns
    return GraftReading(bank=number, columns=columns, row_layout=bank.row_layout, max_order=bank.max_order)


def engram_reading(engram: RunEngram, layer: int = 2) -> EngramReading:
    """What the site of a layer reads of its table."""
    config = engram.config
    return EngramReading(
        num_rows=engram.hashes[layer].num_rows, num_heads=config.num_heads, head_dim=config.head_dim,
        max_order=config.max_order,
    )  # fmt: skip


def site_config(reading: SiteReading, **changes: Any) -> SiteConfig:
    """A site of dilation 2."""
    settings: dict[str, Any] = {"gate": "plain", "conv_kernel": 4, "conv_dilation": 2, "seed": 7, "init_std": 0.02}
    return SiteConfig(reading=reading, **(settings | changes))


def model_config(**changes: Any) -> Any:
    """What a site asks Megatron's ``TransformerConfig`` for."""
    config: dict[str, Any] = {
        "hidden_size": HIDDEN, "params_dtype": torch.float32, "use_cpu_initialization": True,
        "sequence_parallel": False, "layernorm_epsilon": 1e-5,
    }  # fmt: skip
    return SimpleNamespace(**(config | changes))


def small_site(
    reading: SiteReading, partition: Partition | None = None, *, model: Any = None, **changes: Any
) -> MemorySite:
    """A fresh site as one rank has it, on its own; ``changes`` as :func:`site_config`."""
    layout = MemoryLayout.of([reading], partition or Partition())
    model = model or model_config(sequence_parallel=layout.partition.sequence_parallel)
    return MemorySite(model, site_config(reading, **changes), layout, None)


def randomise(site: torch.nn.Module) -> None:
    """Give every parameter a value that makes its part matter: a fresh site adds nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def small_memory(
    *readings: SiteReading, banks: Sequence[Bank] = (), engram: RunEngram | None = None, **site: Any
) -> RunMemory:
    """A run's memory; of its tokenizer nothing but the EOD is there."""
    return RunMemory(
        banks=tuple(banks),
        indexes=tuple(open_index(bank) for bank in banks),
        engram=engram,
        sites={reading.layer_number: site_config(reading, **site) for reading in readings},
        tokenizer=SimpleNamespace(eod=EOD),  # type: ignore[arg-type]
        lookup="native",
        threads=1,
    )


def layout_of(memory: RunMemory, partition: Partition | None = None) -> MemoryLayout:
    """What a micro-batch brings to a rank that has all sites of a run."""
    return MemoryLayout.of((site.reading for site in memory.sites.values()), partition or Partition())


def ranks(size: int, sequence_parallel: bool, context: tuple[int, int] = (0, 1)) -> list[Partition]:
    """The places of all tensor-parallel ranks of a layer: of one context-parallel rank, given with their number."""
    place, contexts = context
    return [
        Partition(rank=rank, size=size, sequence_parallel=sequence_parallel, context_rank=place, context_size=contexts)
        for rank in range(size)
    ]


def positions_of(place: Partition, length: int, rank: int | None = None) -> np.ndarray:
    """int64 ``[s]``: which of ``length`` positions a tensor-parallel rank (default: the place's own) works on."""
    here = np.arange(length)
    if place.context_size > 1:
        chunks = np.split(here, 2 * place.context_size)
        here = np.concatenate([chunks[place.context_rank], chunks[-1 - place.context_rank]])
    if not place.sequence_parallel:
        return here
    return np.array_split(here, place.size)[place.rank if rank is None else rank]


def fetch_on_all(
    memory: RunMemory, tokens_BS: torch.Tensor, size: int, sequence_parallel: bool, context: tuple[int, int] = (0, 1)
) -> list[MicroBatchMemory]:
    """The same micro-batch as each tensor-parallel rank (of one context-parallel rank) fetches it."""
    places = ranks(size, sequence_parallel, context)
    return [memory.fetcher(layout_of(memory, place)).fetch(tokens_BS, 0).memory for place in places]


def random_tokens(seed: int, sequences: int = 3, positions: int = 24) -> torch.Tensor:
    """int64 ``[B, S]``, now and then EOD."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, (sequences, positions)))


def oracle_rows(engram: RunEngram, layer: int, tokens_BS: torch.Tensor) -> np.ndarray:
    """int64 ``[B, S, K]``: the table rows of every position, by the oracle."""
    config = engram.config
    number = [pair[0] for pair in config.layer_ids].index(layer)
    moduli = engram_oracle.primes(len(config.layer_ids), config.vocab_sizes, config.heads)[number]
    factors = engram_oracle.multipliers(
        config.seed, config.layer_ids[number][1], config.max_order, engram.vocabulary.size
    )
    compressed, eod = engram.vocabulary.ids.tolist(), None if config.across_documents else EOD
    return np.array(
        [
            engram_oracle.rows_of_sequence(
                tokens, compressed, factors=factors, moduli=moduli, pad_id=config.pad_id, eod=eod
            )
            for tokens in tokens_BS.tolist()
        ]
    )


def section_names(layout: MemoryLayout) -> list[str]:
    """Every section of a packed tensor after its header, in order."""
    banks = [f"{kind}.{bank}" for bank in layout.banks for kind in ("order", "inverse")]
    numbered = [("reads", layout.engrams), ("rows", layout.grafts), ("requests", layout.engrams)]
    return ["position", *banks, *(f"{kind}.{number}" for kind, parts in numbered for number in range(len(parts)))]


def contents(memory: MicroBatchMemory) -> dict[str, list[Any]]:
    """What a memory holds: of each section what is in use, and the sizes of the exchange."""
    sections = {name: memory.section(name) for name in section_names(memory.layout)}
    for name in sections:
        if name.startswith(("rows", "requests")):
            sections[name] = sections[name][: memory.used(name)]
    return {name: section.tolist() for name, section in sections.items()} | {"exchange": memory.exchange.tolist()}
