#include "slice_counter.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <stdexcept>
#include <string>

namespace megatron_graft {
namespace {

constexpr std::size_t kRecordsBuffered = 32768;

std::size_t slots_for(std::uint64_t longest_document) {
    return static_cast<std::size_t>(std::bit_ceil(2 * longest_document + 16));
}

}  // namespace

DocumentKeys::DocumentKeys(std::uint64_t longest_document)
    : limit_(static_cast<std::size_t>(longest_document)),
      keys_(slots_for(longest_document)),
      documents_(slots_for(longest_document), 0) {}

void DocumentKeys::start_document() {
    used_ = 0;
    if (++document_ == 0) {  // after 2^32 documents numbers repeat
        std::fill(documents_.begin(), documents_.end(), 0);
        document_ = 1;
    }
}

bool DocumentKeys::is_new(std::uint64_t mixed) {
    const std::size_t mask = keys_.size() - 1;
    std::size_t slot = mixed & mask;
    for (; documents_[slot] == document_; slot = (slot + 1) & mask) {
        if (keys_[slot] == mixed) {
            return false;
        }
    }
    if (used_ == limit_) {
        throw std::length_error("a document has more than " + std::to_string(limit_) +
                                " distinct n-grams, but the longest was said to have " +
                                std::to_string(limit_) + " tokens: the data set has changed under way");
    }
    ++used_;
    keys_[slot] = mixed;
    documents_[slot] = document_;
    return true;
}

RunWriter::RunWriter(const SliceTask& task, unsigned key_bits)
    : key_bits_(key_bits),
      most_of_record_((std::uint64_t{1} << record_count_bits(key_bits)) - 1),
      shares_(task.shares),
      split_runs_(task.split_runs),
      pool_(static_cast<std::size_t>(task.shares), static_cast<std::size_t>(task.pool_blocks)),
      records_(task.runs, kRecordsBuffered) {}

void RunWriter::set_data_set(std::uint32_t data_set) {
    if (split_runs_ && data_set != data_set_) {
        finish_run();
    }
    data_set_ = data_set;
}

void RunWriter::finish_run() {
    if (pool_.empty()) {
        return;
    }
    const auto started = std::chrono::steady_clock::now();
    Run run{data_set_, {}};
    run.begins.reserve(static_cast<std::size_t>(shares_) + 1);
    for (std::size_t share = 0; share < shares_; ++share) {
        run.begins.push_back(records_.size());
        write_share(share);
    }
    run.begins.push_back(records_.size());
    runs_.push_back(std::move(run));
    pool_.clear();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

void RunWriter::write_share(std::size_t share) {
    constexpr std::size_t kMostSlots = 1U
                                       << 14U;  // stays in a core's cache until there are more distinct keys
    const std::size_t size = pool_.size(share);
    if (size == 0) {
        return;
    }
    table_.start(std::min(size, kMostSlots));
    pool_.for_parts(share, [this](std::span<const std::uint64_t> part) {
        for (const std::uint64_t mixed : part) {
            table_.add(mixed, 1);
        }
    });
    table_.for_each([this](std::uint64_t mixed, std::uint64_t count) {
        for (; count > most_of_record_; count -= most_of_record_) {
            records_.append(most_of_record_ << key_bits_ | mixed);
        }
        records_.append(count << key_bits_ | mixed);
    });
}

void RunWriter::finish(SliceFacts& facts) {
    finish_run();
    records_.flush();
    facts.records = records_.size();
    facts.merge_seconds = seconds_;
    facts.runs = std::move(runs_);
}

}  // namespace megatron_graft
