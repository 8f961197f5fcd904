#include "measure.hpp"

#include <time.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <stdexcept>

namespace megatron_graft::bench {
namespace {

std::string digits_of(double value) {
    std::array<char, 64> digits{};
    static_cast<void>(std::snprintf(digits.data(), digits.size(), "%.6g", value));
    return digits.data();
}

}  // namespace

double wall_seconds() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

double thread_seconds() {
    timespec time{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

double median(std::vector<double> values) {
    if (values.empty()) {
        throw std::invalid_argument("the median of nothing");
    }
    std::sort(values.begin(), values.end());
    const std::size_t middle = values.size() / 2;
    return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
    std::ofstream stream(path, std::ios::binary | std::ios::trunc);
    // A char may stand for any byte; std::ofstream takes no other.
    stream.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    stream.close();
    if (!stream) {
        throw std::runtime_error(path.string() + ": cannot be written");
    }
}

Json& Json::add_raw(std::string_view name, std::string_view value) {
    members_ += members_.empty() ? "\"" : ", \"";
    members_ += name;
    members_ += "\": ";
    members_ += value;
    return *this;
}

Json& Json::add(std::string_view name, double value) {
    return add_raw(name, digits_of(value));
}

Json& Json::add(std::string_view name, std::uint64_t value) {
    return add_raw(name, std::to_string(value));
}

Json& Json::add(std::string_view name, bool value) {
    return add_raw(name, value ? "true" : "false");
}

Json& Json::add(std::string_view name, std::string_view value) {
    std::string quoted(1, '"');
    quoted.append(value).push_back('"');
    return add_raw(name, quoted);
}

Json& Json::add(std::string_view name, const Json& value) {
    return add_raw(name, value.text());
}

Json& Json::add(std::string_view name, const std::vector<double>& values) {
    std::string text = "[";
    for (std::size_t at = 0; at < values.size(); ++at) {
        text += (at == 0 ? "" : ", ") + digits_of(values[at]);
    }
    return add_raw(name, text + "]");
}

Flags::Flags(int count, char** words, std::span<const std::string_view> known) {
    for (int at = 1; at < count; at += 2) {
        const std::string flag = words[at];
        const bool is_known =
            flag.starts_with("--") && std::find(known.begin(), known.end(), flag.substr(2)) != known.end();
        if (!is_known || at + 1 == count) {
            throw std::invalid_argument(flag +
                                        (is_known ? " lacks its value" : " is not a flag of this program"));
        }
        values_.emplace_back(flag.substr(2), words[at + 1]);
    }
}

const std::string* Flags::find(std::string_view name) const {
    const auto has_name = [&](const auto& entry) { return entry.first == name; };
    const auto found = std::find_if(values_.begin(), values_.end(), has_name);
    return found == values_.end() ? nullptr : &found->second;
}

std::string Flags::text(std::string_view name) const {
    const std::string* const value = find(name);
    if (value == nullptr) {
        throw std::invalid_argument("--" + std::string(name) + " is required");
    }
    return *value;
}

std::string Flags::text(std::string_view name, std::string_view fallback) const {
    const std::string* const value = find(name);
    return value == nullptr ? std::string(fallback) : *value;
}

std::uint64_t Flags::number(std::string_view name) const {
    const std::string value = text(name);
    std::uint64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size()) {
        throw std::invalid_argument("--" + std::string(name) + " " + value + " is not a number");
    }
    return number;
}

std::uint64_t Flags::number(std::string_view name, std::uint64_t fallback) const {
    return find(name) == nullptr ? fallback : number(name);
}

}  // namespace megatron_graft::bench
