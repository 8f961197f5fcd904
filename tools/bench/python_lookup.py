"""Lookup as one would write it in Python, beside ours, on the same bank and the same queries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.oracle import MISS, brute_force_lookup

_TOKEN_BITS = 20
Answers = tuple[np.ndarray, np.ndarray]


def adversarial_tokens(bank: Bank, count: int, seed: int = 99) -> np.ndarray:
    """int32 ``[count]``: keys drawn uniformly, one after the other."""
    rows = np.random.default_rng(seed).integers(0, bank.num_rows, count // bank.min_order + 1)
    ids = bank.key_ids[rows]
    return np.ascontiguousarray(ids[ids >= 0][:count])


def measure_lookup(bank: Bank, queries: dict[str, np.ndarray], rounds: int) -> dict[str, Any]:
    """Positions a second (thread time, one thread) of ours and of the baselines, round by round in turn.

    ``mismatches`` counts the answers of any of them that differ from the brute-force definition.
    """
    torch.set_num_threads(1)
    rows_of_keys = bank.rows_of_keys()
    baselines: dict[str, Callable[[np.ndarray], Answers]] = {
        "native": _native(bank),
        "dict": _dictionary(bank, rows_of_keys),
        "searchsorted": _searchsorted(bank),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {query: [] for query in queries} for name in baselines}
    mismatches = 0
    for query, tokens in queries.items():
        expected = _flat(brute_force_lookup(rows_of_keys, tokens[None], bank.eod, bank.min_order, bank.max_order))
        for round_number in range(rounds):
            for name, lookup in baselines.items():
                start = time.thread_time()
                answers = lookup(tokens)
                seconds[name][query].append(time.thread_time() - start)
                if round_number == 0:
                    mismatches += _differences(answers, expected)
    result: dict[str, Any] = {"entries": bank.num_rows, "mismatches": mismatches}
    result["positions"] = {query: len(tokens) for query, tokens in queries.items()}
    for name, by_query in seconds.items():
        result[name] = {}
        for query, times in by_query.items():
            result[name][f"{query}_mpos_per_s"] = len(queries[query]) / float(np.median(times)) / 1e6
            result[name][f"{query}_ratio"] = float(np.median(times) / np.median(seconds["native"][query]))
    return result


def _flat(answers: Answers) -> Answers:
    return answers[0].reshape(-1), answers[1].reshape(-1)


def _differences(answers: Answers, expected: Answers) -> int:
    return int(((answers[0] != expected[0]) | (answers[1] != expected[1])).sum())


def _native(bank: Bank) -> Callable[[np.ndarray], Answers]:
    index = open_index(bank, "native", pages="huge")
    outputs: dict[int, Answers] = {}

    def lookup(tokens: np.ndarray) -> Answers:
        if len(tokens) not in outputs:  # reused, as the data loader does
            outputs[len(tokens)] = np.empty((1, len(tokens)), np.int64), np.empty((1, len(tokens)), np.uint8)
        rows, orders = outputs[len(tokens)]
        return _flat(index.lookup(tokens[None], eod=bank.eod, rows_out=rows, orders_out=orders))

    return lookup


def _dictionary(bank: Bank, rows_of_keys: dict[tuple[int, ...], int]) -> Callable[[np.ndarray], Answers]:
    """Longest n-gram first, in a dict of tuples."""

    def lookup(tokens: np.ndarray) -> Answers:
        rows, orders = [MISS] * len(tokens), [0] * len(tokens)
        reach, token_list = _reach(tokens, bank).tolist(), tokens.tolist()
        for end in range(len(token_list)):
            for order in range(reach[end], 1, -1):
                row = rows_of_keys.get(tuple(token_list[end - order + 1 : end + 1]))
                if row is not None:
                    rows[end], orders[end] = row, order
                    break
        return np.array(rows), np.array(orders)

    return lookup


def _searchsorted(bank: Bank) -> Callable[[np.ndarray], Answers]:
    """Level by level: sorted keys (node of the suffix so far, next older token), found by ``torch.searchsorted``."""
    steps, rows_of_steps = _sorted_steps(bank)

    def lookup(tokens: np.ndarray) -> Answers:
        tokens_S = torch.from_numpy(tokens).long()
        reach_S = torch.from_numpy(_reach(tokens, bank))
        rows_S = torch.full((len(tokens),), MISS, dtype=torch.int64)
        orders_S = torch.zeros(len(tokens), dtype=torch.int64)
        nodes_S = tokens_S.clone()
        active = torch.nonzero(reach_S >= 2)[:, 0]
        for order in range(2, bank.max_order + 1):
            wanted = (nodes_S[active] << _TOKEN_BITS) | tokens_S[active - order + 1]
            found = torch.searchsorted(steps, wanted).clamp_(max=len(steps) - 1)
            hit = steps[found] == wanted
            active = active[hit]
            rows_S[active] = rows_of_steps[found[hit]]
            orders_S[active] = order
            nodes_S[active] = rows_S[active] + (1 << _TOKEN_BITS)
            active = active[reach_S[active] > order]
        return rows_S.numpy(), orders_S.numpy()

    return lookup


def _sorted_steps(bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    """The trie of a suffix-closed bank as sorted int64 ``[N]`` steps, and the rows they lead to."""
    nodes = bank.key_ids[:, -1].astype(np.int64)
    all_steps, all_rows = [], []
    for order in range(2, bank.max_order + 1):
        longer = np.flatnonzero(bank.key_orders >= order)
        steps = (nodes[longer] << _TOKEN_BITS) | bank.key_ids[longer, -order]
        ends = bank.key_orders[longer] == order
        by_step = np.argsort(steps[ends])
        sorted_steps, rows = steps[ends][by_step], longer[ends][by_step]
        all_steps.append(sorted_steps)
        all_rows.append(rows)
        nodes[longer] = rows[np.searchsorted(sorted_steps, steps)] + (1 << _TOKEN_BITS)
    steps, rows = np.concatenate(all_steps), np.concatenate(all_rows)
    by_step = np.argsort(steps)
    return torch.from_numpy(steps[by_step]), torch.from_numpy(rows[by_step])


def _reach(tokens: np.ndarray, bank: Bank) -> np.ndarray:
    """int64 ``[S]``: how many tokens an n-gram that ends at a position may have."""
    positions = np.arange(len(tokens))
    last_eod = np.maximum.accumulate(np.where(tokens == bank.eod, positions, -1))
    return np.minimum(positions - last_eod, bank.max_order)
