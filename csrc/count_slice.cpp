#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ngram_count.hpp"
#include "slice_counter.hpp"

namespace megatron_graft {
namespace {

constexpr std::size_t kMargin =
    kMaxCountedOrder;  // of positions before a block, which its n-grams reach into
static_assert(kCountedTokenMask < TokenStream::kDocumentStart);

void check(const SliceTask& task) {
    const auto require = [](bool condition, const std::string& problem) {
        if (!condition) {
            throw std::invalid_argument(problem);
        }
    };
    require(task.order >= kMinCountedOrder && task.order <= kMaxCountedOrder,
            "there is no counting of order " + std::to_string(task.order));
    require(task.vocab_size <= kCountedTokenMask + 1, "a vocabulary of " + std::to_string(task.vocab_size));
    require(task.shares >= 1 && task.shares <= kMaxShares,
            "runs of " + std::to_string(task.shares) + " shares");
    require(task.block_tokens >= 1, "a block of no tokens");
    require(task.longest_document <= kNoNode / 4, "documents of more than 2^30 tokens");
}

// A block of the corpus behind what precedes it. [kMargin] is the first position of the block.
class Window {
  public:
    explicit Window(std::size_t block) : values_(kMargin + block, kNoNode) {}

    // The last positions of a block of this size become what precedes the next one.
    void shift(std::size_t size) {
        std::memmove(values_.data(), values_.data() + size, kMargin * sizeof(std::uint32_t));
    }
    [[nodiscard]] std::span<std::uint32_t> block(std::size_t size) {
        return std::span(values_).subspan(kMargin, size);
    }
    [[nodiscard]] const std::uint32_t* begin() const { return values_.data() + kMargin; }

  private:
    std::vector<std::uint32_t> values_;
};

// Mixed keys of a block and the positions at which their n-grams end.
struct Candidates {
    explicit Candidates(std::size_t block) : mixed(block), places(block) {}
    std::vector<std::uint64_t> mixed;
    std::vector<std::uint32_t> places;
    std::size_t size = 0;
};

// n-grams of `order` whose (n-1)-grams both were kept. Only between two tokens can a document start
// unnoticed.
template <bool kTokens>
void find_candidates(const std::uint32_t* tokens, const std::uint32_t* nodes, std::size_t size,
                     unsigned order, const KeyMix& mix, Candidates& found) {
    const std::uint32_t* oldest = tokens - (order - 1);
    const std::uint32_t* before = nodes - 1;
    std::size_t count = 0;
    for (std::size_t at = 0; at < size; ++at) {
        bool whole = nodes[at] != kNoNode && before[at] != kNoNode;
        if constexpr (kTokens) {
            whole = whole && (tokens[at] & TokenStream::kDocumentStart) == 0;
        }
        found.mixed[count] = mix_key(counted_key(nodes[at], oldest[at] & kCountedTokenMask), mix);
        found.places[count] = static_cast<std::uint32_t>(at);
        count += whole ? 1 : 0;
    }
    found.size = count;
}

class SliceCounter {
  public:
    explicit SliceCounter(const SliceTask& task)
        : task_(task),
          counted_mix_(counted_key_mix(parents_of_counted())),
          tokens_(task.block_tokens),
          lower_(task.block_tokens),
          upper_(task.block_tokens),
          candidates_(task.block_tokens) {
        if (task.order > kMinCountedOrder) {
            table_.emplace(task.kept, task.kept_parents, task.table_entries);
        }
        if (task.order > kMinCountedOrder + 1) {
            lower_nodes_.emplace(task.lower_nodes);
        }
        if (task.longest_document > 0) {
            documents_.emplace(task.longest_document);
        }
    }

    SliceFacts run() {
        const auto started = std::chrono::steady_clock::now();
        if (table_) {
            table_->load_next();
            if (task_.keep_nodes || !table_->is_last()) {
                nodes_.emplace(task_.nodes, PositionedFile::Access::kUpdate);
            }
            for (; !table_->is_last(); table_->load_next()) {
                pass(nullptr);
            }
        }
        facts_.node_seconds =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        RunWriter writer(task_, counted_mix_.bits);
        pass(&writer);
        writer.finish(facts_);
        return std::move(facts_);
    }

  private:
    [[nodiscard]] std::uint64_t parents_of_counted() const {
        if (task_.order == kMinCountedOrder) {
            return task_.vocab_size;
        }
        std::uint64_t kept = 0;
        for (const KeptFile& file : task_.kept) {
            kept += file.entries;
        }
        return kept;
    }
    // Whether nodes of single tokens are looked at, between which documents start.
    [[nodiscard]] bool reads_starts() const {
        return task_.order <= kMinCountedOrder + 1 || task_.longest_document > 0;
    }

    // Goes once over the slice; the last pass counts.
    void pass(RunWriter* writer) {
        TokenStream stream(task_.pieces, task_.vocab_size, reads_starts());
        tokens_ = Window(task_.block_tokens);
        lower_ = Window(task_.block_tokens);
        upper_ = Window(task_.block_tokens);
        std::uint64_t position = 0;
        while (const std::size_t size = stream.read(tokens_.block(task_.block_tokens))) {
            fill_nodes(position, size);
            if (writer != nullptr) {
                writer->set_data_set(stream.data_set());
                count(*writer, size);
            }
            tokens_.shift(size);
            lower_.shift(size);
            upper_.shift(size);
            position += size;
        }
        facts_.tokens = position;
        ++facts_.passes;
    }

    // Brings upper_ to the nodes of order - 1 (those of the tables so far), lower_ to those of order - 2.
    void fill_nodes(std::uint64_t position, std::size_t size) {
        if (!table_) {
            fill_tokens(upper_, size);
            return;
        }
        const auto upper = upper_.block(size);
        if (facts_.passes == 0) {
            std::fill(upper.begin(), upper.end(), kNoNode);
        } else {
            nodes_->read_elements(position, upper);
        }
        if (lower_nodes_) {
            lower_nodes_->read_elements(position, lower_.block(size));
            find_candidates<false>(tokens_.begin(), lower_.begin(), size, task_.order - 1, table_->mix(),
                                   candidates_);
        } else {
            fill_tokens(lower_, size);
            find_candidates<true>(tokens_.begin(), lower_.begin(), size, task_.order - 1, table_->mix(),
                                  candidates_);
        }
        table_->find(std::span(candidates_.mixed).first(candidates_.size), candidates_.places, upper);
        if (nodes_) {
            nodes_->write_elements(position, std::span<const std::uint32_t>(upper));
        }
    }

    // The node of a token is the token, but none at the end of a document.
    void fill_tokens(Window& nodes, std::size_t size) {
        const std::uint32_t eod = task_.eod.value_or(kNoNode);
        const auto target = nodes.block(size);
        for (std::size_t at = 0; at < size; ++at) {
            const std::uint32_t token = tokens_.begin()[at] & kCountedTokenMask;
            target[at] = token == eod ? kNoNode : token;
        }
    }

    void count(RunWriter& writer, std::size_t size) {
        const auto find = task_.order == kMinCountedOrder ? find_candidates<true> : find_candidates<false>;
        find(tokens_.begin(), upper_.begin(), size, task_.order, counted_mix_, candidates_);
        if (documents_) {
            count_documents(writer, size);
            return;
        }
        facts_.candidates += candidates_.size;
        for (std::size_t index = 0; index < candidates_.size; ++index) {
            writer.add(candidates_.mixed[index]);
        }
    }

    void count_documents(RunWriter& writer, std::size_t size) {
        std::size_t next = 0;
        for (std::size_t at = 0; at < size; ++at) {
            if ((tokens_.begin()[at] & TokenStream::kDocumentStart) != 0) {
                documents_->start_document();
            }
            if (next < candidates_.size && candidates_.places[next] == at) {
                const std::uint64_t mixed = candidates_.mixed[next++];
                if (documents_->is_new(mixed)) {
                    ++facts_.candidates;
                    writer.add(mixed);
                }
            }
        }
    }

    const SliceTask& task_;
    KeyMix counted_mix_;
    std::optional<KeptTable> table_;
    std::optional<PositionedFile> lower_nodes_;
    std::optional<PositionedFile> nodes_;
    std::optional<DocumentKeys> documents_;
    Window tokens_;
    Window lower_;  // nodes of order - 2
    Window upper_;  // nodes of order - 1
    Candidates candidates_;
    SliceFacts facts_;
};

}  // namespace

SliceFacts count_slice(const SliceTask& task) {
    check(task);
    return SliceCounter(task).run();
}

}  // namespace megatron_graft
