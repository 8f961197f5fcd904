// Banks and texts of many shapes, most of them unkind: what the lookup is checked on.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "crowded.hpp"
#include "keys.hpp"
#include "oracle.hpp"

namespace megatron_graft::testing {

struct TestBank {
    std::string shape;
    std::uint64_t vocab_size;
    KeySet keys;
};

inline constexpr std::array<const char*, 9> kBankShapes = {
    "uniform",   // keys of random tokens: hardly any is the suffix of another, so most nodes are phantoms
    "corpus",    // all n-grams of a text: closed, as a counted bank is
    "dense",     // nearly all n-grams of a tiny alphabet
    "constant",  // runs of one token, in every order
    "near",      // keys that differ in one token only, at every place
    "longest",   // keys of the longest order only
    "few deep",  // many short keys, few long ones: orders with far fewer entries than parents
    "gaps",      // orders in between have no keys
    "crowded",   // bigrams of few homes and few remainders: displaced far, and easily confused
};
inline constexpr std::array<const char*, 6> kTextShapes = {
    "uniform",       // random tokens: nearly all misses in a large vocabulary
    "keys",          // keys of the bank, one after the other
    "changed keys",  // the same with one token changed now and then
    "constant",      // runs of one token
    "frequent",      // small ids are frequent
    "cut keys",      // keys without some of their oldest or newest tokens
};

inline Key random_key(Random& random, std::uint64_t vocab_size, std::size_t order) {
    Key key(order);
    for (Token& token : key) {
        token = random.token(vocab_size);
    }
    return key;
}

inline std::uint64_t random_vocab_size(Random& random) {
    constexpr std::array<std::uint64_t, 12> kSizes = {
        1, 2, 3, 5, 17, 255, 4096, 50257, 131072, 1U << 19U, (1U << 20U) - 1, 1U << 20U};
    return kSizes[random.below(kSizes.size())];
}

namespace shapes {

inline void uniform(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    for (std::size_t index = 0; index < count; ++index) {
        bank.keys.add(random_key(random, bank.vocab_size, random.between(least, most)));
    }
}

inline void corpus(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    Key text;
    while (bank.keys.size() < count && text.size() < 4 * count) {
        text.push_back(random.frequent_token(bank.vocab_size));
        for (std::size_t order = least; order <= std::min(most, text.size()); ++order) {
            bank.keys.add(Key(text.end() - static_cast<std::ptrdiff_t>(order), text.end()));
        }
    }
}

inline void dense(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    bank.vocab_size = random.between(1, 4);
    uniform(random, bank, 4 * count, least, most);
}

inline void constant(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    for (std::size_t index = 0; index <= count / most; ++index) {
        const Token token = random.token(bank.vocab_size);
        for (std::size_t order = least; order <= most; ++order) {
            if (!random.one_in(8)) {
                bank.keys.add(Key(order, token));
            }
        }
    }
}

inline void near(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    const std::size_t families = 1 + count / (4 * most);
    for (std::size_t family = 0; family < families; ++family) {
        const Key base = random_key(random, bank.vocab_size, random.between(least, most));
        bank.keys.add(base);
        for (std::size_t place = 0; place < base.size(); ++place) {
            for (int change = 0; change < 3; ++change) {
                Key key = base;
                // A neighbouring id, or one that differs in a single bit: what a weak mix would confuse.
                const auto token = static_cast<std::uint64_t>(key[place]);
                const std::uint64_t other = change == 0 ? token + 1 : token ^ (1ULL << random.below(20));
                key[place] = static_cast<Token>(other % bank.vocab_size);
                bank.keys.add(key);
            }
        }
    }
}

inline void few_deep(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    uniform(random, bank, count, least, std::min(least + 1, most));
    uniform(random, bank, 1 + random.below(4), most, most);
}

inline void gaps(Random& random, TestBank& bank, std::size_t count, std::size_t least, std::size_t most) {
    uniform(random, bank, count / 2 + 1, least, least);
    uniform(random, bank, count / 2 + 1, most, most);
}

inline void crowded(Random& random, TestBank& bank, std::size_t count) {
    bank.vocab_size = kLargestVocabulary;
    const std::uint64_t homes = random.between(1, 8);
    const std::uint64_t remainders = random.between(20, 60);
    for (std::size_t index = 0; index < std::min<std::size_t>(count, 2000); ++index) {
        // A few homes of 2^14, the last among them; remainders shared by keys of different homes.
        const std::uint64_t home = (1U << 14U) - 1 - random.below(homes);
        const std::uint64_t remainder = random.below(remainders) * 0x10001U;
        bank.keys.add(unmixed_pair(home << 26U | remainder));
    }
}

}  // namespace shapes

// At least one key, and about `count` where the shape and the vocabulary allow it.
inline TestBank make_bank(Random& random, std::size_t shape, std::size_t count) {
    const std::size_t least = random.one_in(3) ? 1 : random.between(2, 4);
    const std::size_t most = random.one_in(3) ? 8 : random.between(least, 8);
    TestBank bank{kBankShapes[shape], random_vocab_size(random), {}};
    switch (shape) {
        case 0:
            shapes::uniform(random, bank, count, least, most);
            break;
        case 1:
            shapes::corpus(random, bank, count, least, most);
            break;
        case 2:
            shapes::dense(random, bank, count, least, most);
            break;
        case 3:
            shapes::constant(random, bank, count, least, most);
            break;
        case 4:
            shapes::near(random, bank, count, least, most);
            break;
        case 5:
            shapes::uniform(random, bank, count, most, most);
            break;
        case 6:
            shapes::few_deep(random, bank, count, least, most);
            break;
        case 7:
            shapes::gaps(random, bank, count, least, most);
            break;
        default:
            shapes::crowded(random, bank, count);
            break;
    }
    if (bank.keys.size() == 0) {
        bank.keys.add(random_key(random, bank.vocab_size, most));
    }
    return bank;
}

namespace shapes {

inline void append_piece(Random& random, const TestBank& bank, std::size_t shape,
                         std::vector<std::int64_t>& tokens) {
    if (shape == 0 || shape == 4) {
        tokens.push_back(shape == 0 ? random.token(bank.vocab_size) : random.frequent_token(bank.vocab_size));
        return;
    }
    const Key& key = bank.keys.keys()[random.below(bank.keys.size())];
    if (shape == 2 && bank.vocab_size == kLargestVocabulary && key.size() == 2 && random.one_in(2)) {
        // Another home, the same remainder.
        const Key twin = unmixed_pair(random.below(1U << 14U) << 26U | (mixed_pair(key) & kRemainderMask));
        tokens.insert(tokens.end(), twin.begin(), twin.end());
        return;
    }
    if (shape == 3) {
        tokens.insert(tokens.end(), random.between(1, 20), key[random.below(key.size())]);
        return;
    }
    std::size_t begin = 0;
    std::size_t end = key.size();
    if (shape == 5) {
        begin = random.below(key.size());
        end = random.between(begin + 1, key.size());
    }
    for (std::size_t index = begin; index < end; ++index) {
        const bool changed = shape == 2 && random.one_in(6);
        tokens.push_back(changed ? random.token(bank.vocab_size) : key[index]);
    }
}

// An id that is in no n-gram whatever the vocabulary is, or only just outside it.
inline std::int64_t outside(Random& random, std::uint64_t vocab_size) {
    const auto size = static_cast<std::int64_t>(vocab_size);
    const std::array<std::int64_t, 6> ids = {-1, size, -size, size + 1, 2'147'483'647, -2'147'483'647 - 1};
    return ids[random.below(ids.size())];
}

}  // namespace shapes

// `positions` tokens or a few more, as whole sequences. All ids fit in 32 bits.
inline Text make_text(Random& random, const TestBank& bank, std::size_t shape, std::size_t positions) {
    Text text;
    text.length = random.one_in(3) ? random.between(1, 12) : random.between(1, 3000);
    const std::size_t sequences = positions / text.length + 1;
    text.tokens.reserve(sequences * text.length + 32);
    while (text.tokens.size() < sequences * text.length) {
        shapes::append_piece(random, bank, shape, text.tokens);
    }
    text.tokens.resize(sequences * text.length);
    if (random.one_in(2)) {
        for (std::size_t count = random.below(positions / 16 + 2); count > 0; --count) {
            text.tokens[random.below(text.tokens.size())] = shapes::outside(random, bank.vocab_size);
        }
    }
    if (random.one_in(2)) {
        // Often a token of the text itself, once in a while one outside the vocabulary.
        text.eod = random.one_in(4) ? shapes::outside(random, bank.vocab_size)
                                    : text.tokens[random.below(text.tokens.size())];
    }
    if (random.one_in(2)) {
        text.document_starts.resize(text.tokens.size());
        const std::uint64_t spacing = random.between(1, random.one_in(2) ? 8 : 400);
        for (std::uint8_t& start : text.document_starts) {
            start = random.one_in(spacing) ? static_cast<std::uint8_t>(random.between(1, 255)) : 0;
        }
    }
    return text;
}

}  // namespace megatron_graft::testing
