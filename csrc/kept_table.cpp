#include "kept_table.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#include "checked.hpp"

namespace megatron_graft {
namespace {

constexpr std::size_t kKeysAtOnce = 16384;
constexpr unsigned kLargestRest = 32;
constexpr std::uint64_t kEntriesOfBucket = 4;
constexpr std::uint64_t kLargestBucket = 1024;  // no bucket of a mix comes near

// The keys of all files, from any place on.
class KeyReader {
  public:
    KeyReader(std::span<const KeptFile> files, std::uint64_t start) : files_(files), inside_(start) {
        while (file_ < files_.size() && inside_ >= files_[file_].entries) {
            inside_ -= files_[file_++].entries;
        }
    }
    // Empty at the end.
    std::span<const std::uint64_t> next() {
        while (file_ < files_.size() && inside_ == files_[file_].entries) {
            ++file_;
            inside_ = 0;
        }
        if (file_ == files_.size()) {
            return {};
        }
        keys_.resize(
            static_cast<std::size_t>(std::min<std::uint64_t>(kKeysAtOnce, files_[file_].entries - inside_)));
        PositionedFile(files_[file_].path).read_elements(inside_, std::span(keys_));
        inside_ += keys_.size();
        return keys_;
    }

  private:
    std::span<const KeptFile> files_;
    std::size_t file_ = 0;
    std::uint64_t inside_;
    std::vector<std::uint64_t> keys_;
};

}  // namespace

unsigned KeptTable::bucket_bits(std::uint64_t total, unsigned key_bits) {
    const auto wanted = static_cast<unsigned>(std::bit_width(total / kEntriesOfBucket));
    return std::clamp(wanted, key_bits > kLargestRest ? key_bits - kLargestRest : 0, key_bits);
}

// Buckets that a range of so many entries has, rather more: sizes of ranges vary a little.
std::uint64_t KeptTable::buckets_for(std::uint64_t entries, std::uint64_t total, unsigned key_bits) {
    const std::uint64_t all = std::uint64_t{1} << bucket_bits(total, key_bits);
    const double share = total == 0 ? 1.0 : static_cast<double>(entries) / static_cast<double>(total);
    return std::min(all, static_cast<std::uint64_t>(static_cast<double>(all) * share * 1.1) + 64) + 1;
}

std::uint64_t KeptTable::bytes_for(std::uint64_t entries, std::uint64_t total, std::uint64_t parents) {
    const std::uint64_t in_memory = std::min(entries, total);
    return (buckets_for(in_memory, total, counted_key_mix(parents).bits) + in_memory + kSideBySide) *
           sizeof(std::uint32_t);
}

KeptTable::KeptTable(std::vector<KeptFile> files, std::uint64_t parents, std::uint64_t max_entries)
    : files_(std::move(files)),
      total_(std::accumulate(files_.begin(), files_.end(), std::uint64_t{0},
                             [](std::uint64_t sum, const KeptFile& file) { return sum + file.entries; })),
      max_entries_(std::clamp<std::uint64_t>(max_entries, 1, std::max<std::uint64_t>(total_, 1))),
      mix_(counted_key_mix(parents)),
      rest_bits_(mix_.bits - bucket_bits(total_, mix_.bits)),
      buckets_(std::uint64_t{1} << (mix_.bits - rest_bits_)),
      begins_(static_cast<std::size_t>(buckets_for(max_entries_, total_, mix_.bits))),
      rests_(static_cast<std::size_t>(std::max(max_entries_, kLargestBucket)) + kSideBySide) {
    counted_key_mix(total_);  // nodes of 32 bits
}

bool KeptTable::load_next() {
    if (next_bucket_ == buckets_) {
        return false;
    }
    base_ = cursor_;
    first_bucket_ = next_bucket_;
    const std::size_t entries = read_ahead();
    cursor_ = base_ + entries;
    std::fill_n(rests_.data() + entries, kSideBySide, 0);
    return true;
}

// Fills the tables with whole buckets until the next would not fit; returns the number of entries they have.
std::size_t KeptTable::read_ahead() {
    KeyReader reader(files_, base_);
    const std::uint64_t rest_mask = (std::uint64_t{1} << rest_bits_) - 1;
    std::uint64_t before = 0;
    std::size_t entries = 0;
    std::size_t begun = 0;  // buckets of the range
    const auto close = [&](std::size_t range, std::uint64_t next) {
        range_buckets_ = range;
        next_bucket_ = next;
        return begins_.data()[range];
    };
    for (auto keys = reader.next(); !keys.empty(); keys = reader.next()) {
        for (const std::uint64_t key : keys) {
            const std::uint64_t mixed = mix_key(key, mix_);
            const std::uint64_t bucket = mixed >> rest_bits_;
            if ((entries > 0 && mixed <= before) || bucket < first_bucket_) {
                throw FormatError("counted keys are not ascending at " + place_of(base_ + entries));
            }
            before = mixed;
            const bool full = entries >= max_entries_;
            while (first_bucket_ + begun <= bucket) {
                begins_.data()[begun] = static_cast<std::uint32_t>(entries);
                if (begun > 0 && (full || begun + 1 == begins_.size())) {
                    return close(begun, first_bucket_ + begun);
                }
                ++begun;
            }
            if (full && begun > 1) {  // a bucket that does not end in time waits for the next range
                return close(begun - 1, first_bucket_ + begun - 1);
            }
            if (entries + kSideBySide == rests_.size()) {
                throw FormatError("counted keys are not spread evenly at " + place_of(base_ + entries));
            }
            rests_.data()[entries++] = static_cast<std::uint32_t>(mixed & rest_mask);
        }
    }
    begins_.data()[begun] = static_cast<std::uint32_t>(entries);
    return close(begun, buckets_);  // those behind have no entries
}

// An entry's place as messages say it.
std::string KeptTable::place_of(std::uint64_t entry) const {
    auto file = files_.begin();
    for (; file + 1 != files_.end() && entry >= file->entries; ++file) {
        entry -= file->entries;
    }
    return "entry " + std::to_string(entry) + " of " + file->path.string();
}

// The entry with this rest among [begin, end), or kNoNode. There is at most one.
[[gnu::always_inline]] inline std::uint32_t KeptTable::find_in(std::uint32_t begin, std::uint32_t end,
                                                               std::uint32_t rest) const {
    // Vectors, since compilers make of the plain loop a branch for each entry.
    using Four = std::int32_t __attribute__((vector_size(16)));
    const std::uint32_t* entries = rests_.data() + begin;
    const auto size = static_cast<std::int32_t>(end - begin);
    const auto wanted = static_cast<std::int32_t>(rest);
    Four low;
    Four high;
    std::memcpy(&low, entries, sizeof(low));
    std::memcpy(&high, entries + 4, sizeof(high));
    const Four first = {1, 2, 3, 4};
    const Four second = {5, 6, 7, 8};
    const Four found =
        ((low == wanted) & (first <= size) & first) | ((high == wanted) & (second <= size) & second);
    std::uint64_t halves[2];
    std::memcpy(halves, &found, sizeof(found));
    const std::uint64_t both = halves[0] | halves[1];
    auto place = static_cast<std::uint32_t>(both | both >> 32U);
    for (std::int32_t at = kSideBySide; at < size; ++at) {
        place += entries[at] == rest ? static_cast<std::uint32_t>(at) + 1 : 0;
    }
    return place == 0 ? kNoNode : static_cast<std::uint32_t>(base_) + begin + place - 1;
}

// Three rounds over a group, so that what one asks of memory has come when the next needs it.
void KeptTable::find_group(const std::uint64_t* mixed, const std::uint32_t* places, std::size_t count,
                           std::uint32_t* nodes) const {
    std::array<std::uint32_t, kGroup> buckets;
    std::array<std::uint32_t, kGroup> begins;
    std::array<std::uint32_t, kGroup> chosen;
    const std::uint64_t range = range_buckets_;
    std::size_t inside = 0;
    for (std::size_t index = 0; index < count; ++index) {
        const std::uint64_t bucket = (mixed[index] >> rest_bits_) - first_bucket_;  // wraps below the range
        const bool here = bucket < range;
        buckets[inside] = static_cast<std::uint32_t>(here ? bucket : 0);
        chosen[inside] = static_cast<std::uint32_t>(index);
        __builtin_prefetch(begins_.data() + buckets[inside]);
        inside += here ? 1 : 0;
    }
    for (std::size_t index = 0; index < inside; ++index) {
        begins[index] = begins_.data()[buckets[index]];
        __builtin_prefetch(rests_.data() + begins[index]);
        __builtin_prefetch(rests_.data() + begins[index] + kSideBySide - 1);
    }
    const std::uint64_t rest_mask = (std::uint64_t{1} << rest_bits_) - 1;
    for (std::size_t index = 0; index < inside; ++index) {
        const auto rest = static_cast<std::uint32_t>(mixed[chosen[index]] & rest_mask);
        nodes[places[chosen[index]]] = find_in(begins[index], begins_.data()[buckets[index] + 1], rest);
    }
}

void KeptTable::find(std::span<const std::uint64_t> mixed, std::span<const std::uint32_t> places,
                     std::span<std::uint32_t> nodes) const {
    for (std::size_t begin = 0; begin < mixed.size(); begin += kGroup) {
        find_group(mixed.data() + begin, places.data() + begin, std::min(kGroup, mixed.size() - begin),
                   nodes.data());
    }
}

}  // namespace megatron_graft
