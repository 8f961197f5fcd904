// Runs a fuzz target where there is no libFuzzer: every file of the given directories, and then, for a given
// time, random changes of them. It does not see which code an input reaches, so it finds much less.
//
//   <target> [--seconds N] [--seed S] [--timeout N] [--rss-limit-mb M] [--failure FILE] directory...
//
// An input that does not come back, takes more than the timeout's seconds, or brings the process above M MiB,
// is kept as FILE.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "tests/keys.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace megatron_graft::fuzz {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kMaxBytes = 1U << 15U;

// The input that runs, and where it is kept if it does not come back.
Bytes current;
std::string failure_path = "fuzz-failure";
unsigned timeout_seconds = 10;
long rss_limit_mb = 2048;

void say(std::string_view text) {
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

// Called while the process dies of a finding, maybe in the middle of an allocation: system calls alone.
void keep_current() {
    const int file = ::open(failure_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    const bool kept = ::write(file, current.data(), current.size()) == static_cast<ssize_t>(current.size());
    say(kept ? "the input was kept as " : "the input could not be kept as ");
    say(failure_path);
    say("\n");
}

void keep_and_abort(int signal) {
    if (signal == SIGALRM) {
        say("FOUND: an input takes longer than the timeout\n");
    }
    keep_current();
    std::signal(SIGABRT, SIG_DFL);
    std::raise(SIGABRT);
}

// The most that this process has had in memory. getrusage would tell of the program that started it as well.
long peak_mb() {
    std::ifstream status("/proc/self/status");
    std::string word;
    while (status >> word && word != "VmHWM:") {
    }
    long kilobytes = 0;
    status >> kilobytes;
    return kilobytes / 1024;
}

// An exception that leaves the target is a finding, and so is an input that takes too long or too much
// memory.
void run_current() {
    try {
        ::alarm(timeout_seconds);
        LLVMFuzzerTestOneInput(current.data(), current.size());
        ::alarm(0);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "FOUND: an unexpected error: %s\n", error.what());
        std::abort();
    }
    if (const long peak = peak_mb(); peak > rss_limit_mb) {
        std::fprintf(stderr, "FOUND: an input brings the process to %ld MiB\n", peak);
        std::abort();
    }
}

std::vector<Bytes> read_inputs(const std::filesystem::path& directory) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
        paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
    std::vector<Bytes> inputs;
    for (const auto& path : paths) {
        std::ifstream stream(path, std::ios::binary);
        inputs.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    }
    return inputs;
}

Bytes changed(testing::Random& random, const std::vector<Bytes>& inputs) {
    Bytes bytes = inputs[random.below(inputs.size())];
    for (std::uint64_t count = random.between(1, 8); count > 0; --count) {
        const std::size_t at = bytes.empty() ? 0 : random.below(bytes.size());
        const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        const auto value = static_cast<std::uint8_t>(random.next());
        switch (random.below(6)) {
            case 0:
                bytes.insert(place, value);
                break;
            case 1:
                bytes.insert(place, random.between(1, 64), value);
                break;
            case 2:
                bytes.erase(place,
                            bytes.begin() + static_cast<std::ptrdiff_t>(random.between(at, bytes.size())));
                break;
            case 3: {
                const Bytes& other = inputs[random.below(inputs.size())];
                bytes.insert(place,
                             other.begin() + static_cast<std::ptrdiff_t>(random.below(other.size() + 1)),
                             other.end());
                break;
            }
            default:
                if (!bytes.empty()) {
                    *place = random.one_in(2) ? value
                                              : static_cast<std::uint8_t>(*place ^ (1U << random.below(8)));
                }
        }
    }
    bytes.resize(std::min(bytes.size(), kMaxBytes));
    return bytes;
}

int run(int argument_count, char** arguments) {
    double seconds = 0;
    std::uint64_t seed = 1;
    std::vector<Bytes> inputs;
    for (int index = 1; index < argument_count; ++index) {
        const std::string_view argument = arguments[index];
        const bool is_flag = argument.starts_with("--") && index + 1 < argument_count;
        const std::string value = is_flag ? arguments[++index] : "";
        if (argument == "--seconds") {
            seconds = std::stod(value);
        } else if (argument == "--seed") {
            seed = std::stoull(value);
        } else if (argument == "--timeout") {
            timeout_seconds = static_cast<unsigned>(std::stoul(value));
        } else if (argument == "--rss-limit-mb") {
            rss_limit_mb = std::stol(value);
        } else if (argument == "--failure") {
            failure_path = value;
        } else {
            const std::vector<Bytes> more = read_inputs(argument);
            inputs.insert(inputs.end(), more.begin(), more.end());
        }
    }
    for (const Bytes& input : inputs) {
        current = input;
        run_current();
    }
    std::printf("%zu kept inputs replayed\n", inputs.size());
    std::fflush(stdout);
    if (inputs.empty()) {
        return 1;
    }
    testing::Random random(seed);
    std::uint64_t runs = 0;
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        current = changed(random, inputs);
        run_current();
        ++runs;
    }
    if (seconds > 0) {
        std::printf("%llu random changes of them run in %.0f s (no clang: not guided by coverage)\n",
                    static_cast<unsigned long long>(runs), seconds);
    }
    return 0;
}

}  // namespace
}  // namespace megatron_graft::fuzz

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_set_death_callback(void (*callback)());
#endif

int main(int argument_count, char** arguments) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_set_death_callback(&megatron_graft::fuzz::keep_current);
#endif
    std::signal(SIGABRT, &megatron_graft::fuzz::keep_and_abort);
    std::signal(SIGALRM, &megatron_graft::fuzz::keep_and_abort);
    return megatron_graft::fuzz::run(argument_count, arguments);
}
