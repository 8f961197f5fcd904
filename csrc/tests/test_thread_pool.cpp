#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "thread_pool.hpp"

namespace megatron_graft::testing {
namespace {

using Ranges = std::vector<std::pair<std::size_t, std::size_t>>;

Ranges ranges_of(const ThreadPool& pool, std::size_t count, std::size_t grain) {
    std::mutex mutex;
    Ranges ranges;
    pool.for_ranges(count, grain, [&](std::size_t begin, std::size_t end) {
        const std::lock_guard lock(mutex);
        ranges.emplace_back(begin, end);
    });
    std::sort(ranges.begin(), ranges.end());
    return ranges;
}

// Counts how often each item is covered, without any lock: under a thread sanitizer an overlap is a race.
bool covers_once(const ThreadPool& pool, std::size_t count, std::size_t grain) {
    std::vector<int> covered(count, 0);
    pool.for_ranges(count, grain, [&](std::size_t begin, std::size_t end) {
        for (std::size_t item = begin; item < end; ++item) {
            ++covered[item];
        }
    });
    return std::all_of(covered.begin(), covered.end(), [](int times) { return times == 1; });
}

TEST("ranges cover every item once and are as long as asked for") {
    for (const unsigned threads : {1U, 2U, 3U, 7U}) {
        const ThreadPool pool(threads);
        CHECK_EQUAL(pool.threads(), threads);
        for (const std::size_t count : {0U, 1U, 2U, 3U, 10U, 63U, 64U, 1000U, 1003U}) {
            for (const std::size_t grain : {0U, 1U, 3U, 10U, 5000U}) {
                const std::string what = std::to_string(threads) + " threads, " + std::to_string(count) +
                                         " items, grain " + std::to_string(grain);
                std::size_t expected_begin = 0;
                for (const auto& [begin, end] : ranges_of(pool, count, grain)) {
                    CHECK_FOR(begin == expected_begin && begin < end, what);
                    CHECK_FOR(end - begin >= std::min(grain, count), what);
                    expected_begin = end;
                }
                CHECK_FOR(expected_begin == count, what);
                CHECK_FOR(covers_once(pool, count, grain), what);
            }
        }
    }
}

TEST("a count near the largest one does not overflow") {
    constexpr std::size_t kCount = std::numeric_limits<std::size_t>::max();
    const ThreadPool pool(3);
    const Ranges ranges = ranges_of(pool, kCount, 1);
    CHECK(ranges.size() > 1);
    CHECK_EQUAL(ranges.back().second, kCount);
    for (std::size_t range = 1; range < ranges.size(); ++range) {
        CHECK_EQUAL(ranges[range].first, ranges[range - 1].second);
    }
}

// Returns when as many threads as it was made for are waiting in it.
class Meeting {
  public:
    explicit Meeting(int threads) : missing_(threads) {}
    void wait() {
        --missing_;
        while (missing_ > 0) {
            std::this_thread::yield();
        }
    }

  private:
    std::atomic<int> missing_;
};

TEST("workers take part") {
    const ThreadPool pool(2);
    Meeting meeting(2);
    std::atomic<int> inside = 0;
    pool.for_ranges(2, 1, [&](std::size_t, std::size_t) {
        meeting.wait();
        ++inside;
    });
    CHECK_EQUAL(inside.load(), 2);
}

TEST("a pool of one thread works in the caller, in one range") {
    const ThreadPool pool(1);
    std::set<std::thread::id> seen;
    CHECK_EQUAL(ranges_of(pool, 1000, 1).size(), 1U);
    pool.for_ranges(1000, 1, [&](std::size_t, std::size_t) { seen.insert(std::this_thread::get_id()); });
    CHECK(seen == std::set{std::this_thread::get_id()});
}

TEST("the exception of the first range that threw reaches the caller, and the pool works on") {
    for (const unsigned threads : {1U, 2U, 4U}) {
        const ThreadPool pool(threads);
        for (int repeat = 0; repeat < 200; ++repeat) {
            const auto fail_late = [](std::size_t begin, std::size_t end) {
                if (end > 500) {
                    throw std::out_of_range("at " + std::to_string(begin <= 500 ? 500 : begin));
                }
            };
            CHECK_THROWS(std::out_of_range, pool.for_ranges(1000, 1, fail_late), "at 500");
            CHECK(covers_once(pool, 1000, 1));
        }
    }
}

TEST("of two exceptions that of the earlier range is rethrown, whichever came first") {
    const ThreadPool pool(2);
    for (const std::size_t first_to_throw : {0U, 1U}) {
        Meeting meeting(2);
        std::atomic<bool> thrown = false;
        const auto fail = [&](std::size_t begin, std::size_t) {
            meeting.wait();
            if (begin == first_to_throw) {
                thrown = true;
            } else {
                while (!thrown) {
                    std::this_thread::yield();
                }
                std::this_thread::sleep_for(std::chrono::milliseconds(20));
            }
            throw std::out_of_range("range " + std::to_string(begin));
        };
        CHECK_THROWS(std::out_of_range, pool.for_ranges(2, 1, fail), "range 0");
    }
}

TEST("several callers share a pool, each with its own work") {
    const ThreadPool pool(3);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int repeat = 0; repeat < 300; ++repeat) {
                wrong += covers_once(pool, 1000, 7) ? 0 : 1;
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    CHECK_EQUAL(wrong.load(), 0);
}

TEST("work may itself use the pool") {
    const ThreadPool pool(2);
    Meeting meeting(2);  // so that a worker does it too
    std::atomic<std::size_t> items = 0;
    pool.for_ranges(2, 1, [&](std::size_t, std::size_t) {
        meeting.wait();
        pool.for_ranges(100, 1, [&](std::size_t begin, std::size_t end) { items += end - begin; });
    });
    CHECK_EQUAL(items.load(), 200U);
}

// Runs `body` in a forked child and returns whether it returned true there; a child that hangs is ended.
template <typename Body>
bool holds_in_child(const Body& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(20);
        ::_exit(body() ? 0 : 1);
    }
    int status = 0;
    return ::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST("a forked child works alone with its parent's pool, and can drop it") {
    for (const unsigned threads : {1U, 3U}) {
        auto pool = std::make_unique<ThreadPool>(threads);
        CHECK(covers_once(*pool, 1000, 1));
        CHECK(holds_in_child([&] {
            const bool covered = covers_once(*pool, 1000, 1) && ranges_of(*pool, 1000, 1).size() == 1;
            pool.reset();
            return covered;
        }));
        CHECK(covers_once(*pool, 1000, 1));
    }
}

// A thread sanitizer does not allow new threads after a fork.
#if !defined(__SANITIZE_THREAD__)
TEST("a forked child has shared pools of its own") {
    const ThreadPool& pool = shared_pool(2);
    CHECK(&pool == &shared_pool(2));
    CHECK(&pool != &shared_pool(3));
    CHECK(holds_in_child([&] {
        const ThreadPool& own = shared_pool(2);
        return &own != &pool && covers_once(own, 1000, 1) && ranges_of(own, 1000, 1).size() > 1;
    }));
}
#endif

TEST("workers leave signals to the threads that were there before") {
    const ThreadPool pool(2);
    Meeting meeting(2);
    std::atomic<int> open_in_workers = 0;
    const auto caller = std::this_thread::get_id();
    pool.for_ranges(2, 1, [&](std::size_t, std::size_t) {
        meeting.wait();
        sigset_t blocked;
        pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        if (std::this_thread::get_id() != caller) {
            open_in_workers +=
                sigismember(&blocked, SIGTERM) == 1 && sigismember(&blocked, SIGSEGV) == 0 ? 0 : 1;
        }
    });
    CHECK_EQUAL(open_in_workers.load(), 0);
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    CHECK_EQUAL(sigismember(&blocked, SIGTERM), 0);
}

TEST("threads that the system does not start are an error that says how many were wanted") {
    pthread_attr_t usual;
    CHECK_EQUAL(pthread_getattr_default_np(&usual), 0);
    pthread_attr_t huge;
    CHECK_EQUAL(pthread_getattr_default_np(&huge), 0);
    // A stack larger than what a process can address.
    CHECK_EQUAL(pthread_attr_setstacksize(&huge, std::size_t{1} << 60U), 0);
    CHECK_EQUAL(pthread_setattr_default_np(&huge), 0);
    try {
        CHECK_THROWS(ThreadsNotStarted, ThreadPool(7), "threads: 7 cannot be started: ");
        CHECK_THROWS(ThreadsNotStarted, shared_pool(9), "threads: 9 cannot be started: ");
        CHECK_EQUAL(ThreadPool(1).threads(), 1U);
    } catch (...) {
        pthread_setattr_default_np(&usual);
        throw;
    }
    CHECK_EQUAL(pthread_setattr_default_np(&usual), 0);
    CHECK_EQUAL(shared_pool(9).threads(), 9U);
}

TEST("numbers of threads that make no pool are refused") {
    CHECK_THROWS(std::invalid_argument, ThreadPool(0), "threads is 0, expected 1 to 1024");
    CHECK_THROWS(std::invalid_argument, ThreadPool(1025), "threads is 1025");
    CHECK_THROWS(std::invalid_argument, shared_pool(0), "threads is 0");
}

}  // namespace
}  // namespace megatron_graft::testing
