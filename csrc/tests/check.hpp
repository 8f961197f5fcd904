// A small test runner of our own. A file of tests registers them as
//     TEST("what holds") { CHECK(condition); CHECK_EQUAL(found, expected); CHECK_THROWS(Type, expression,
//     "part"); }
// and check_main.cpp runs all that are linked in. A failed check throws and so ends its test; checks belong
// in the thread that runs the test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace megatron_graft::testing {

class CheckFailed : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

struct TestCase {
    const char* file;
    const char* name;
    void (*body)();
};

// All tests of the program, in the order of registration.
inline std::vector<TestCase>& registry() {
    static std::vector<TestCase> cases;
    return cases;
}

struct Registration {
    Registration(const char* file, const char* name, void (*body)()) {
        registry().push_back({file, name, body});
    }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& problem) {
    throw CheckFailed(std::string(file) + ":" + std::to_string(line) + ": " + problem);
}

template <typename Value>
std::string shown(const Value& value) {
    std::ostringstream text;
    if constexpr (std::is_same_v<Value, bool>) {
        text << (value ? "true" : "false");
    } else if constexpr (std::is_integral_v<Value>) {
        text << +value;  // bytes as numbers
    } else if constexpr (std::is_enum_v<Value>) {
        text << static_cast<std::int64_t>(value);
    } else if constexpr (requires { text << value; }) {
        text << value;
    } else {
        text << "a value that cannot be shown";
    }
    return text.str();
}

template <typename Found, typename Expected>
void check_equal(const Found& found, const Expected& expected, const char* text, const char* file, int line) {
    if (!(found == expected)) {
        fail(file, line, std::string(text) + " is " + shown(found) + ", expected " + shown(expected));
    }
}

inline void check_message(const std::string& message, const std::string& part, const char* text,
                          const char* file, int line) {
    if (message.find(part) == std::string::npos) {
        fail(file, line, std::string(text) + " says \"" + message + "\", expected \"" + part + "\" in it");
    }
}

[[noreturn]] inline void fail_to_throw(const char* text, const char* other, const char* file, int line) {
    fail(file, line,
         std::string(text) + (other == nullptr ? " does not throw" : " throws another error: ") +
             (other == nullptr ? "" : other));
}

// Calls `callable` and fails unless it throws an Error whose message contains `part`.
template <typename Error, typename Callable>
void check_throws(const Callable& callable, const std::string& part, const char* text, const char* file,
                  int line) {
    try {
        callable();
    } catch (const Error& error) {
        return check_message(error.what(), part, text, file, line);
    } catch (const std::exception& error) {
        fail_to_throw(text, error.what(), file, line);
    }
    fail_to_throw(text, nullptr, file, line);
}

}  // namespace megatron_graft::testing

#define GRAFT_JOIN_INNER(left, right) left##right
#define GRAFT_JOIN(left, right) GRAFT_JOIN_INNER(left, right)

#define TEST(name)                                                                                    \
    static void GRAFT_JOIN(test_at_line_, __LINE__)();                                                \
    static const ::megatron_graft::testing::Registration GRAFT_JOIN(registration_at_line_, __LINE__)( \
        __FILE__, name, &GRAFT_JOIN(test_at_line_, __LINE__));                                        \
    static void GRAFT_JOIN(test_at_line_, __LINE__)()

#define CHECK(...)                                                                         \
    do {                                                                                   \
        if (!(__VA_ARGS__)) {                                                              \
            ::megatron_graft::testing::fail(__FILE__, __LINE__, #__VA_ARGS__ " is false"); \
        }                                                                                  \
    } while (false)

// The same with a text (std::string) that says for which of many cases.
#define CHECK_FOR(condition, what)                                                              \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            ::megatron_graft::testing::fail(__FILE__, __LINE__,                                 \
                                            std::string(#condition " is false for ") + (what)); \
        }                                                                                       \
    } while (false)

#define CHECK_EQUAL(found, expected) \
    ::megatron_graft::testing::check_equal((found), (expected), #found, __FILE__, __LINE__)

#define CHECK_THROWS(Error, expression, part)                                                    \
    ::megatron_graft::testing::check_throws<Error>([&] { static_cast<void>(expression); }, part, \
                                                   #expression, __FILE__, __LINE__)
