// The token ids of a slice of a corpus, read block by block from the files of its data sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "positioned_file.hpp"

namespace megatron_graft {

// A range of documents of one data set.
struct CorpusPiece {
    std::uint32_t data_set;     // which one, for messages and weights
    std::filesystem::path ids;  // token ids end to end, little-endian
    unsigned id_bytes;          // of one of them: 2 (unsigned) or 4 (signed)
    std::uint64_t first_token;  // number of the first token in the file
    std::uint64_t num_tokens;
    std::filesystem::path lengths;  // int32 lengths of documents
    std::uint64_t lengths_offset;   // bytes of the file before the length of the first document
    std::uint64_t num_documents;
};

// A token id that is negative or not below the size of the vocabulary.
class TokenOutOfRange : public std::runtime_error {
  public:
    TokenOutOfRange(std::uint32_t set, std::uint64_t token_place, std::int64_t token_value)
        : std::runtime_error("token id " + std::to_string(token_value) + " is outside the vocabulary"),
          data_set(set),
          place(token_place),
          value(token_value) {}
    std::uint32_t data_set;
    std::uint64_t place;  // number of the token in its file
    std::int64_t value;
};

class TokenStream {
  public:
    // Set in the first token of a document; the id is below.
    static constexpr std::uint32_t kDocumentStart = 1U << 31U;

    // Throws std::invalid_argument if an id is not 2 or 4 bytes, and for the first piece what read() throws.
    // Without `with_starts` documents are not looked at, and no token is marked.
    TokenStream(std::span<const CorpusPiece> pieces, std::uint32_t vocab_size, bool with_starts);

    // Fills the front of `tokens` and returns how many they are, all of one piece; 0 at the end. Throws
    // TokenOutOfRange, FormatError if documents do not add up to the tokens of their piece or a file ends too
    // early, std::system_error if one cannot be read.
    std::size_t read(std::span<std::uint32_t> tokens);

    // Of the tokens read last.
    [[nodiscard]] std::uint32_t data_set() const { return pieces_[piece_].data_set; }

  private:
    void open_piece();
    template <typename Id>
    void read_ids(std::span<std::uint32_t> tokens);
    void mark_starts(std::span<std::uint32_t> tokens);
    void finish_documents();
    std::uint64_t next_length();

    std::span<const CorpusPiece> pieces_;
    std::uint32_t vocab_size_;
    bool with_starts_;
    std::size_t piece_ = 0;
    std::uint64_t done_ = 0;  // tokens of the piece
    std::optional<PositionedFile> ids_;
    std::optional<PositionedFile> lengths_;
    std::vector<std::byte> raw_;
    std::vector<std::int32_t> length_buffer_;
    std::size_t buffered_ = 0;          // lengths of the buffer that were used
    std::uint64_t documents_read_ = 0;  // of the piece, into the buffer
    std::uint64_t next_start_ = 0;      // token of the piece at which the next document starts
};

}  // namespace megatron_graft
