#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "ngram_hash.hpp"
#include "thread_pool.hpp"

namespace megatron_graft::testing {
namespace {

constexpr std::int64_t kHighest = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLowest = std::numeric_limits<std::int64_t>::min();

std::int64_t rounded_down_remainder(std::int64_t number, std::int64_t divisor) {
    const std::int64_t rest = number % divisor;
    return rest < 0 ? rest + divisor : rest;
}

struct Constants {
    std::vector<std::int32_t> compressed_ids;
    std::vector<std::int64_t> multipliers;
    std::vector<std::int64_t> primes;
    std::vector<std::int64_t> offsets;
    std::int64_t pad = 0;
    std::optional<std::int64_t> eod;

    [[nodiscard]] NgramHash hash() const {
        return NgramHash({compressed_ids, multipliers, primes, offsets, pad, eod});
    }
};

// Two orders of two heads, small enough to work out by hand.
Constants small_constants() {
    return {{0, 1, 1, 2, 3}, {3, 5, 7}, {11, 13, 17, 19}, {0, 11, 24, 41}, 2, {}};
}

// The definition, walking back from one position at a time.
template <typename Token>
std::vector<std::int64_t> plain_rows(const Constants& constants, const std::vector<Token>& tokens,
                                     std::size_t length) {
    const std::size_t orders = constants.multipliers.size() - 1;
    const std::size_t heads = constants.primes.size() / orders;
    std::vector<std::int64_t> rows;
    for (std::size_t place = 0; place < tokens.size(); ++place) {
        std::uint64_t mix = 0;
        bool inside = true;
        for (std::size_t back = 0; back <= orders; ++back) {
            inside = inside && back <= place % length &&
                     (back == 0 || !constants.eod || std::int64_t{tokens[place - back]} != *constants.eod);
            std::int64_t id = constants.pad;
            if (inside) {
                id = tokens[place - back];
                id = id < 0 ? id : constants.compressed_ids.at(static_cast<std::size_t>(id));
            }
            mix ^= static_cast<std::uint64_t>(id) * static_cast<std::uint64_t>(constants.multipliers[back]);
            for (std::size_t head = 0; back > 0 && head < heads; ++head) {
                const std::size_t number = (back - 1) * heads + head;
                rows.push_back(
                    constants.offsets[number] +
                    rounded_down_remainder(static_cast<std::int64_t>(mix), constants.primes[number]));
            }
        }
    }
    return rows;
}

template <typename Token>
std::vector<std::int64_t> hashed(const Constants& constants, const std::vector<Token>& tokens,
                                 std::size_t length, unsigned threads = 1) {
    const NgramHash hash = constants.hash();
    std::vector<std::int64_t> rows(tokens.size() * hash.num_heads(), -7);
    hash.rows(std::span<const Token>(tokens), length, std::span(rows), shared_pool(threads));
    return rows;
}

TEST("a remainder is that of division, rounded down, for every number") {
    std::mt19937_64 random(20260112);
    // 2^63 - 25 is the largest prime of 63 bits.
    std::vector<std::int64_t> divisors = {2,         3,
                                          4,         7,
                                          646'403,   1'131'217,
                                          1LL << 31, (1LL << 31) - 1,
                                          1LL << 32, (1LL << 61) - 1,
                                          1LL << 62, kHighest - 24,
                                          kHighest};
    for (int trial = 0; trial < 300; ++trial) {
        divisors.push_back(
            std::max<std::int64_t>(2, static_cast<std::int64_t>(random() >> (1 + trial % 62))));
    }
    for (const std::int64_t divisor : divisors) {
        const Remainder remainder(divisor);
        std::vector<std::int64_t> numbers = {0, 1, -1, kHighest, kHighest - 1, kLowest, kLowest + 1};
        for (int trial = 0; trial < 300; ++trial) {
            const auto number = static_cast<std::int64_t>(random() >> (trial % 63));
            // Around multiples is where an estimated quotient would be off.
            const std::int64_t multiple = number / divisor * divisor;
            for (const std::int64_t near : {number, multiple, multiple - 1}) {
                numbers.push_back(near);
                numbers.push_back(-1 - near);
            }
        }
        for (const std::int64_t number : numbers) {
            CHECK_FOR(remainder.of(number) == rounded_down_remainder(number, divisor),
                      std::to_string(number) + " by " + std::to_string(divisor));
        }
    }
}

TEST("rows worked out by hand") {
    // Tokens 3 4 1 are the compressed ids 2 3 1; before them stands the pad, 2.
    // At the first: order 2: 2*3 ^ 2*5 = 6 ^ 10 = 12, mod 11 = 1, mod 13 = 12;
    //               order 3: 12 ^ 2*7 = 12 ^ 14 = 2, mod 17 = 2, mod 19 = 2.
    // At the second: 3*3 ^ 2*5 = 9 ^ 10 = 3; 3 ^ 2*7 = 3 ^ 14 = 13.
    // At the third: 1*3 ^ 3*5 = 3 ^ 15 = 12; 12 ^ 2*7 = 12 ^ 14 = 2.
    const std::vector<std::int64_t> rows = {0 + 1,   11 + 12, 24 + 2, 41 + 2,  0 + 3,  11 + 3,
                                            24 + 13, 41 + 13, 0 + 1,  11 + 12, 24 + 2, 41 + 2};
    CHECK(hashed<std::int32_t>(small_constants(), {3, 4, 1}, 3) == rows);
    CHECK(hashed<std::int64_t>(small_constants(), {3, 4, 1}, 3) == rows);
    // A token of -1 is mixed as it is: -3 ^ 10 = -9, mod 11 = 2, mod 13 = 4; -9 ^ 14 = -7, mod 17 = 10, mod
    // 19 = 12.
    const std::vector<std::int64_t> negative = {0 + 2, 11 + 4, 24 + 10, 41 + 12};
    CHECK(hashed<std::int32_t>(small_constants(), {-1}, 1) == negative);
    CHECK(hashed<std::int64_t>(small_constants(), {-1}, 1) == negative);
}

TEST("a token that ends a document is hashed with it and not with the next one") {
    Constants constants = small_constants();
    const std::vector<std::int64_t> joined = hashed<std::int32_t>(constants, {3, 0, 4, 1}, 4);
    constants.eod = 0;
    const std::vector<std::int64_t> parted = hashed<std::int32_t>(constants, {3, 0, 4, 1}, 4);
    const std::vector<std::int64_t> first = hashed<std::int32_t>(constants, {3, 0}, 2);
    const std::vector<std::int64_t> second = hashed<std::int32_t>(constants, {4, 1}, 2);
    CHECK(std::equal(first.begin(), first.end(), parted.begin()));
    CHECK(std::equal(second.begin(), second.end(), parted.begin() + 8));
    CHECK(std::equal(first.begin(), first.end(), joined.begin()));
    CHECK(parted != joined);
}

// Random constants of any size and batches whose ranges begin and end inside sequences.
template <typename Token>
void compare_random(unsigned seed) {
    std::mt19937_64 random(seed);
    const auto below = [&random](std::uint64_t bound) { return static_cast<std::int64_t>(random() % bound); };
    const std::int64_t vocab_size = 1 + below(40);
    Constants constants;
    for (std::int64_t id = 0; id < vocab_size; ++id) {
        constants.compressed_ids.push_back(
            static_cast<std::int32_t>(below(static_cast<std::uint64_t>(vocab_size))));
    }
    const std::size_t orders = 1 + seed % 7;
    const std::size_t heads = 1 + random() % 4;
    for (std::size_t back = 0; back <= orders; ++back) {
        // Wide ones wrap, as they do for negative tokens.
        constants.multipliers.push_back(static_cast<std::int64_t>(random() >> (seed % 2 == 0 ? 1 : 8)) | 1);
    }
    std::int64_t total = 0;
    for (std::size_t head = 0; head < orders * heads; ++head) {
        constants.primes.push_back(2 + below(1ULL << (1 + random() % 50)));
        constants.offsets.push_back(total);
        total += constants.primes.back();
    }
    constants.pad = below(static_cast<std::uint64_t>(vocab_size));
    if (seed % 3 != 0) {
        constants.eod = below(static_cast<std::uint64_t>(vocab_size));
    }
    for (const std::size_t length : {1U, 2U, 3U, 50U, 5000U}) {
        std::vector<Token> tokens(length * (1 + random() % 3));
        for (Token& token : tokens) {
            token = static_cast<Token>(random() % 10 == 0 ? -1 - below(1ULL << 30)
                                                          : below(static_cast<std::uint64_t>(vocab_size)));
        }
        const std::vector<std::int64_t> expected = plain_rows(constants, tokens, length);
        for (const unsigned threads : {1U, 2U, 3U}) {
            CHECK_FOR(hashed(constants, tokens, length, threads) == expected,
                      "seed " + std::to_string(seed) + ", length " + std::to_string(length) + ", threads " +
                          std::to_string(threads));
        }
    }
}

TEST("random batches of every order and any number of threads") {
    for (unsigned seed = 0; seed < 21; ++seed) {
        compare_random<std::int32_t>(seed);
        compare_random<std::int64_t>(seed);
    }
}

TEST("nothing has no rows") {
    CHECK(hashed<std::int32_t>(small_constants(), {}, 0).empty());
    CHECK(hashed<std::int64_t>(small_constants(), {}, 5).empty());
}

TEST("the first token without a compressed id is named") {
    std::vector<std::int32_t> tokens(4000, 1);
    tokens[3990] = 6;
    tokens[1700] = std::numeric_limits<std::int32_t>::max();
    for (const unsigned threads : {1U, 2U}) {
        CHECK_THROWS(std::out_of_range, hashed(small_constants(), tokens, 2000, threads),
                     "token 1700 is 2147483647, outside a vocabulary of 5");
    }
    CHECK_THROWS(std::out_of_range, hashed<std::int64_t>(small_constants(), {1, 5}, 2), "token 1 is 5");
    CHECK_THROWS(std::out_of_range, hashed<std::int64_t>(small_constants(), {1LL << 32}, 1), "token 0");
}

TEST("constants that do not fit each other are refused") {
    const auto with = [](auto change) {
        Constants constants = small_constants();
        change(constants);
        return constants;
    };
    const auto refuse = [&with](auto change, const std::string& part) {
        CHECK_THROWS(std::invalid_argument, with(change).hash(), part);
    };
    refuse([](Constants& constants) { constants.multipliers = {}; }, "0 multipliers");
    refuse([](Constants& constants) { constants.multipliers = {3}; }, "1 multipliers");
    refuse([](Constants& constants) { constants.multipliers.resize(9); }, "9 multipliers, expected 2 to 8");
    refuse([](Constants& constants) { constants.primes = {}; }, "0 primes for 2 orders");
    refuse([](Constants& constants) { constants.primes = {2, 3, 5}; }, "3 primes for 2 orders");
    refuse([](Constants& constants) { constants.primes[3] = 1; }, "a modulus is 1");
    refuse([](Constants& constants) { constants.primes[0] = kLowest; }, "a modulus is -");
    refuse([](Constants& constants) { constants.offsets.pop_back(); }, "3 offsets for 4 primes");
    refuse([](Constants& constants) { constants.offsets[1] = -1; }, "an offset is -1");
    refuse([](Constants& constants) { constants.offsets[1] = kHighest - 12; }, "an offset is 9");
}

TEST("spans that do not fit each other are refused") {
    const NgramHash hash = small_constants().hash();
    const std::vector<std::int32_t> tokens = {1, 2, 3};
    std::vector<std::int64_t> rows(13, -7);
    const auto call = [&](std::size_t length, std::size_t places) {
        hash.rows(std::span(tokens), length, std::span(rows).first(places), shared_pool(1));
    };
    CHECK_THROWS(std::invalid_argument, call(2, 12), "whole sequences");
    CHECK_THROWS(std::invalid_argument, call(0, 12), "whole sequences");
    for (const std::size_t places : {0U, 8U, 11U, 13U}) {
        CHECK_THROWS(std::invalid_argument, call(3, places), "expected 4 for each of 3 tokens");
    }
    CHECK(rows == std::vector<std::int64_t>(13, -7));
    call(3, 12);
    CHECK_EQUAL(rows[12], -7);
}

}  // namespace
}  // namespace megatron_graft::testing
