#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "gather.hpp"

namespace megatron_graft::testing {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t kLarge = 1'100'000;  // more than an output that stays in the caches
constexpr Body kBodies[] = {Body::kAuto, Body::kPlain, Body::kPortable, Body::kAvx2, Body::kAvx512};

// Random rows in memory, cut into shards, each at its own misalignment and in memory of its own, so that an
// address sanitizer sees a byte read beside it.
class SampleRows {
  public:
    SampleRows(const std::vector<std::size_t>& row_bytes, const std::vector<std::size_t>& cuts, bool scaled,
               std::uint64_t seed)
        : random_(seed) {
        for (const std::size_t bytes : row_bytes) {
            layers_.emplace_back();
            for (const std::size_t rows : cuts) {
                RowShard shard{random_bytes(rows * bytes), rows, bytes};
                shard.scales = scaled ? random_bytes(rows * kScaleBytes) : nullptr;
                layers_.back().push_back(shard);
            }
        }
    }

    [[nodiscard]] const std::vector<RowLayer>& layers() const { return layers_; }

    // The definition, byte for byte.
    [[nodiscard]] Bytes expected(const std::vector<std::int64_t>& rows,
                                 const std::vector<ByteRange>& ranges) const {
        Bytes out;
        for (const std::int64_t row : rows) {
            for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
                const auto [begin, end] = ranges[layer];
                append(out, row < 0 ? nullptr : stored(layer, row) + begin, end - begin);
            }
            out.resize((out.size() + 3) / 4 * 4);  // every row starts at a multiple of 4
            for (std::size_t layer = 0; layer < layers_.size() && layers_[layer].front().scales != nullptr;
                 ++layer) {
                append(out, row < 0 ? nullptr : scale(layer, row), kScaleBytes);
            }
        }
        return out;
    }

  private:
    const std::byte* random_bytes(std::size_t size) {
        const std::size_t offset = random_() % 70;
        Bytes& bytes = memory_.emplace_back(offset + size + 1);  // never null, even for no bytes
        std::generate(bytes.begin(), bytes.end(),
                      [this] { return static_cast<std::byte>(random_() & 255U); });
        return bytes.data() + offset;
    }
    // Zeros for a null source.
    static void append(Bytes& out, const std::byte* source, std::size_t size) {
        if (source == nullptr) {
            out.resize(out.size() + size);
        } else {
            out.insert(out.end(), source, source + size);
        }
    }
    static std::pair<const RowShard*, std::size_t> find(const RowLayer& layer, std::int64_t row) {
        auto rest = static_cast<std::size_t>(row);
        const RowShard* shard = layer.data();
        for (; rest >= shard->rows; ++shard) {
            rest -= shard->rows;
        }
        return {shard, rest};
    }
    [[nodiscard]] const std::byte* stored(std::size_t layer, std::int64_t row) const {
        const auto [shard, local] = find(layers_[layer], row);
        return shard->data + local * shard->row_bytes;
    }
    [[nodiscard]] const std::byte* scale(std::size_t layer, std::int64_t row) const {
        const auto [shard, local] = find(layers_[layer], row);
        return shard->scales + local * kScaleBytes;
    }

    std::mt19937_64 random_;
    std::vector<Bytes> memory_;
    std::vector<RowLayer> layers_;
};

std::vector<std::int64_t> random_rows(std::size_t count, std::size_t rows, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::int64_t> numbers(count);
    for (std::int64_t& number : numbers) {
        number = rows == 0 || random() % 6 == 0 ? -1 - static_cast<std::int64_t>(random() >> 1U)
                                                : static_cast<std::int64_t>(random() % rows);
    }
    return numbers;
}

// Gathers into a buffer that starts `offset` bytes behind a cache line, with guards on both sides.
void check_gather(const SampleRows& sample, const std::vector<std::int64_t>& rows,
                  const std::vector<ByteRange>& ranges, std::size_t offset, const ThreadPool* pool, Body body,
                  const std::string& what) {
    constexpr std::size_t kGuard = 64;
    constexpr std::byte kUntouched{0xa5};
    const RowGatherer gatherer(sample.layers());
    const Bytes expected = sample.expected(rows, ranges);
    CHECK_FOR(expected.size() == rows.size() * gatherer.bytes_of_row(ranges), what);
    Bytes buffer(expected.size() + 4 * kGuard, kUntouched);
    const std::size_t past = reinterpret_cast<std::uintptr_t>(buffer.data()) % kGuard;
    const std::size_t start = kGuard + (kGuard - past) + offset;
    gatherer.gather(rows, std::span(buffer).subspan(start, expected.size()), ranges, pool, body);
    const auto begin = buffer.begin() + static_cast<std::ptrdiff_t>(start);
    const auto end = begin + static_cast<std::ptrdiff_t>(expected.size());
    CHECK_FOR(std::equal(begin, end, expected.begin()), what);
    const auto untouched = [](std::byte byte) { return byte == kUntouched; };
    CHECK_FOR(std::all_of(buffer.begin(), begin, untouched) && std::all_of(end, buffer.end(), untouched),
              what);
}

std::vector<ByteRange> whole(const std::vector<std::size_t>& row_bytes) {
    std::vector<ByteRange> ranges;
    for (const std::size_t bytes : row_bytes) {
        ranges.push_back({0, bytes});
    }
    return ranges;
}

TEST("every body copies rows of every length to every alignment") {
    for (const Body body : kBodies) {
        for (const std::size_t bytes : {1U, 2U, 63U, 64U, 65U, 127U, 128U, 200U, 1024U}) {
            const SampleRows sample({bytes}, {40}, false, bytes);
            for (const std::size_t offset : {0U, 1U, 4U, 32U, 63U}) {
                const std::string what = "body " + std::to_string(static_cast<int>(body)) + ", " +
                                         std::to_string(bytes) + " bytes, offset " + std::to_string(offset);
                if (body_available(body)) {
                    check_gather(sample, random_rows(9, 40, offset), whole({bytes}), offset, nullptr, body,
                                 what);
                }
            }
        }
    }
}

TEST("every body copies much at once") {
    const ThreadPool pool(2);
    for (const Body body : kBodies) {
        for (const std::size_t bytes : {63U, 64U, 200U, 1024U}) {
            const SampleRows sample({bytes}, {40}, false, bytes);
            const std::vector<std::int64_t> rows = random_rows(kLarge / bytes, 40, bytes);
            for (const std::size_t offset : {0U, 37U}) {
                const std::string what = "body " + std::to_string(static_cast<int>(body)) + ", " +
                                         std::to_string(bytes) + " bytes, offset " + std::to_string(offset);
                if (body_available(body)) {
                    check_gather(sample, rows, whole({bytes}), offset, &pool, body, what);
                }
            }
        }
    }
}

TEST("layers stand side by side, scales behind them, whatever the shards") {
    const ThreadPool pool(3);
    const std::vector<std::vector<std::size_t>> cuts = {
        {50},
        {25, 25},
        {1, 49},
        {49, 1},
        {7, 7, 7, 7, 22},
        {0, 10, 0, 0, 40},
        {50, 0, 0},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 31},
    };
    for (const auto& cut : cuts) {
        for (const std::vector<std::size_t>& widths :
             {std::vector<std::size_t>{64}, {7, 130, 1}, {96, 0, 33}}) {
            for (const bool scaled : {false, true}) {
                const std::string what = std::to_string(cut.size()) + " shards, " +
                                         std::to_string(widths.size()) + " layers, scaled " +
                                         std::to_string(scaled);
                const SampleRows sample(widths, cut, scaled, 11);
                check_gather(sample, random_rows(200, 50, 5), whole(widths), 3, nullptr, Body::kAuto, what);
                if (scaled && widths.size() == 3) {
                    check_gather(sample, random_rows(kLarge / 64, 50, 6), whole(widths), 0, &pool,
                                 Body::kAuto, what);
                }
            }
        }
    }
}

TEST("every row of every shard is found") {
    const std::vector<std::size_t> cut = {3, 0, 1, 90, 2, 0, 17, 64};
    const SampleRows sample({12}, cut, true, 3);
    std::vector<std::int64_t> rows(177);
    for (std::size_t row = 0; row < rows.size(); ++row) {
        rows[row] = static_cast<std::int64_t>(row);
    }
    check_gather(sample, rows, whole({12}), 0, nullptr, Body::kAuto, "all rows");
}

TEST("a column slice is the same bytes as in whole rows") {
    const std::vector<std::size_t> widths = {40, 24, 64};
    for (const bool scaled : {false, true}) {
        const SampleRows sample(widths, {30, 20}, scaled, 17);
        std::mt19937_64 random(5);
        for (int repeat = 0; repeat < 200; ++repeat) {
            std::vector<ByteRange> ranges;
            for (const std::size_t width : widths) {
                const std::size_t begin = random() % (width + 1);
                ranges.push_back({begin, begin + random() % (width + 1 - begin)});
            }
            check_gather(sample, random_rows(40, 50, random()), ranges, random() % 64, nullptr, Body::kAuto,
                         "repeat " + std::to_string(repeat));
        }
        check_gather(sample, random_rows(40, 50, 2), {{0, 0}, {0, 0}, {0, 0}}, 0, nullptr, Body::kAuto,
                     "no columns");
    }
}

TEST("rows of a gather that is split among threads are the same") {
    const SampleRows sample({512, 256}, {100, 100}, true, 23);
    const std::vector<std::int64_t> rows = random_rows(4000, 200, 29);  // 3 MB: several ranges
    for (const unsigned threads : {1U, 2U, 5U}) {
        const ThreadPool pool(threads);
        check_gather(sample, rows, whole({512, 256}), 8, &pool, Body::kAuto,
                     std::to_string(threads) + " threads");
    }
}

TEST("several callers gather at once") {
    const SampleRows sample({128}, {100}, false, 31);
    const RowGatherer gatherer(sample.layers());
    const ThreadPool pool(2);
    std::vector<std::vector<std::int64_t>> rows;
    std::vector<Bytes> outs(4);
    for (std::size_t caller = 0; caller < outs.size(); ++caller) {
        rows.push_back(random_rows(8000, 100, caller));
        outs[caller].resize(8000 * 128);
    }
    std::vector<std::thread> callers;
    for (std::size_t caller = 0; caller < outs.size(); ++caller) {
        callers.emplace_back([&, caller] {
            for (int repeat = 0; repeat < 5; ++repeat) {
                gatherer.gather(rows[caller], outs[caller], gatherer.all_columns(), &pool);
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    for (std::size_t caller = 0; caller < outs.size(); ++caller) {
        CHECK(outs[caller] == sample.expected(rows[caller], whole({128})));
    }
}

TEST("nothing is written if one row is not there") {
    const SampleRows sample({64}, {30, 20}, false, 37);
    const RowGatherer gatherer(sample.layers());
    const ThreadPool pool(2);
    for (const std::int64_t bad :
         {std::int64_t{50}, std::int64_t{51}, std::numeric_limits<std::int64_t>::max()}) {
        std::vector<std::int64_t> rows(8000, 1);
        rows.back() = bad;
        Bytes out(rows.size() * 64, std::byte{0xa5});
        CHECK_THROWS(std::out_of_range, gatherer.gather(rows, out, gatherer.all_columns(), &pool),
                     "row " + std::to_string(bad) + " of a bank of 50 rows");
        CHECK(std::all_of(out.begin(), out.end(), [](std::byte byte) { return byte == std::byte{0xa5}; }));
    }
}

TEST("arguments that do not fit are refused") {
    const SampleRows sample({64, 32}, {30}, false, 41);
    const RowGatherer gatherer(sample.layers());
    const std::vector<std::int64_t> rows = {1, 2};
    Bytes out(2 * 96);
    const auto gather = [&](const std::vector<ByteRange>& ranges) { gatherer.gather(rows, out, ranges); };
    gather(whole({64, 32}));
    CHECK_THROWS(std::invalid_argument, gather({{0, 64}}), "one range for each layer");
    CHECK_THROWS(std::invalid_argument, gather({{0, 64}, {0, 33}}), "inside its layer's row");
    CHECK_THROWS(std::invalid_argument, gather({{0, 64}, {9, 8}}), "inside its layer's row");
    CHECK_THROWS(std::invalid_argument, gather({{0, 60}, {0, 32}}), "out is not as long");
    for (const Body body : {Body::kAvx2, Body::kAvx512}) {
        if (!body_available(body)) {
            CHECK_THROWS(std::invalid_argument, gatherer.gather(rows, out, whole({64, 32}), nullptr, body),
                         "lacks");
        }
    }
}

TEST("rows that do not belong together are refused") {
    const std::byte bytes[64] = {};
    const RowShard shard{bytes, 4, 8};
    const RowShard longer{bytes, 5, 8};
    const RowShard wider{bytes, 4, 9};
    const RowShard scaled{bytes, 4, 8, bytes};
    const auto make = [](std::vector<RowLayer> layers) { return RowGatherer(std::move(layers)).rows(); };
    CHECK_EQUAL(make({{shard, longer}, {wider, RowShard{bytes, 5, 9}}}), 9U);
    CHECK_THROWS(std::invalid_argument, make({}), "no layer");
    CHECK_THROWS(std::invalid_argument, make({{}}), "without shards");
    CHECK_THROWS(std::invalid_argument, make({{shard}, {longer}}), "differ in their rows");
    CHECK_THROWS(std::invalid_argument, make({{shard, longer}, {longer, shard}}), "cut into shards");
    CHECK_THROWS(std::invalid_argument, make({{shard}, {}}), "cut into shards");
    CHECK_THROWS(std::invalid_argument, make({{shard, wider}}), "differ in row_bytes");
    CHECK_THROWS(std::invalid_argument, make({{shard, scaled}}), "only some shards");
    CHECK_THROWS(std::invalid_argument, make({{scaled}, {shard}}), "only some layers");
    constexpr std::size_t kHuge = std::numeric_limits<std::size_t>::max() / 4;
    CHECK_THROWS(std::length_error, make({{RowShard{bytes, kHuge, 8}}}), "64 bits");
    const RowShard many{bytes, kHuge, 1};
    CHECK_THROWS(std::length_error, make({{many, many, many}}), "63 bits");
}

}  // namespace
}  // namespace megatron_graft::testing
