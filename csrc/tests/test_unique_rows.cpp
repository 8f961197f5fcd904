#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "unique_rows.hpp"

namespace megatron_graft::testing {
namespace {

constexpr std::int64_t kHighest = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLowest = std::numeric_limits<std::int64_t>::min();

// Checks the answer against the definition, with an ordered set.
void check_unique(const std::vector<std::int64_t>& rows, const std::string& what) {
    std::vector<std::int64_t> unique(rows.size(), -7);
    std::vector<std::int32_t> inverse(rows.size(), -7);
    const std::size_t count = unique_rows(rows, unique, inverse);
    const std::set<std::int64_t> ordered(rows.begin(), rows.end());
    const std::vector<std::int64_t> distinct(ordered.lower_bound(0), ordered.end());
    CHECK_FOR(count == distinct.size(), what);
    CHECK_FOR(std::equal(distinct.begin(), distinct.end(), unique.begin()), what);
    for (std::size_t place = 0; place < rows.size(); ++place) {
        const auto found = std::lower_bound(distinct.begin(), distinct.end(), rows[place]);
        const auto expected = rows[place] < 0 ? 0 : found - distinct.begin() + 1;
        CHECK_FOR(inverse[place] == expected, what + ", place " + std::to_string(place));
    }
}

TEST("distinct rows are ascending and every row finds its own") {
    check_unique({}, "nothing");
    check_unique({5}, "one row");
    check_unique({-1}, "one miss");
    check_unique({-1, kLowest, -5}, "misses only");
    check_unique({0, 0, 0, 0}, "one row again and again");
    check_unique({7, -1, 3, 7, 0, -1, 3}, "repeats among misses");
}

TEST("row numbers of any width are kept whole") {
    const std::int64_t two_to_32 = std::int64_t{1} << 32;
    check_unique({two_to_32 - 1, 0, two_to_32 - 2, two_to_32 - 1}, "up to 2^32 - 1");
    check_unique({two_to_32, 0, two_to_32 + 1, 1, two_to_32}, "equal in their low 32 bits");
    check_unique({kHighest, 0, -1, kHighest - 1, kHighest, kLowest}, "up to 2^63 - 1");
}

TEST("random rows of every density and width") {
    std::mt19937_64 random(20240611);
    for (int width = 1; width <= 63; ++width) {
        for (const std::size_t length : {2U, 100U, 3000U}) {
            std::vector<std::int64_t> rows(length);
            for (std::int64_t& row : rows) {
                row = static_cast<std::int64_t>(random() >> (64 - width));
                row = random() % 5 == 0 ? -1 - row : row;
            }
            check_unique(rows, "width " + std::to_string(width) + ", length " + std::to_string(length));
        }
    }
}

TEST("outputs of the wrong length are refused") {
    const std::vector<std::int64_t> rows = {1, 2};
    std::vector<std::int64_t> unique(2);
    std::vector<std::int32_t> inverse(2);
    CHECK_THROWS(std::invalid_argument, unique_rows(rows, std::span(unique).first(1), inverse),
                 "as long as rows");
    CHECK_THROWS(std::invalid_argument, unique_rows(rows, unique, std::span(inverse).first(1)),
                 "as long as rows");
    std::vector<std::int64_t> longer(5, -7);
    CHECK_EQUAL(unique_rows(rows, longer, inverse), 2U);
    CHECK(longer == std::vector<std::int64_t>({1, 2, -7, -7, -7}));
}

}  // namespace
}  // namespace megatron_graft::testing
