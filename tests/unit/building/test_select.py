from __future__ import annotations

import logging
from collections import Counter

import pytest

from megatron_graft.bank.keys import BankKeys, canonical_order
from megatron_graft.building.select import Quota, Selection, select_ngrams, suffix_gaps, take_keys
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import BankError, ConfigError
from tests.helpers.candidates import CandidatesInMemory


def keys_as_tuples(keys: BankKeys) -> list[tuple[int, ...]]:
    return [tuple(token for token in ids if token >= 0) for ids in keys.key_ids.tolist()]


def select(token_lists: list[list[int]], tokenizer: TextTokenizer, num_rows: int | None) -> Selection:
    return select_by(token_lists, tokenizer, Quota(num_rows=num_rows))


def select_by(token_lists: list[list[int]], tokenizer: TextTokenizer, quota: Quota) -> Selection:
    return select_ngrams(CandidatesInMemory(token_lists, [2, 3, 4], tokenizer.eod), tokenizer, quota)


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
    # 3 n-grams of halves, 2 of spaces; and, of special tokens alone, none: EOD is in no n-gram.
    assert selection.skipped == {"special": 0, "no_text": 3, "blank": 2}


def test_special_tokens_alone_have_their_own_rule(recipient: TextTokenizer) -> None:
    special = next(token for token in range(10) if recipient.num_bytes_of_ids[token] == 0 and token != recipient.eod)
    letters = recipient.encode("wz")
    selection = select([[special, special, special], [special, *letters]], recipient, None)
    assert selection.texts == ["wz"]
    assert selection.skipped == {"special": 2, "no_text": 2, "blank": 0}


def test_fewer_rows_than_asked_for_are_announced(
    recipient: TextTokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_graft"), "propagate", True)
    assert len(select([recipient.encode("wz")], recipient, 100).texts) == 1
    assert "only 1 n-grams of order 2, 3, 4 qualify of 100 asked for" in caplog.text


def test_all_that_were_counted_can_be_taken(token_lists: list[list[int]], recipient: TextTokenizer) -> None:
    selection = select(token_lists, recipient, None)
    assert len(selection.texts) == len(brute_force(token_lists, recipient, 10**9)) > 500


def test_quotas_take_the_most_frequent_of_each_order(token_lists: list[list[int]], recipient: TextTokenizer) -> None:
    selection = select_by(token_lists, recipient, Quota(num_rows=5, by_order={2: 30, 3: 0, 4: 20}))
    found = zip(keys_as_tuples(selection.keys), selection.keys.key_counts.tolist(), selection.texts, strict=True)
    ranked = brute_force(token_lists, recipient, 10**9)
    expected = [row for row in ranked if len(row[0]) == 2][:30] + [row for row in ranked if len(row[0]) == 4][:20]
    assert sorted(found) == sorted(expected)
    assert canonical_order(selection.keys).tolist() == list(range(50))
    facts = selection.facts()
    assert facts["rows_by_order"] == {"2": 30, "4": 20} and not facts["suffix_closed"]


@pytest.mark.parametrize("by_order", [{5: 10}, {2: 0}, {2: -1}])
def test_quotas_that_cannot_be_met_are_refused(recipient: TextTokenizer, by_order: dict[int, int]) -> None:
    with pytest.raises(ConfigError, match="--rows-by-order: cannot be met"):
        select_by([recipient.encode("wz")], recipient, Quota(num_rows=None, by_order=by_order))


def test_missing_suffixes_are_counted(token_lists: list[list[int]], recipient: TextTokenizer) -> None:
    keys = select(token_lists, recipient, 300).keys
    present = set(keys_as_tuples(keys))

    def gaps(ngrams: set[tuple[int, ...]]) -> int:
        return sum(len(ngram) > 2 and ngram[1:] not in ngrams for ngram in ngrams)

    assert suffix_gaps(keys) == gaps(present)
    rows = [row for row, ngram in enumerate(keys_as_tuples(keys)) if len(ngram) > 2 or row % 3]
    kept = take_keys(keys, rows)
    assert suffix_gaps(kept) == gaps(set(keys_as_tuples(kept))) > gaps(present)


def test_nothing_to_choose_from_is_refused(recipient: TextTokenizer) -> None:
    half = recipient.encode("汉")[-1]
    with pytest.raises(BankError, match="leaves no n-gram with a text.*no_text: 1"):
        select([[half, half]], recipient, 5)


def test_a_number_of_rows_below_one_is_refused(recipient: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="--num-rows.*got 0"):
        select([recipient.encode("wz")], recipient, 0)
