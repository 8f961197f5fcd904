#include "thread_pool.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace megatron_graft {
namespace {

constexpr std::size_t kRangesPerThread = 16;

using RangeBody = std::function<void(std::size_t, std::size_t)>;

// One call of for_ranges: who takes the next range, and what went wrong first. Lives on the caller's stack.
class Job {
  public:
    Job(std::size_t count, std::size_t ranges, const RangeBody& body)
        : count_(count), ranges_(ranges), body_(body) {}

    // Runs ranges until none is left. Never throws.
    void work() noexcept {
        for (std::size_t range = next_.fetch_add(1, std::memory_order_relaxed); range < ranges_;
             range = next_.fetch_add(1, std::memory_order_relaxed)) {
            try {
                body_(begin_of(range), begin_of(range + 1));
            } catch (...) {
                note_failure(range, std::current_exception());
            }
        }
    }

    // To be called when no thread works on it any more.
    void rethrow_first_failure() const {
        if (failure_) {
            std::rethrow_exception(failure_);
        }
    }

  private:
    // The first `count % ranges` ranges are one longer; written so that no product can overflow.
    [[nodiscard]] std::size_t begin_of(std::size_t range) const {
        return range * (count_ / ranges_) + std::min(range, count_ % ranges_);
    }

    // Ranges are handed out in order, so all before this one have begun and will report theirs.
    void note_failure(std::size_t range, std::exception_ptr failure) {
        next_.store(ranges_, std::memory_order_relaxed);
        const std::lock_guard lock(failure_mutex_);
        if (range < failed_range_) {
            failed_range_ = range;
            failure_ = std::move(failure);
        }
    }

    const std::size_t count_;
    const std::size_t ranges_;
    const RangeBody& body_;
    std::atomic<std::size_t> next_ = 0;
    std::mutex failure_mutex_;
    std::size_t failed_range_ = SIZE_MAX;
    std::exception_ptr failure_;
};

// Blocks signals that are sent to the process, while it lives: threads started meanwhile inherit that, so
// handlers run in the threads that were there before. Faults of a thread's own code stay deliverable.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t blocked;
        sigfillset(&blocked);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) {
            sigdelset(&blocked, fault);
        }
        pthread_sigmask(SIG_SETMASK, &blocked, &previous_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t previous_;
};

}  // namespace

// The workers and what they wait for.
class ThreadPool::Crew {
  public:
    explicit Crew(unsigned workers) {
        const SignalsBlocked blocked;
        workers_.reserve(workers);
        try {
            for (unsigned worker = 0; worker < workers; ++worker) {
                workers_.emplace_back([this] { serve(); });
            }
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Crew() { stop(); }
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    [[nodiscard]] bool is_of_this_process() const { return process_ == getpid(); }

    // False if another caller, or this one further up its stack, has the crew.
    [[nodiscard]] bool try_acquire() { return !busy_.test_and_set(std::memory_order_acquire); }

    void release() { busy_.clear(std::memory_order_release); }

    // Works on the job together with up to `helpers` workers; returns when nobody works on it any more.
    void run(Job& job, std::size_t helpers) {
        {
            const std::lock_guard lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
        }
        for (std::size_t helper = 0; helper < helpers; ++helper) {
            wake_.notify_one();
        }
        job.work();
        std::unique_lock lock(mutex_);
        job_ = nullptr;  // a worker that wakes only now finds nothing and is not waited for
        idle_.wait(lock, [this] { return working_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return stopping_ || (job_ != nullptr && wanted_ > 0); });
            if (stopping_) {
                return;
            }
            Job& job = *job_;
            --wanted_;
            ++working_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--working_ == 0) {
                idle_.notify_one();
            }
        }
    }

    void stop() {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) {
            worker.join();
        }
    }

    const pid_t process_ = getpid();
    std::atomic_flag busy_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable idle_;
    Job* job_ = nullptr;
    std::size_t wanted_ = 0;   // workers that may still join the job
    std::size_t working_ = 0;  // workers on the job
    bool stopping_ = false;
    std::vector<std::thread> workers_;
};

ThreadPool::ThreadPool(unsigned threads) : threads_(threads) {
    if (threads == 0 || threads > kMaxThreads) {
        throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to " +
                                    std::to_string(kMaxThreads));
    }
    if (threads == 1) {
        return;
    }
    try {
        crew_ = std::make_unique<Crew>(threads - 1);
    } catch (const std::system_error& error) {
        throw ThreadsNotStarted(threads, error.code());
    }
}

ThreadPool::~ThreadPool() {
    if (crew_ && !crew_->is_of_this_process()) {
        // The threads to join, and those a condition variable's destructor would wait for, are the parent's.
        static_cast<void>(crew_.release());
    }
}

void ThreadPool::for_ranges(std::size_t count, std::size_t grain, const RangeBody& body) const {
    if (count == 0) {
        return;
    }
    const std::size_t ranges =
        std::min<std::size_t>(count / std::max<std::size_t>(grain, 1), threads_ * kRangesPerThread);
    if (ranges <= 1 || !crew_ || !crew_->is_of_this_process() || !crew_->try_acquire()) {
        body(0, count);
        return;
    }
    Job job(count, ranges, body);
    crew_->run(job, std::min<std::size_t>(ranges, threads_) - 1);
    crew_->release();
    job.rethrow_first_failure();
}

const ThreadPool& shared_pool(unsigned threads) {
    // Never destroyed: at exit other threads may still be in a call. The child of a fork inherits what it
    // cannot use; it keeps pools under its own id.
    static std::mutex mutex;
    static auto& pools = *new std::map<std::pair<pid_t, unsigned>, std::unique_ptr<ThreadPool>>;
    const std::lock_guard lock(mutex);
    const std::pair key(getpid(), threads);
    if (const auto found = pools.find(key); found != pools.end()) {
        return *found->second;
    }
    return *pools.emplace(key, std::make_unique<ThreadPool>(threads)).first->second;
}

}  // namespace megatron_graft
