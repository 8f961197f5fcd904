// Makes a bank's keys from synthetic text: ids.i32 [N, max_order], orders.u8 [N], counts.u32 [N] and text.i32
// (held-out text of the same language) in a directory that exists. Prints one JSON object that says what was
// made. With
// --training-text PATH the text that was counted is kept too.
#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>

#include "measure.hpp"
#include "ngram_counter.hpp"
#include "synthetic_text.hpp"

namespace megatron_graft::bench {
namespace {

constexpr std::uint64_t kTrainingSeed = 1234;
constexpr std::uint64_t kHeldOutSeed = 987654321;

int run(const Flags& flags) {
    const std::filesystem::path output = flags.text("output");
    const auto vocab_size = static_cast<std::uint32_t>(flags.number("vocab-size"));
    const std::uint64_t tokens = flags.number("tokens");
    const std::uint64_t held_out = flags.number("held-out-tokens");
    const ThreadPool pool(static_cast<unsigned>(flags.number("threads", 1)));
    CountOptions options;
    options.max_order = static_cast<unsigned>(flags.number("max-order", 5));
    options.min_count = static_cast<std::uint32_t>(flags.number("min-count", 2));

    const double start = wall_seconds();
    write_array(output / "text.i32", synthetic_text({held_out, vocab_size, kHeldOutSeed}, pool));
    Json by_order;
    std::vector<CountedLevel> levels;
    {
        const std::vector<std::int32_t> text = synthetic_text({tokens, vocab_size, kTrainingSeed}, pool);
        options.counted = [&](unsigned order, const CountedLevel& level) {
            by_order.add(std::to_string(order), static_cast<std::uint64_t>(level.keys.size()));
            std::fprintf(stderr, "counted order %u: %zu n-grams at least %u times, %.0f s\n", order,
                         level.keys.size(), options.min_count, wall_seconds() - start);
        };
        if (const std::string path = flags.text("training-text", ""); !path.empty()) {
            write_array(path, text);
        }
        levels = count_levels(text, kEod, options, pool);
    }
    const CanonicalKeys keys = canonical_keys(levels, vocab_size, pool);
    write_array(output / "ids.i32", keys.ids);
    write_array(output / "orders.u8", keys.orders);
    write_array(output / "counts.u32", keys.counts);
    Json made;
    made.add("tokens", tokens).add("vocab_size", std::uint64_t{vocab_size}).add("eod", std::uint64_t{kEod});
    made.add("max_order", std::uint64_t{options.max_order})
        .add("min_count", std::uint64_t{options.min_count});
    made.add("entries", static_cast<std::uint64_t>(keys.orders.size())).add("entries_by_order", by_order);
    made.add("held_out_tokens", held_out).add("seconds", wall_seconds() - start);
    std::printf("%s\n", made.text().c_str());
    return 0;
}

}  // namespace
}  // namespace megatron_graft::bench

int main(int count, char** words) {
    constexpr std::array<std::string_view, 8> kFlags = {"output",     "tokens",       "held-out-tokens",
                                                        "vocab-size", "max-order",    "min-count",
                                                        "threads",    "training-text"};
    try {
        return megatron_graft::bench::run(megatron_graft::bench::Flags(count, words, kFlags));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
