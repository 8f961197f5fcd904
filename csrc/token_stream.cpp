#include "token_stream.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "checked.hpp"

namespace megatron_graft {
namespace {

constexpr std::size_t kLengthsAtOnce = 16384;

}  // namespace

TokenStream::TokenStream(std::span<const CorpusPiece> pieces, std::uint32_t vocab_size, bool with_starts)
    : pieces_(pieces), vocab_size_(vocab_size), with_starts_(with_starts) {
    for (const CorpusPiece& piece : pieces) {
        if (piece.id_bytes != 2 && piece.id_bytes != 4) {
            throw std::invalid_argument("token ids of " + std::to_string(piece.id_bytes) + " bytes");
        }
    }
    if (!pieces_.empty()) {
        open_piece();
    }
}

void TokenStream::open_piece() {
    const CorpusPiece& piece = pieces_[piece_];
    done_ = documents_read_ = next_start_ = 0;
    length_buffer_.clear();
    buffered_ = 0;
    ids_.emplace(piece.ids);
    if (with_starts_) {
        lengths_.emplace(piece.lengths);
        if (piece.num_tokens == 0) {
            finish_documents();
        }
    }
}

std::size_t TokenStream::read(std::span<std::uint32_t> tokens) {
    while (piece_ < pieces_.size() && done_ == pieces_[piece_].num_tokens) {
        if (piece_ + 1 == pieces_.size()) {
            return 0;  // data_set() still tells of the last piece
        }
        ++piece_;
        open_piece();
    }
    if (pieces_.empty()) {
        return 0;
    }
    const CorpusPiece& piece = pieces_[piece_];
    const auto size =
        static_cast<std::size_t>(std::min<std::uint64_t>(tokens.size(), piece.num_tokens - done_));
    const auto front = tokens.first(size);
    if (piece.id_bytes == 2) {
        read_ids<std::uint16_t>(front);
    } else {
        read_ids<std::int32_t>(front);
    }
    if (with_starts_) {
        mark_starts(front);
    }
    done_ += size;
    return size;
}

template <typename Id>
void TokenStream::read_ids(std::span<std::uint32_t> tokens) {
    const CorpusPiece& piece = pieces_[piece_];
    raw_.resize(tokens.size() * sizeof(Id));
    ids_->read((piece.first_token + done_) * sizeof(Id), raw_);
    std::uint32_t largest = 0;
    for (std::size_t at = 0; at < tokens.size(); ++at) {
        Id id;
        std::memcpy(&id, raw_.data() + at * sizeof(Id), sizeof(Id));
        tokens[at] = static_cast<std::uint32_t>(id);  // a negative id becomes a large one
        largest = std::max(largest, tokens[at]);
    }
    if (largest >= vocab_size_) {
        const auto bad = std::find_if(tokens.begin(), tokens.end(),
                                      [this](std::uint32_t token) { return token >= vocab_size_; });
        const auto value =
            std::is_signed_v<Id> ? std::int64_t{static_cast<std::int32_t>(*bad)} : std::int64_t{*bad};
        throw TokenOutOfRange(piece.data_set,
                              piece.first_token + done_ + static_cast<std::uint64_t>(bad - tokens.begin()),
                              value);
    }
}

void TokenStream::mark_starts(std::span<std::uint32_t> tokens) {
    const std::uint64_t end = done_ + tokens.size();
    while (next_start_ < end) {
        const std::uint64_t length = next_length();
        if (length > 0) {  // an empty document starts nowhere
            tokens[static_cast<std::size_t>(next_start_ - done_)] |= kDocumentStart;
        }
        next_start_ += length;
    }
    if (end == pieces_[piece_].num_tokens) {
        finish_documents();
    }
}

// Behind the last token of a piece only empty documents may come.
void TokenStream::finish_documents() {
    const CorpusPiece& piece = pieces_[piece_];
    while (next_start_ == piece.num_tokens &&
           (buffered_ < length_buffer_.size() || documents_read_ < piece.num_documents)) {
        next_start_ += next_length();
    }
    if (next_start_ != piece.num_tokens) {
        throw FormatError(piece.lengths.string() + " has documents that do not add up to their tokens: " +
                          std::to_string(next_start_) + " or more instead of " +
                          std::to_string(piece.num_tokens));
    }
}

std::uint64_t TokenStream::next_length() {
    const CorpusPiece& piece = pieces_[piece_];
    if (buffered_ == length_buffer_.size()) {
        const std::uint64_t left = piece.num_documents - documents_read_;
        if (left == 0) {
            throw FormatError(piece.lengths.string() + " has too few documents for their tokens");
        }
        length_buffer_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(left, kLengthsAtOnce)));
        lengths_->read(piece.lengths_offset + documents_read_ * sizeof(std::int32_t),
                       std::as_writable_bytes(std::span(length_buffer_)));
        documents_read_ += length_buffer_.size();
        buffered_ = 0;
    }
    const std::int32_t length = length_buffer_[buffered_++];
    if (length < 0) {
        throw FormatError(piece.lengths.string() + " has a document of " + std::to_string(length) +
                          " tokens");
    }
    return static_cast<std::uint64_t>(length);
}

}  // namespace megatron_graft
