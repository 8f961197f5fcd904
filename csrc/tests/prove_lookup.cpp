// Checks the index against the brute-force oracle on many positions of banks and texts of every shape:
//
//   prove_lookup --positions N [--seed S] [--threads T] [--json FILE]
//
// Every round makes a bank, builds its index, and compares all answers, the incremental ones on a part of the
// text. A round depends on the seed and its own number alone, so one that failed can be run again
// (--round R runs just that one). Exits 1 if any answer differs.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "built_index.hpp"
#include "fast_oracle.hpp"
#include "shapes.hpp"

namespace megatron_graft::testing {
namespace {

constexpr std::size_t kTextPositions = 1U << 14U;
// Shapes of the texts of every bank: those made of keys twice, they have the most hits.
constexpr std::array<std::size_t, 8> kTexts = {0, 1, 2, 3, 4, 5, 1, 2};
constexpr std::size_t kSteppedPositions = 1U << 12U;
constexpr double kSecondsPerLine = 5.0;
constexpr int kShownMismatches = 10;

struct Settings {
    std::uint64_t positions = 1'000'000;
    std::uint64_t seed = 1;
    std::optional<std::uint64_t> round;
    unsigned threads = std::max(1U, std::thread::hardware_concurrency());
    std::string json;
};

struct Tally {
    std::atomic<std::uint64_t> positions = 0;
    std::atomic<std::uint64_t> stepped = 0;
    std::atomic<std::uint64_t> banks = 0;
    std::atomic<std::uint64_t> keys = 0;
    std::atomic<std::uint64_t> mismatches = 0;
    std::array<std::atomic<std::uint64_t>, 9> by_order{};
    std::array<std::atomic<std::uint64_t>, kBankShapes.size()> by_shape{};
};

const char* name_of(Body body) {
    switch (body) {
        case Body::kPortable:
            return "portable";
        case Body::kAvx2:
            return "avx2";
        case Body::kAvx512:
            return "avx512";
        default:
            return "plain";
    }
}

// The first sequences of a text.
Text beginning(const Text& text, std::size_t positions) {
    const std::size_t kept = std::min(text.tokens.size(), (positions / text.length + 1) * text.length);
    Text part = text;
    part.tokens.resize(kept);
    part.document_starts.resize(text.document_starts.empty() ? 0 : kept);
    return part;
}

class Proof {
  public:
    explicit Proof(const Settings& settings) : settings_(settings), bodies_(available_bodies()) {}

    void run() {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> workers;
        for (unsigned thread = 0; thread < settings_.threads; ++thread) {
            workers.emplace_back([this] { work(); });
        }
        while (running_.load() < settings_.threads || finished_.load() < settings_.threads) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            report(seconds_since(start));
        }
        for (std::thread& worker : workers) {
            worker.join();
        }
        seconds_ = seconds_since(start);
    }

    [[nodiscard]] bool holds() const {
        return failure_.empty() && tally_.mismatches == 0 && tally_.positions > 0;
    }

    void print() const {
        if (!failure_.empty()) {
            std::printf("a round ended with an error: %s\n", failure_.c_str());
        }
        std::printf("%llu positions, %llu mismatches (seed %llu, %llu banks, %llu keys, %.0f positions/s)\n",
                    number(tally_.positions), number(tally_.mismatches),
                    static_cast<unsigned long long>(settings_.seed), number(tally_.banks),
                    number(tally_.keys), rate());
    }

    void write_json() const {
        std::ofstream file(settings_.json);
        file << "{\n  \"positions\": " << tally_.positions << ",\n  \"mismatches\": " << tally_.mismatches
             << ",\n  \"incremental_positions\": " << tally_.stepped << ",\n  \"seed\": " << settings_.seed
             << ",\n  \"banks\": " << tally_.banks << ",\n  \"keys\": " << tally_.keys
             << ",\n  \"bodies\": [";
        for (std::size_t index = 0; index < bodies_.size(); ++index) {
            file << (index == 0 ? "\"" : ", \"") << name_of(bodies_[index]) << '"';
        }
        file << "],\n  \"compiler\": \"" << __VERSION__ << "\",\n  \"positions_by_matched_order\": [";
        for (std::size_t order = 0; order < tally_.by_order.size(); ++order) {
            file << (order == 0 ? "" : ", ") << tally_.by_order[order];
        }
        file << "],\n  \"positions_by_bank_shape\": {";
        for (std::size_t shape = 0; shape < kBankShapes.size(); ++shape) {
            file << (shape == 0 ? "" : ", ") << '"' << kBankShapes[shape] << "\": " << tally_.by_shape[shape];
        }
        file << "},\n  \"threads\": " << settings_.threads << ",\n  \"seconds\": " << seconds_ << "\n}\n";
        if (!file.flush()) {
            throw std::runtime_error("cannot write " + settings_.json);
        }
    }

  private:
    static unsigned long long number(const std::atomic<std::uint64_t>& value) { return value.load(); }
    static double seconds_since(std::chrono::steady_clock::time_point start) {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    [[nodiscard]] double rate() const {
        return static_cast<double>(tally_.positions) / std::max(seconds_, 1e-9);
    }

    void report(double seconds) {
        if (seconds - last_line_ < kSecondsPerLine) {
            return;
        }
        last_line_ = seconds;
        const auto done = static_cast<double>(tally_.positions);
        const double left = (static_cast<double>(settings_.positions) - done) * seconds / std::max(done, 1.0);
        std::printf("prove-lookup: %llu/%llu positions, %.0f positions/s, %llu mismatches, ETA %.0fs\n",
                    number(tally_.positions), static_cast<unsigned long long>(settings_.positions),
                    done / seconds, number(tally_.mismatches), std::max(left, 0.0));
        std::fflush(stdout);
    }

    void work() {
        ++running_;
        try {
            if (settings_.round.has_value()) {
                check_round(*settings_.round);
            } else {
                while (tally_.positions < settings_.positions && tally_.mismatches < 1000) {
                    check_round(next_round_++);
                }
            }
        } catch (const std::exception& error) {
            const std::lock_guard lock(output_);
            failure_ = error.what();
        }
        ++finished_;
    }

    void check_round(std::uint64_t round) {
        Random random(settings_.seed * 0x100000001b3ULL + round);
        const std::size_t shape = round % kBankShapes.size();
        // Mostly small banks, which are hard in many ways, and now and then one that leaves the caches.
        const std::size_t count = random.one_in(6) ? random.between(10'000, 60'000) : random.between(1, 3000);
        const TestBank bank = make_bank(random, shape, count);
        const FastOracle oracle(bank.keys, bank.vocab_size);
        const AlignedBytes file =
            build_bytes(bank.keys, bank.vocab_size, {1, random.between(1U << 14U, 1U << 24U), {}});
        for (std::size_t text_number = 0; text_number < kTexts.size(); ++text_number) {
            const Text text = make_text(random, bank, kTexts[text_number], kTextPositions);
            const std::uint64_t limit = random.one_in(3) ? random.below(bank.keys.size() + 1) : kMaxNodes;
            Answer expected(text.tokens.size());
            oracle.lookup(text, 0, text.tokens.size(), limit, expected);
            const Body body = bodies_[random.below(bodies_.size())];
            const SuffixIndex index(file.bytes(), limit, body);
            const bool narrow = random.one_in(2);
            const std::string what = "round " + std::to_string(round) + ", bank " + bank.shape +
                                     ", vocabulary " + std::to_string(bank.vocab_size) + ", text " +
                                     kTextShapes[kTexts[text_number]] + ", body " + name_of(body) +
                                     (narrow ? ", int32" : ", int64");
            const ThreadPool& pool = random.one_in(3) ? shared_pool(2) : one_thread();
            compare(narrow ? native_lookup<std::int32_t>(index, text, pool)
                           : native_lookup<std::int64_t>(index, text, pool),
                    expected, what);
            if (text_number == round % kTexts.size()) {
                const Text part = beginning(text, kSteppedPositions);
                Answer expected_part = expected;
                expected_part.rows.resize(part.tokens.size());
                expected_part.orders.resize(part.tokens.size());
                compare(stepped_lookup<std::int32_t>(index, part), expected_part, what + ", incremental");
                tally_.stepped += part.tokens.size();
            }
            count_answers(expected, shape);
        }
        ++tally_.banks;
        tally_.keys += bank.keys.size();
    }

    void compare(const Answer& found, const Answer& expected, const std::string& what) {
        if (found == expected) {
            return;
        }
        std::uint64_t wrong = 0;
        for (std::size_t position = 0; position < expected.rows.size(); ++position) {
            wrong += found.rows[position] != expected.rows[position] ||
                     found.orders[position] != expected.orders[position];
        }
        tally_.mismatches += wrong;
        const std::lock_guard lock(output_);
        if (shown_++ < kShownMismatches) {
            std::printf("MISMATCH: %s: %s\n", what.c_str(), first_difference(found, expected).c_str());
            std::fflush(stdout);
        }
    }

    void count_answers(const Answer& expected, std::size_t shape) {
        std::array<std::uint64_t, 9> by_order{};
        for (const std::uint8_t order : expected.orders) {
            ++by_order[order];
        }
        for (std::size_t order = 0; order < by_order.size(); ++order) {
            tally_.by_order[order] += by_order[order];
        }
        tally_.by_shape[shape] += expected.orders.size();
        tally_.positions += expected.orders.size();
    }

    Settings settings_;
    std::vector<Body> bodies_;
    Tally tally_;
    std::atomic<std::uint64_t> next_round_ = 0;
    std::atomic<unsigned> running_ = 0;
    std::atomic<unsigned> finished_ = 0;
    std::mutex output_;
    std::string failure_;
    int shown_ = 0;
    double last_line_ = 0;
    double seconds_ = 0;
};

std::uint64_t parse_number(const char* flag, const char* text) {
    char* end = nullptr;
    const std::uint64_t value = std::strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0') {
        throw std::invalid_argument(std::string(flag) + ": got " + text + ", expected a number");
    }
    return value;
}

Settings parse_settings(int argument_count, char** arguments) {
    Settings settings;
    for (int index = 1; index < argument_count; index += 2) {
        const std::string_view flag = arguments[index];
        if (index + 1 == argument_count) {
            throw std::invalid_argument(std::string(flag) + ": no value given");
        }
        const char* const value = arguments[index + 1];
        if (flag == "--positions") {
            settings.positions = parse_number(arguments[index], value);
        } else if (flag == "--seed") {
            settings.seed = parse_number(arguments[index], value);
        } else if (flag == "--round") {
            settings.round = parse_number(arguments[index], value);
            settings.threads = 1;
        } else if (flag == "--threads") {
            settings.threads = static_cast<unsigned>(
                std::clamp<std::uint64_t>(parse_number(arguments[index], value), 1, 256));
        } else if (flag == "--json") {
            settings.json = value;
        } else {
            throw std::invalid_argument(
                std::string(flag) + ": unknown; expected --positions, --seed, --round, --threads or --json");
        }
    }
    return settings;
}

}  // namespace
}  // namespace megatron_graft::testing

int main(int argument_count, char** arguments) {
    using megatron_graft::testing::Proof;
    using megatron_graft::testing::Settings;
    try {
        const Settings settings = megatron_graft::testing::parse_settings(argument_count, arguments);
        Proof proof(settings);
        proof.run();
        proof.print();
        if (!settings.json.empty()) {
            proof.write_json();
        }
        return proof.holds() ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "prove_lookup: %s\n", error.what());
        return 2;
    }
}
