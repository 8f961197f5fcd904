#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "bucket_pool.hpp"
#include "checked.hpp"
#include "ngram_count.hpp"

namespace megatron_graft {
namespace {

constexpr std::size_t kRecordsAtOnce = 32768;
constexpr std::uint64_t kRecordsOfRange = 8192;  // their sums stay in a core's cache
constexpr std::uint64_t kMostRanges = 2048;      // filled at the same time

struct Weighted {
    std::uint64_t mixed;
    std::uint64_t units;
};

// How many n-grams have a count. Small counts are most of them.
class Histogram {
  public:
    void add(std::uint64_t count) {
        if (count < small_.size()) {
            ++small_[count];
        } else {
            ++large_[count];
        }
    }
    [[nodiscard]] std::vector<std::pair<std::uint64_t, std::uint64_t>> pairs() const {
        std::vector<std::pair<std::uint64_t, std::uint64_t>> result;
        for (std::size_t count = 0; count < small_.size(); ++count) {
            if (small_[count] > 0) {
                result.emplace_back(count, small_[count]);
            }
        }
        result.insert(result.end(), large_.begin(), large_.end());
        return result;
    }

  private:
    std::array<std::uint64_t, 4096> small_{};
    std::map<std::uint64_t, std::uint64_t> large_;
};

class PartitionSummer {
  public:
    explicit PartitionSummer(const PartitionTask& task)
        : task_(task),
          mix_(counted_key_mix(task.parents)),
          shares_(task.parts.empty() ? 0 : task.parts.front().begins.size() - 1),
          capacity_(std::max<std::uint64_t>(task.pool_blocks, 1) * Pool::kPerBlock),
          pool_(1, static_cast<std::size_t>(task.pool_blocks)),
          keys_(task.keys, kRecordsAtOnce),
          counts_(task.counts, kRecordsAtOnce) {
        check();
    }

    PartitionFacts run() {
        for (std::size_t begin = 0; begin < shares_;) {
            std::size_t end = begin + 1;
            std::uint64_t records = records_of(begin);
            while (end < shares_ && fits(records + records_of(end))) {
                records += records_of(end++);
            }
            sum_shares(begin, end, records);
            begin = end;
        }
        keys_.flush();
        counts_.flush();
        facts_.kept = keys_.size();
        facts_.histogram = histogram_.pairs();
        return std::move(facts_);
    }

  private:
    using Pool = BucketPool<Weighted>;

    void check() const {
        if (task_.units_of_count == 0) {
            throw std::invalid_argument("a count of no units");
        }
        if (task_.shares == 0 || task_.shares > kMaxShares || task_.first_share + shares_ > task_.shares) {
            throw std::invalid_argument("runs of " + std::to_string(task_.shares) + " shares");
        }
        for (const RunPart& part : task_.parts) {
            if (part.begins.size() != shares_ + 1 ||
                !std::is_sorted(part.begins.begin(), part.begins.end())) {
                throw FormatError("a run of " + part.path.string() + " has other shares than the first");
            }
        }
    }

    [[nodiscard]] std::uint64_t records_of(std::size_t share) const {
        std::uint64_t records = 0;
        for (const RunPart& part : task_.parts) {
            records += part.begins[share + 1] - part.begins[share];
        }
        return records;
    }
    [[nodiscard]] bool fits(std::uint64_t records) const {
        // Every bucket may leave a block half used.
        return records + records / kRecordsOfRange * Pool::kPerBlock < capacity_;
    }

    // Sums up the shares [begin, end), by ranges of mixed keys of which each is summed in a core's cache.
    void sum_shares(std::size_t begin, std::size_t end, std::uint64_t records) {
        facts_.records += records;
        begin_ = begin;
        end_ = end;
        ranges_of_share_ = records / kRecordsOfRange / (end - begin) + 1;
        const std::uint64_t first = (task_.first_share + begin) * ranges_of_share_;
        const std::uint64_t size = (end - begin) * ranges_of_share_;
        const std::uint64_t passes =
            std::min(size, std::max(records / capacity_ * 2, size / kMostRanges) + 1);
        for (std::uint64_t pass = 0; pass < passes; ++pass) {
            sum_ranges(first + size * pass / passes, first + size * (pass + 1) / passes);
        }
    }

    // Ranges [first, end), as many at a time as there is memory for.
    void sum_ranges(std::uint64_t first, std::uint64_t end) {
        pool_.start(static_cast<std::size_t>(end - first));
        const bool whole = for_records(first, end, [&](std::uint64_t range, const Weighted& record) {
            return pool_.push(static_cast<std::size_t>(range - first), record);
        });
        if (whole) {
            for (std::size_t range = 0; range < end - first; ++range) {
                table_.start(std::min<std::size_t>(pool_.size(range), kRecordsOfRange));
                pool_.for_parts(range, [this](std::span<const Weighted> part) {
                    for (const Weighted& record : part) {
                        table_.add(record.mixed, record.units);
                    }
                });
                write_table();
            }
        } else if (end - first > 1) {
            const std::uint64_t middle = first + (end - first) / 2;
            sum_ranges(first, middle);
            sum_ranges(middle, end);
        } else {  // the same few keys in very many runs
            table_.start(kRecordsOfRange);
            for_records(first, end, [&](std::uint64_t, const Weighted& record) {
                table_.add(record.mixed, record.units);
                return true;
            });
            write_table();
        }
    }

    // Calls use(range, record) for all records of the present shares in ranges [first, end), until it is
    // false.
    template <typename Use>
    bool for_records(std::uint64_t first, std::uint64_t end, Use use) {
        const std::uint64_t ranges = task_.shares * ranges_of_share_;
        for (const RunPart& part : task_.parts) {
            std::uint64_t place = part.begins[begin_];
            const std::uint64_t stop = part.begins[end_];
            if (place == stop) {
                continue;
            }
            const PositionedFile file(part.path);
            while (place < stop) {
                records_.resize(
                    static_cast<std::size_t>(std::min<std::uint64_t>(kRecordsAtOnce, stop - place)));
                file.read_elements(place, std::span(records_));
                place += records_.size();
                for (const std::uint64_t record : records_) {
                    const std::uint64_t mixed = record & mix_.mask;
                    const std::uint64_t range = share_of(mixed, mix_.bits, ranges);
                    if (range >= first && range < end &&
                        !use(range, Weighted{mixed, (record >> mix_.bits) * part.units})) {
                        return false;
                    }
                }
            }
        }
        return true;
    }

    void write_table() {
        facts_.distinct += table_.size();
        sorted_.clear();
        table_.for_each([this](std::uint64_t mixed, std::uint64_t units) {
            if (units >= task_.min_units) {
                sorted_.push_back({mixed, units});
            }
        });
        std::sort(sorted_.begin(), sorted_.end(),
                  [](const Weighted& left, const Weighted& right) { return left.mixed < right.mixed; });
        for (const Weighted& kept : sorted_) {
            const std::uint64_t count =
                std::max<std::uint64_t>((kept.units + task_.units_of_count / 2) / task_.units_of_count, 1);
            keys_.append(unmix_key(kept.mixed, mix_));
            counts_.append(count);
            histogram_.add(count);
        }
    }

    const PartitionTask& task_;
    KeyMix mix_;
    std::size_t shares_;
    std::uint64_t capacity_;  // records
    Pool pool_;
    SumTable<std::uint64_t> table_;
    std::vector<std::uint64_t> records_;
    std::vector<Weighted> sorted_;
    // What is summed up at present.
    std::size_t begin_ = 0;
    std::size_t end_ = 0;
    std::uint64_t ranges_of_share_ = 1;
    AppendedFile<std::uint64_t> keys_;
    AppendedFile<std::uint64_t> counts_;
    Histogram histogram_;
    PartitionFacts facts_;
};

}  // namespace

PartitionFacts sum_partition(const PartitionTask& task) {
    return PartitionSummer(task).run();
}

}  // namespace megatron_graft
