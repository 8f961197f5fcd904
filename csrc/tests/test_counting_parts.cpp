// The parts of counting, one by one: keys, tables, pools and streams.
#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "bucket_pool.hpp"
#include "check.hpp"
#include "checked.hpp"
#include "corpus_files.hpp"
#include "counted_key.hpp"
#include "kept_table.hpp"
#include "scratch.hpp"
#include "slice_counter.hpp"
#include "token_stream.hpp"

namespace megatron_graft::testing {
namespace {

TEST("a mix is undone for every width of keys") {
    std::mt19937_64 random(7);
    for (std::uint64_t parents = 1; parents < (1ULL << 32U); parents *= 3) {
        const KeyMix mix = counted_key_mix(parents);
        for (int round = 0; round < 1000; ++round) {
            const std::uint64_t key = random() & mix.mask;
            CHECK_EQUAL(unmix_key(mix_key(key, mix), mix), key);
            CHECK(share_of(mix_key(key, mix), mix.bits, 4096) < 4096);
        }
    }
    CHECK_EQUAL(counted_key_mix(kNoNode).bits, 52U);
    CHECK_THROWS(std::length_error, counted_key_mix(std::uint64_t{kNoNode} + 1), "do not fit in 32 bits");
}

TEST("a table of kept keys finds each of them in one of its ranges, and no other") {
    const ScratchDirectory directory;
    std::mt19937_64 random(11);
    for (const std::size_t entries : {0U, 1U, 5U, 3000U, 50000U}) {
        for (const std::uint64_t in_memory : {1U, 7U, 1000U, 100000U}) {
            if (in_memory < entries / 500) {
                continue;  // every range reads a file
            }
            const std::uint64_t parents = 1 + random() % (entries % 2 == 0 ? 1U << 20U : kNoNode);
            const KeyMix mix = counted_key_mix(parents);
            std::set<std::uint64_t> mixed;
            while (mixed.size() < entries) {
                mixed.insert(mix_key(counted_key(static_cast<std::uint32_t>(random() % parents),
                                                 static_cast<std::uint32_t>(random()) & kCountedTokenMask),
                                     mix));
            }
            std::vector<std::vector<std::uint64_t>> files(3);
            std::vector<std::uint64_t> asked;
            for (const std::uint64_t value : mixed) {
                files[share_of(value, mix.bits, files.size())].push_back(unmix_key(value, mix));
                asked.push_back(value);
                asked.push_back((value + 1) & mix.mask);
            }
            std::vector<KeptFile> kept;
            for (std::size_t file = 0; file < files.size(); ++file) {
                kept.push_back({directory / ("keys" + std::to_string(file)), files[file].size()});
                write_file(kept.back().path, files[file]);
            }
            asked.push_back(0);
            std::vector<std::uint32_t> places(asked.size());
            for (std::size_t index = 0; index < places.size(); ++index) {
                places[index] = static_cast<std::uint32_t>(places.size() - 1 - index);
            }
            std::vector<std::uint32_t> nodes(asked.size(), kNoNode);
            KeptTable table(kept, parents, in_memory);
            while (table.load_next()) {
                table.find(asked, places, nodes);
            }
            CHECK(table.is_last());
            for (std::size_t index = 0; index < asked.size(); ++index) {
                const auto found = mixed.find(asked[index]);
                const auto node = found == mixed.end() ? kNoNode : static_cast<std::uint32_t>(index / 2);
                // A key that is asked for as the neighbour of another comes one entry later.
                const auto later = found == mixed.end() || index % 2 == 0 ? node : node + 1;
                CHECK_EQUAL(nodes[places[index]], asked[index] == 0 && found != mixed.end() ? 0 : later);
            }
        }
    }
}

TEST("keys that are not ascending are refused") {
    const ScratchDirectory directory;
    const KeyMix mix = counted_key_mix(100);
    const std::filesystem::path keys = directory / "keys";
    write_file(keys, std::vector<std::uint64_t>{unmix_key(9, mix), unmix_key(8, mix)});
    KeptTable table({{keys, 2}}, 100, 10);
    CHECK_THROWS(FormatError, table.load_next(), "not ascending at entry 1 of " + keys.string());
    write_file(directory / "before", std::vector<std::uint64_t>{unmix_key(3, mix)});
    KeptTable second({{directory / "before", 1}, {keys, 2}}, 100, 10);
    CHECK_THROWS(FormatError, second.load_next(), "not ascending at entry 1 of " + keys.string());
    KeptTable longer({{keys, 3}}, 100, 10);
    CHECK_THROWS(FormatError, longer.load_next(), "ends at byte 16");
}

TEST("a table of sums grows and keeps every key") {
    std::mt19937_64 random(3);
    SumTable<std::uint64_t> table;
    for (const std::size_t room : {0U, 10U, 5000U}) {
        std::map<std::uint64_t, std::uint64_t> expected;
        table.start(room);
        for (int round = 0; round < 20000; ++round) {
            const std::uint64_t key = (random() % 3000) << (round % 2 == 0 ? 0U : 20U);
            const std::uint64_t amount = 1 + random() % 9;
            table.add(key, amount);
            expected[key] += amount;
        }
        std::map<std::uint64_t, std::uint64_t> found;
        table.for_each([&](std::uint64_t key, std::uint64_t sum) { CHECK(found.emplace(key, sum).second); });
        CHECK(found == expected);
        CHECK_EQUAL(table.size(), expected.size());
    }
}

TEST("a pool gives back what each bucket got, and says when it is full") {
    BucketPool<std::uint64_t> pool(5, 7);
    std::map<std::size_t, std::multiset<std::uint64_t>> pushed;
    std::mt19937_64 random(5);
    std::size_t total = 0;
    while (true) {
        const std::size_t bucket = random() % 4;
        if (!pool.push(bucket, total)) {
            break;
        }
        pushed[bucket].insert(total++);
    }
    CHECK(total >= 4 * BucketPool<std::uint64_t>::kPerBlock);
    CHECK(!pool.empty());
    for (std::size_t bucket = 0; bucket < 5; ++bucket) {
        std::multiset<std::uint64_t> found;
        pool.for_parts(bucket,
                       [&](std::span<const std::uint64_t> part) { found.insert(part.begin(), part.end()); });
        CHECK(found == pushed[bucket]);
        CHECK_EQUAL(pool.size(bucket), pushed[bucket].size());
    }
    pool.clear();
    CHECK(pool.empty());
    CHECK(pool.push(4, 1));
}

TEST("a stream marks the starts of documents, and empty ones nowhere") {
    const ScratchDirectory directory;
    const std::vector<CorpusPiece> pieces = {
        write_piece(directory, "one", {{}, {1, 2}, {}, {3}, {}, {}}), write_piece(directory, "none", {}),
        write_piece(directory, "empty", {{}, {}}), write_piece(directory, "two", {{4, 5, 6}}, 9)};
    for (const std::size_t block : {1U, 2U, 10U}) {
        TokenStream stream(pieces, 7, true);
        std::vector<std::uint32_t> all;
        std::vector<std::uint32_t> tokens(block);
        while (const std::size_t size = stream.read(tokens)) {
            CHECK_EQUAL(stream.data_set(), all.size() < 3 ? 0U : 9U);
            all.insert(all.end(), tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(size));
        }
        constexpr std::uint32_t kStart = TokenStream::kDocumentStart;
        CHECK(all == std::vector<std::uint32_t>({1 | kStart, 2, 3 | kStart, 4 | kStart, 5, 6}));
    }
}

TEST("a stream refuses ids outside the vocabulary and documents that do not fit") {
    const ScratchDirectory directory;
    std::vector<std::uint32_t> tokens(10);
    std::vector<CorpusPiece> pieces = {write_piece(directory, "set", {{1, 2}, {3, 4, 5}}, 6)};
    try {
        TokenStream(pieces, 4, true).read(tokens);
        CHECK(false);
    } catch (const TokenOutOfRange& error) {
        CHECK_EQUAL(error.data_set, 6U);
        CHECK_EQUAL(error.place, 3U);
        CHECK_EQUAL(error.value, 4);
    }
    pieces[0].num_documents = 1;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true).read(tokens), "too few documents");
    pieces[0].num_documents = 2;
    pieces[0].num_tokens = 4;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true).read(tokens), "do not add up");
    pieces[0].num_tokens = 2;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true).read(tokens), "do not add up");
    pieces[0].num_tokens = 0;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true), "do not add up");
    CHECK_EQUAL(TokenStream(pieces, 9, false).read(tokens), 0U);
    pieces[0].num_tokens = 6;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true).read(tokens), "ends at byte 20");
    pieces[0].lengths_offset = 0;
    pieces[0].num_tokens = 5;
    CHECK_THROWS(FormatError, TokenStream(pieces, 9, true).read(tokens), "a document of -77 tokens");
    pieces[0].id_bytes = 3;
    CHECK_THROWS(std::invalid_argument, TokenStream(pieces, 9, true), "3 bytes");
    pieces[0].id_bytes = 4;
    pieces[0].ids = directory / "missing";
    CHECK_THROWS(std::system_error, TokenStream(pieces, 9, true), "missing");
}

TEST("a document of more different n-grams than was said is refused") {
    DocumentKeys keys(2);
    CHECK(keys.is_new(5) && keys.is_new(6) && !keys.is_new(5));
    CHECK_THROWS(std::length_error, keys.is_new(7), "more than 2 distinct n-grams");
    keys.start_document();
    CHECK(keys.is_new(5) && keys.is_new(7));
}

}  // namespace
}  // namespace megatron_graft::testing
