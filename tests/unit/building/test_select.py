from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest

from megatron_graft.bank.keys import BankKeys, canonical_order
from megatron_graft.building.count import count_ngrams
from megatron_graft.building.select import Selection, select_ngrams
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import BankError, ConfigError


def keys_as_tuples(keys: BankKeys) -> list[tuple[int, ...]]:
    return [tuple(token for token in ids if token >= 0) for ids in keys.key_ids.tolist()]


def select(token_lists: list[list[int]], tokenizer: TextTokenizer, num_rows: int) -> Selection:
    documents = [np.array(tokens) for tokens in token_lists]
    return select_ngrams(count_ngrams(documents, orders=[2, 3, 4], eod=tokenizer.eod), tokenizer, num_rows)


def brute_force(
    token_lists: list[list[int]], tokenizer: TextTokenizer, num_rows: int
) -> list[tuple[tuple[int, ...], int, str]]:
    counts: Counter[tuple[int, ...]] = Counter()
    for tokens in token_lists:
        for order in (2, 3, 4):
            for start in range(len(tokens) - order + 1):
                counts[tuple(tokens[start : start + order])] += 1
    by_rank = sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    texts = [
        (ngram, count, tokenizer.ngram_text(list(ngram))) for ngram, count in by_rank if tokenizer.eod not in ngram
    ]
    return [(ngram, count, text) for ngram, count, text in texts if text is not None and text.strip()][:num_rows]


@pytest.mark.parametrize("num_rows", [1, 7, 120, 400])
def test_the_most_frequent_ngrams_with_a_text_are_chosen_in_bank_order(
    token_lists: list[list[int]], recipient: TextTokenizer, num_rows: int
) -> None:
    selection = select(token_lists, recipient, num_rows)
    found = zip(keys_as_tuples(selection.keys), selection.keys.key_counts.tolist(), selection.texts, strict=True)
    assert list(found) == brute_force(token_lists, recipient, num_rows)
    assert canonical_order(selection.keys).tolist() == list(range(num_rows))


def test_the_leading_space_of_a_text_is_kept(token_lists: list[list[int]], recipient: TextTokenizer) -> None:
    texts = select(token_lists, recipient, 300).texts
    assert any(text.startswith(" ") for text in texts)
    assert any(not text.startswith(" ") for text in texts)


def test_what_has_no_text_is_passed_over_and_counted_by_rule(recipient: TextTokenizer) -> None:
    space, half = recipient.encode("  ")[0], recipient.encode("汉")[-1]
    letters = recipient.encode("wz")
    assert recipient.ngram_text([space, space]).strip() == "" and recipient.ngram_text([half, half]) is None
    selection = select([[space, space, space], [half, half, half, half], letters], recipient, 9)
    assert selection.texts == ["wz"]
    assert selection.skipped == {"no_text": 3, "blank": 2}


def test_fewer_rows_than_asked_for_are_announced(
    recipient: TextTokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_graft"), "propagate", True)
    assert len(select([recipient.encode("wz")], recipient, 100).texts) == 1
    assert "only 1 n-grams qualify of the 100 asked for" in caplog.text


def test_nothing_to_choose_from_is_refused(recipient: TextTokenizer) -> None:
    half = recipient.encode("汉")[-1]
    with pytest.raises(BankError, match="leaves no n-gram with a text.*no_text: 1"):
        select([[half, half]], recipient, 5)


def test_a_number_of_rows_below_one_is_refused(recipient: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="--num-rows.*got 0"):
        select([recipient.encode("wz")], recipient, 0)
