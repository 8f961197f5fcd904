// Small corpora and arrays of numbers as files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "positioned_file.hpp"
#include "scratch.hpp"
#include "token_stream.hpp"

namespace megatron_graft::testing {

using Documents = std::vector<std::vector<std::int32_t>>;

template <typename Element>
void write_file(const std::filesystem::path& path, const std::vector<Element>& elements) {
    std::filesystem::remove(path);
    PositionedFile(path, PositionedFile::Access::kUpdate)
        .write_elements(0, std::span<const Element>(elements));
}

template <typename Element>
std::vector<Element> read_elements(const std::filesystem::path& path) {
    std::vector<Element> elements(std::filesystem::file_size(path) / sizeof(Element));
    PositionedFile(path).read_elements(0, std::span(elements));
    return elements;
}

// A data set of 32-bit ids as one piece of a corpus.
inline CorpusPiece write_piece(const ScratchDirectory& directory, const std::string& name,
                               const Documents& documents, std::uint32_t data_set = 0) {
    std::vector<std::int32_t> ids;
    std::vector<std::int32_t> lengths = {-77};  // stands for a header
    for (const auto& document : documents) {
        ids.insert(ids.end(), document.begin(), document.end());
        lengths.push_back(static_cast<std::int32_t>(document.size()));
    }
    write_file(directory / (name + ".bin"), ids);
    write_file(directory / (name + ".idx"), lengths);
    return {data_set,   directory / (name + ".bin"), 4, 0,
            ids.size(), directory / (name + ".idx"), 4, documents.size()};
}

}  // namespace megatron_graft::testing
