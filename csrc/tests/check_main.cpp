// Runs the tests that are linked in. Arguments are parts of names or of file names: only tests that contain
// one of them run. The last line says how many passed and failed; a run of no tests is a failure.
#include <chrono>
#include <cstdio>
#include <string>

#include "check.hpp"

namespace megatron_graft::testing {
namespace {

constexpr double kSlowSeconds = 2.0;

bool selected(const TestCase& test, int argument_count, char** arguments) {
    const std::string name = std::string(test.file) + " " + test.name;
    for (int index = 1; index < argument_count; ++index) {
        if (name.find(arguments[index]) != std::string::npos) {
            return true;
        }
    }
    return argument_count <= 1;
}

bool passes(const TestCase& test) {
    const auto start = std::chrono::steady_clock::now();
    std::string problem;
    try {
        test.body();
    } catch (const std::exception& error) {
        problem = error.what();
    } catch (...) {
        problem = "threw something that is no std::exception";
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (!problem.empty()) {
        std::printf("FAILED %s: %s\n    %s\n", test.file, test.name, problem.c_str());
    } else if (taken.count() > kSlowSeconds) {
        std::printf("slow   %s: %s (%.1f s)\n", test.file, test.name, taken.count());
    }
    std::fflush(stdout);
    return problem.empty();
}

int run(int argument_count, char** arguments) {
    int passed = 0;
    int failed = 0;
    for (const TestCase& test : registry()) {
        if (selected(test, argument_count, arguments)) {
            ++(passes(test) ? passed : failed);
        }
    }
    if (passed + failed == 0) {
        std::printf("no test was run\n");
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace megatron_graft::testing

int main(int argument_count, char** arguments) {
    return megatron_graft::testing::run(argument_count, arguments);
}
