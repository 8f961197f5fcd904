// Builds the index of a directory's keys (ids.i32 [N, max_order], orders.u8 [N]) and measures lookup over its
// text.i32. Prints one JSON object. --measure size builds only, pages stops after the page sizes.
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <stdexcept>

#include "lookup_bench.hpp"

namespace megatron_graft::bench {
namespace {

template <typename Element>
std::span<const Element> elements_of(const MappedFile& file) {
    const std::span<const std::byte> bytes = file.bytes();
    // A mapping starts on a page, and what it holds was written as such elements.
    return {reinterpret_cast<const Element*>(bytes.data()), bytes.size() / sizeof(Element)};
}

std::vector<std::int32_t> first_tokens(const std::filesystem::path& path, std::size_t positions) {
    const MappedFile file(path);
    const auto tokens = elements_of<std::int32_t>(file);
    if (tokens.size() < positions) {
        throw std::invalid_argument(path.string() + " has fewer tokens than --positions");
    }
    return {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(positions)};
}

void report_stage(const char* stage, double start) {
    std::fprintf(stderr, "%s, %.0f s\n", stage, wall_seconds() - start);
}

int run(const Flags& flags) {
    const std::filesystem::path data = flags.text("data");
    const std::size_t max_order = flags.number("max-order");
    const MappedFile ids_file(data / "ids.i32");
    const MappedFile orders_file(data / "orders.u8");
    const std::span<const std::uint8_t> all_orders = elements_of<std::uint8_t>(orders_file);
    const std::size_t rows = flags.number("rows", all_orders.size());
    if (rows > all_orders.size() || rows * max_order > elements_of<std::int32_t>(ids_file).size()) {
        throw std::invalid_argument("ids.i32 and orders.u8 do not hold so many rows");
    }
    const KeyTable keys{elements_of<std::int32_t>(ids_file).first(rows * max_order), all_orders.first(rows),
                        max_order};
    const LookupSettings settings{.index = flags.text("index"),
                                  .reuse_index = flags.text("reuse-index", "no") == "yes",
                                  .vocab_size = flags.number("vocab-size"),
                                  .eod = static_cast<std::int32_t>(flags.number("eod")),
                                  .rounds = flags.number("rounds", 5),
                                  .line_reads = flags.number("line-reads", 4'000'000),
                                  .threads = static_cast<unsigned>(flags.number("threads", 2))};
    const double start = wall_seconds();
    LookupBench bench(settings, keys, first_tokens(data / "text.i32", flags.number("positions")));
    report_stage("answers known", start);
    Json result;
    result.add("build", bench.build());
    report_stage("index built", start);
    result.add("workloads", bench.describe_workloads());
    const std::string measured = flags.text("measure", "all");
    if (measured == "all" || measured == "pages") {
        result.add("pages", bench.pages());
        report_stage("page sizes measured", start);
    } else if (measured != "size") {
        throw std::invalid_argument("--measure is all, pages or size");
    }
    if (measured == "all") {
        result.add("open", bench.open());
        result.add("bodies", bench.bodies()).add("threads", bench.threads());
        report_stage("bodies and threads measured", start);
        result.add("tables", bench.tables());
        report_stage("tables measured", start);
    }
    result.add("mismatches", bench.mismatches());
    if (const std::string directory = flags.text("answers", ""); !directory.empty()) {
        bench.write_answers(directory);
    }
    std::printf("%s\n", result.text().c_str());
    return 0;
}

}  // namespace
}  // namespace megatron_graft::bench

int main(int count, char** words) {
    constexpr std::array<std::string_view, 13> kFlags = {
        "data",   "index",   "rows",    "max-order",  "positions", "eod",        "vocab-size",
        "rounds", "threads", "measure", "line-reads", "answers",   "reuse-index"};
    try {
        return megatron_graft::bench::run(megatron_graft::bench::Flags(count, words, kFlags));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
