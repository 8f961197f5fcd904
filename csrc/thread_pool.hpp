// Splits a range of work over a few threads that live as long as the pool.
//
// The caller works too, so a pool of one thread has no worker and costs nothing. Nothing is written that two
// threads share but one counter of ranges. A call never waits for another caller: whoever finds the pool
// busy, and a process that was forked after the pool was made (its workers do not exist there), does all its
// work alone, with the same result.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <system_error>

namespace megatron_graft {

// The system starts no more threads: a limit on processes, or on memory for their stacks. code() says which.
class ThreadsNotStarted : public std::system_error {
  public:
    ThreadsNotStarted(unsigned wanted, std::error_code reason)
        : std::system_error(reason, "threads: " + std::to_string(wanted) + " cannot be started"),
          threads(wanted) {}
    unsigned threads;
};

class ThreadPool {
  public:
    static constexpr unsigned kMaxThreads = 1024;

    // `threads` counts the caller: threads - 1 workers are started, with all asynchronous signals blocked.
    // Throws std::invalid_argument unless 1 <= threads <= kMaxThreads, ThreadsNotStarted if one cannot start.
    explicit ThreadPool(unsigned threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    [[nodiscard]] unsigned threads() const { return threads_; }

    // Calls body(begin, end) for contiguous ranges that cover [0, count) once, each of at least `grain` items
    // (but for a count below that), several per thread so that an unlucky thread delays the call little.
    // Returns when all have ended. If bodies throw, ranges not yet begun are dropped and the exception of the
    // first range that threw, in the order of ranges, is rethrown here.
    void for_ranges(std::size_t count, std::size_t grain,
                    const std::function<void(std::size_t begin, std::size_t end)>& body) const;

  private:
    class Crew;

    unsigned threads_;
    std::unique_ptr<Crew> crew_;  // null for one thread
};

// The process's one pool of that many threads, made at the first call and kept to the end. A forked child
// gets its own, unless it was forked while another thread was in this very function (in Python, the
// interpreter's lock excludes that). Throws as the constructor does.
const ThreadPool& shared_pool(unsigned threads);

}  // namespace megatron_graft
