// What every measurement needs: clocks, medians, a mixing function, raw arrays in files, and numbers as JSON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace megatron_graft::bench {

[[nodiscard]] double wall_seconds();
// Of the calling thread: what other processes take of its core does not count.
[[nodiscard]] double thread_seconds();

// The middle one; the mean of the two middle ones if their number is even.
[[nodiscard]] double median(std::vector<double> values);

// Spreads a counter over 64 bits.
[[nodiscard]] inline std::uint64_t scatter(std::uint64_t value) {
    value ^= value >> 32U;
    value *= 0xd6e8feb86659fd93ULL;
    value ^= value >> 32U;
    value *= 0xd6e8feb86659fd93ULL;
    return value ^ (value >> 32U);
}

// A uniform number below `limit` (at most 2^32) from the upper half of 64 scattered bits.
[[nodiscard]] inline std::uint64_t scale_to(std::uint64_t scattered, std::uint64_t limit) {
    return ((scattered >> 32U) * limit) >> 32U;
}

// Throws std::runtime_error naming the file if it cannot be written. Replaces a file that is there.
void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes);

template <typename Element>
void write_array(const std::filesystem::path& path, const std::vector<Element>& elements) {
    write_file(path, std::as_bytes(std::span(elements)));
}

// A JSON object, written member by member.
class Json {
  public:
    Json& add(std::string_view name, double value);
    Json& add(std::string_view name, std::uint64_t value);
    Json& add(std::string_view name, bool value);
    Json& add(std::string_view name, std::string_view value);
    Json& add(std::string_view name, const char* value) { return add(name, std::string_view(value)); }
    Json& add(std::string_view name, const Json& value);
    Json& add(std::string_view name, const std::vector<double>& values);

    [[nodiscard]] std::string text() const { return "{" + members_ + "}"; }

  private:
    Json& add_raw(std::string_view name, std::string_view value);
    std::string members_;
};

// Flags of the form --name value. Throws std::invalid_argument for a flag that is not known or has no value.
class Flags {
  public:
    Flags(int count, char** words, std::span<const std::string_view> known);

    // Throws std::invalid_argument if the flag is missing.
    [[nodiscard]] std::string text(std::string_view name) const;
    [[nodiscard]] std::string text(std::string_view name, std::string_view fallback) const;
    [[nodiscard]] std::uint64_t number(std::string_view name) const;
    [[nodiscard]] std::uint64_t number(std::string_view name, std::uint64_t fallback) const;

  private:
    [[nodiscard]] const std::string* find(std::string_view name) const;
    std::vector<std::pair<std::string, std::string>> values_;
};

}  // namespace megatron_graft::bench
