#include "index_builder.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checked.hpp"
#include "index_level.hpp"
#include "mapped_file.hpp"
#include "mixed_key.hpp"
#include "thread_pool.hpp"

namespace megatron_graft {
namespace {

// Nodes per bucket of eight lanes. Fuller buckets push more nodes away from home; emptier ones cost memory.
constexpr std::uint64_t kLoad = 5;
// What one entry costs while its share is collected: the entry, and the node it may become.
constexpr std::uint64_t kBytesPerEntry = 32;
// A level may grow to this many times its usual size before keys are said to collide too often.
constexpr std::uint64_t kMaxGrowth = 64;

// Ids turned out to need more bits than the keys were mixed with: the build starts again with more.
struct NeedsWiderIds {};

std::invalid_argument bad_key(std::size_t row, const std::string& problem) {
    return std::invalid_argument("row " + std::to_string(row) + " " + problem);
}

void check_keys(const KeyTable& keys, std::uint64_t vocab_size, const ThreadPool& pool) {
    if (keys.rows() == 0 || keys.max_order == 0 || keys.max_order > kMaxOrder ||
        checked_multiply(keys.max_order, keys.rows()) != keys.ids.size()) {
        throw std::invalid_argument("key_ids is not [N, max_order] with max_order from 1 to 8 and N orders");
    }
    if (vocab_size == 0 || vocab_size > kMaxVocabSize) {
        throw std::invalid_argument("the vocabulary has " + std::to_string(vocab_size) +
                                    " ids, which is not from 1 to 2^20");
    }
    if (keys.rows() > kMaxNodes) {
        throw std::length_error(std::to_string(keys.rows()) + " keys are more than the " +
                                std::to_string(kMaxNodes) + " that an index can have: it needs fewer");
    }
    pool.for_ranges(keys.rows(), 1U << 16U, [&](std::size_t begin, std::size_t end) {
        for (std::size_t row = begin; row < end; ++row) {
            const std::size_t order = keys.orders[row];
            if (order == 0 || order > keys.max_order) {
                throw bad_key(row, "has order " + std::to_string(order));
            }
            for (std::size_t age = 0; age < order; ++age) {
                const std::int64_t token = keys.token(row, age);
                if (token < 0 || static_cast<std::uint64_t>(token) >= vocab_size) {
                    throw bad_key(row, "has token " + std::to_string(token) + ", outside the vocabulary");
                }
            }
        }
    });
}

// Puts nodes into buckets. In the order of their mixed keys, node i goes to the first free lane from its home
// on: lane(i) = i + max over j <= i of (8 home(j) - j). That maximum is all that one part of the nodes has to
// know of the parts before it, so parts are placed side by side and the result is always the same.
class BucketFiller {
  public:
    BucketFiller(std::span<Bucket> buckets, std::uint64_t homes, unsigned key_bits, const ThreadPool& pool)
        : buckets_(buckets), homes_(homes), key_bits_(key_bits), pool_(pool) {
        pool_.for_ranges(buckets.size(), 1U << 12U, [&](std::size_t begin, std::size_t end) {
            Bucket empty{};
            empty.words.fill(kEmptyWord);
            std::fill(buckets.begin() + static_cast<std::ptrdiff_t>(begin),
                      buckets.begin() + static_cast<std::ptrdiff_t>(end), empty);
        });
    }

    // Appends the nodes of the next share. False if one would be displaced too far; the buckets are then
    // worthless.
    [[nodiscard]] bool append(std::span<const LevelNode> nodes) {
        const std::size_t parts = std::min<std::size_t>(pool_.threads(), nodes.size());
        std::vector<Part> split(parts);
        for (std::size_t part = 0; part < parts; ++part) {
            split[part].begin = nodes.size() * part / parts;
            split[part].end = nodes.size() * (part + 1) / parts;
        }
        for_parts(split, [&](Part& part) { part.lead = furthest_lead(nodes, part); });
        for (Part& part : split) {
            const std::int64_t own = part.lead;
            part.lead = lead_;
            lead_ = std::max(lead_, own);
        }
        for_parts(split, [&](Part& part) { part.fits = place(nodes, part); });
        placed_ += nodes.size();
        return std::all_of(split.begin(), split.end(), [](const Part& part) { return part.fits; });
    }

  private:
    struct Part {
        std::size_t begin = 0;
        std::size_t end = 0;
        std::int64_t lead = 0;
        bool fits = true;
    };

    template <typename Work>
    void for_parts(std::vector<Part>& parts, const Work& work) {
        pool_.for_ranges(parts.size(), 1, [&](std::size_t begin, std::size_t end) {
            for (std::size_t part = begin; part < end; ++part) {
                work(parts[part]);
            }
        });
    }

    [[nodiscard]] std::int64_t lead_of(const LevelNode& node, std::size_t index) const {
        const std::uint64_t home = home_bucket(node.mixed, key_bits_, homes_);
        return static_cast<std::int64_t>(home * kLanes) - static_cast<std::int64_t>(placed_ + index);
    }

    [[nodiscard]] std::int64_t furthest_lead(std::span<const LevelNode> nodes, const Part& part) const {
        std::int64_t lead = std::numeric_limits<std::int64_t>::min();
        for (std::size_t index = part.begin; index < part.end; ++index) {
            lead = std::max(lead, lead_of(nodes[index], index));
        }
        return lead;
    }

    [[nodiscard]] bool place(std::span<const LevelNode> nodes, const Part& part) {
        std::int64_t lead = part.lead;
        for (std::size_t index = part.begin; index < part.end; ++index) {
            const LevelNode& node = nodes[index];
            lead = std::max(lead, lead_of(node, index));
            const auto lane = static_cast<std::uint64_t>(lead) + placed_ + index;
            const std::uint64_t displacement = lane / kLanes - home_bucket(node.mixed, key_bits_, homes_);
            if (displacement > kMaxDisplacement) {
                return false;
            }
            Bucket& bucket = buckets_[lane / kLanes];
            bucket.words[lane % kLanes] = (node.has_child != 0 ? kHasChild : 0) |
                                          static_cast<std::uint32_t>(displacement << kRemainderBits) |
                                          remainder_of(node.mixed);
            bucket.ids[lane % kLanes] = node.id;
        }
        return true;
    }

    std::span<Bucket> buckets_;
    std::uint64_t homes_;
    unsigned key_bits_;
    const ThreadPool& pool_;
    std::uint64_t placed_ = 0;
    std::int64_t lead_ = 0;
};

class Builder {
  public:
    Builder(const std::filesystem::path& path, const KeyTable& keys, std::uint64_t vocab_size,
            const IndexIdentity& identity, const BuildOptions& options)
        : path_(path), keys_(keys), options_(options), pool_(options.threads) {
        check_keys(keys, vocab_size, pool_);
        header_.identity = identity;
        header_.vocab_size = vocab_size;
        header_.rows = keys.rows();
        const auto [least, most] = std::minmax_element(keys.orders.begin(), keys.orders.end());
        header_.min_order = *least;
        header_.max_order = *most;
        for (const std::uint8_t order : keys.orders) {
            ++keys_by_order_[order];
        }
        total_ = keys_by_order_[1];
        for (std::uint32_t order = 2; order <= header_.max_order; ++order) {
            total_ += at_least(order);
        }
    }

    IndexHeader build() {
        // Closed banks have no phantoms, and then the width of a row is the width of an id.
        auto id_bits = static_cast<unsigned>(std::bit_width(header_.rows - 1));
        while (true) {
            try {
                return build_with(id_bits);
            } catch (const NeedsWiderIds&) {
                ++id_bits;
            }
        }
    }

  private:
    [[nodiscard]] std::uint64_t at_least(std::uint32_t order) const {
        return std::accumulate(keys_by_order_.begin() + order, keys_by_order_.end(), std::uint64_t{0});
    }

    IndexHeader build_with(unsigned id_bits) {
        header_.phantoms = 0;
        header_.levels.clear();
        done_ = 0;
        id_bits_ = id_bits;
        key_bits_ = std::max(id_bits, header_.token_bits()) + header_.token_bits();
        SectionFile file(path_);
        lay_out(header_);
        write_unigrams(file);
        parents_.resize(keys_.rows());
        for (std::size_t row = 0; row < keys_.rows(); ++row) {
            parents_[row] = static_cast<std::uint32_t>(keys_.token(row, 0));
        }
        for (std::uint32_t order = 2; order <= header_.max_order; ++order) {
            build_level(file, order);
        }
        const auto page = serialise_index_header(header_);
        std::memcpy(file.section(0, kHeaderBytes).data(), page.data(), page.size());
        file.keep(header_.file_bytes);
        return header_;
    }

    void write_unigrams(SectionFile& file) {
        header_.unigrams = 0;
        if (header_.min_order > 1) {
            return;
        }
        const auto bytes = file.section(header_.unigrams_offset, header_.vocab_size * sizeof(std::uint32_t));
        const std::span rows(reinterpret_cast<std::uint32_t*>(bytes.data()), header_.vocab_size);
        std::fill(rows.begin(), rows.end(), kNoRow);
        for (std::size_t row = 0; row < keys_.rows(); ++row) {
            if (keys_.orders[row] != 1) {
                continue;
            }
            std::uint32_t& place = rows[static_cast<std::size_t>(keys_.token(row, 0))];
            if (place != kNoRow) {
                throw bad_key(row, "repeats the key of row " + std::to_string(place));
            }
            place = static_cast<std::uint32_t>(row);
            ++header_.unigrams;
        }
        advance(header_.unigrams);
    }

    void build_level(SectionFile& file, std::uint32_t order) {
        const std::uint64_t candidates = at_least(order);
        const std::uint64_t at_once = std::max<std::uint64_t>(1, options_.memory_bytes / kBytesPerEntry);
        const std::uint64_t parts = std::max<std::uint64_t>(1, (candidates + at_once - 1) / at_once);
        LevelCollector collector(keys_, order, parents_, header_.token_bits(), key_bits_, pool_);
        std::vector<std::uint32_t> children(order < header_.max_order ? keys_.rows() : 0);
        const std::uint64_t first_phantom = header_.nodes();
        std::uint64_t entries = 0;
        std::span<const LevelNode> nodes;
        for (std::uint64_t part = 0; part < parts; ++part) {
            nodes = collector.collect(part, parts, header_.nodes(), children);
            entries += nodes.size();
            header_.phantoms += collector.phantoms();
            require_id_bits();
            advance(candidates * (part + 1) / parts - candidates * part / parts);
        }
        header_.levels.push_back({order, entries, bucket_count(entries), 0});
        // What was collected in one part is still there; several parts are collected once more.
        const auto fill = [&](BucketFiller& filler) {
            if (parts == 1) {
                return filler.append(nodes);
            }
            std::uint64_t phantom = first_phantom;
            for (std::uint64_t part = 0; part < parts; ++part) {
                if (!filler.append(collector.collect(part, parts, phantom, {}))) {
                    return false;
                }
                phantom += collector.phantoms();
            }
            return true;
        };
        place_level(file, fill);
        parents_ = std::move(children);
    }

    template <typename Fill>
    void place_level(SectionFile& file, const Fill& fill) {
        IndexLevel& level = header_.levels.back();
        const std::uint64_t most = level.buckets * kMaxGrowth;
        while (true) {
            lay_out(header_);
            const auto bytes = file.section(level.offset, (level.buckets + kGuardBuckets) * sizeof(Bucket));
            BucketFiller filler({reinterpret_cast<Bucket*>(bytes.data()), bytes.size() / sizeof(Bucket)},
                                level.buckets, key_bits_, pool_);
            if (fill(filler)) {
                return;
            }
            level.buckets += level.buckets / 4 + 1;
            if (level.buckets > most) {
                throw std::length_error("the " + std::to_string(level.entries) + " suffixes of order " +
                                        std::to_string(level.order) + " collide too often for " +
                                        std::to_string(most) +
                                        " buckets, the most that so many may have: leave some keys out");
            }
        }
    }

    [[nodiscard]] std::uint64_t bucket_count(std::uint64_t entries) const {
        std::uint64_t buckets = std::max<std::uint64_t>(1, (entries + kLoad - 1) / kLoad);
        if (key_bits_ > kRemainderBits) {
            buckets = std::max(buckets, std::uint64_t{1} << (key_bits_ - kRemainderBits));
        }
        while (!remainder_is_exact(buckets, key_bits_)) {
            ++buckets;
        }
        return buckets;
    }

    void require_id_bits() const {
        if (static_cast<unsigned>(std::bit_width(header_.nodes() - 1)) > id_bits_) {
            throw NeedsWiderIds{};
        }
    }

    void advance(std::uint64_t entries) {
        done_ += entries;
        // A build that started again tells nothing until it has come further than before.
        if (options_.progress && done_ > told_) {
            told_ = done_;
            options_.progress(done_, total_);
        }
    }

    std::filesystem::path path_;
    const KeyTable& keys_;
    const BuildOptions& options_;
    ThreadPool pool_;
    IndexHeader header_{};
    std::array<std::uint64_t, kMaxOrder + 1> keys_by_order_{};
    std::uint64_t total_ = 0;
    std::uint64_t done_ = 0;
    std::uint64_t told_ = 0;
    unsigned id_bits_ = 0;
    unsigned key_bits_ = 0;
    std::vector<std::uint32_t> parents_;
};

}  // namespace

IndexHeader build_index(const std::filesystem::path& path, const KeyTable& keys, std::uint64_t vocab_size,
                        const IndexIdentity& identity, const BuildOptions& options) {
    return Builder(path, keys, vocab_size, identity, options).build();
}

}  // namespace megatron_graft
