// The walk, to be compiled once per instruction set. The including file defines WALK_TARGET (a function
// attribute, may be empty) and, in the anonymous namespace of megatron_graft, probe():
//
//   std::uint32_t probe(const Bucket& bucket, std::uint32_t word)
//       bit k < 8 set: lane k holds `word`; bit 8 set: the last lane is empty, so the bucket has not
//       overflowed
//
// A walk alone waits for memory at every step. So many of them are under way at once: a ring of chunks, each
// with up to kChunk walkers whose next buckets are already on their way. The oldest chunk is taken, all its
// walkers take their step, those that go on are joined by new positions to make a full chunk again, their
// next buckets are asked for, and the chunk goes to the end of the ring. Walkers of different orders mix
// freely, so the ring is full until the positions run out.

namespace megatron_graft {
namespace {

constexpr std::size_t kChunk = 32;
constexpr std::size_t kChunks = 4;
constexpr std::uint32_t kNotOverflowed = 1U << kLanes;

// A step says what a walker is about to look at: the order of the suffix it hopes to find, and how many
// buckets from home it has come while looking for it.
constexpr std::uint32_t kStepsPerOrder = kMaxDisplacement + 2;
constexpr std::uint32_t kFirstStep = 2 * kStepsPerOrder;

struct Chunk {
    std::size_t size = 0;
    std::array<std::uint32_t, kChunk> position;
    std::array<std::uint32_t, kChunk> step;
    std::array<std::uint32_t, kChunk> parent;  // node of the suffix one token shorter
    std::array<std::uint32_t, kChunk> word;    // the lane sought
    std::array<const Bucket*, kChunk> bucket;
};

// All walkers of the chunk look into their buckets; those that go on stay, moved together to its front: to
// the next order if they found their node and it has children, to the next bucket if this one has overflowed.
//
// No branch depends on what is found: it would be guessed wrong half the time, and a bucket that was not
// asked for ahead would be waited for. So results are merged by masks, and a walker is always moved but only
// counted if it goes on.
WALK_TARGET inline void take_step(const WalkTables& tables, const WalkBlock& block, Chunk& chunk) {
    // Held in registers: the compiler must assume that a store to orders[] changes whatever else is in
    // memory.
    std::int64_t* const rows = block.rows;
    std::uint8_t* const orders = block.orders;
    const std::uint8_t* const reach = block.reach;
    const std::uint32_t row_limit = tables.row_limit;
    const std::size_t size = chunk.size;
    std::size_t kept = 0;
    for (std::size_t walker = 0; walker < size; ++walker) {
        const Bucket& bucket = *chunk.bucket[walker];
        const std::uint32_t seen = probe(bucket, chunk.word[walker]);
        const auto lane = static_cast<unsigned>(std::countr_zero(seen | kNotOverflowed)) % kLanes;
        const std::uint32_t found = ((seen & (kNotOverflowed - 1)) + (kNotOverflowed - 1)) / kNotOverflowed;
        const std::uint32_t position = chunk.position[walker];
        const std::uint32_t step = chunk.step[walker];
        const std::uint32_t order = step / kStepsPerOrder;
        const std::uint32_t id = bucket.ids[lane];
        const std::int64_t is_row = -std::int64_t{found & static_cast<std::uint32_t>(id < row_limit)};
        rows[position] = (rows[position] & ~is_row) | (std::int64_t{id} & is_row);
        orders[position] =
            static_cast<std::uint8_t>((orders[position] & ~is_row) | (std::int64_t{order} & is_row));

        const std::uint32_t deeper =
            found & (bucket.words[lane] >> 31U) & static_cast<std::uint32_t>(reach[position] > order);
        const std::uint32_t aside = static_cast<std::uint32_t>(seen == 0) &
                                    static_cast<std::uint32_t>(step % kStepsPerOrder < kMaxDisplacement);
        const std::uint32_t stays = 0U - aside;
        chunk.position[kept] = position;
        chunk.step[kept] = (step | (~stays & (kStepsPerOrder - 1))) + 1;
        chunk.parent[kept] = (chunk.parent[walker] & stays) | (id & ~stays);
        kept += deeper | aside;
    }
    chunk.size = kept;
}

// Fills the chunk up with positions from `next` on and writes what is known of them at once.
WALK_TARGET inline std::size_t admit(const WalkTables& tables, const WalkBlock& block, Chunk& chunk,
                                     std::size_t next) {
    std::size_t size = chunk.size;
    while (size < kChunk && next < block.count) {
        const std::uint32_t token = block.tokens[next * block.stride];
        const std::uint32_t reach = block.reach[next];
        std::uint32_t row = kNoRow;
        if (tables.unigrams != nullptr && reach > 0) {
            row = tables.unigrams[token];
        }
        const bool is_row = row < tables.row_limit;
        block.rows[next] = is_row ? std::int64_t{row} : std::int64_t{-1};
        block.orders[next] = is_row ? 1 : 0;
        chunk.position[size] = static_cast<std::uint32_t>(next);
        chunk.step[size] = kFirstStep;
        chunk.parent[size] = token;
        size += reach >= 2 ? 1U : 0U;
        ++next;
    }
    chunk.size = size;
    return next;
}

// Works out every walker's next bucket and asks for it.
WALK_TARGET inline void aim(const WalkTables& tables, const WalkBlock& block, Chunk& chunk) {
    std::array<std::uint64_t, kChunk> mixed;
    const std::uint64_t mask = (1ULL << tables.key_bits) - 1;
    const unsigned half_bits = (tables.key_bits + 1) / 2;
    for (std::size_t walker = 0; walker < chunk.size; ++walker) {
        const std::size_t newest = chunk.position[walker] * block.stride;
        const std::uint64_t token = *(block.tokens + newest - (chunk.step[walker] / kStepsPerOrder - 1));
        mixed[walker] = std::uint64_t{chunk.parent[walker]} << tables.token_bits | token;
    }
    for (std::size_t walker = 0; walker < chunk.size; ++walker) {
        mixed[walker] = mix_key(mixed[walker], mask, half_bits);
    }
    for (std::size_t walker = 0; walker < chunk.size; ++walker) {
        const WalkTables::Level& level = tables.levels[chunk.step[walker] / kStepsPerOrder];
        const std::uint32_t displacement = chunk.step[walker] % kStepsPerOrder;
        const std::uint64_t home = home_bucket(mixed[walker], tables.key_bits, level.homes);
        chunk.bucket[walker] = level.buckets + home + displacement;
        chunk.word[walker] = remainder_of(mixed[walker]) | displacement << kRemainderBits;
        __builtin_prefetch(chunk.bucket[walker]);
    }
}

WALK_TARGET inline void walk_in_ring(const WalkTables& tables, const WalkBlock& block) {
    std::array<Chunk, kChunks> ring;
    std::size_t next = 0;
    std::size_t walking = 1;
    while (walking != 0 || next < block.count) {
        walking = 0;
        for (Chunk& chunk : ring) {
            take_step(tables, block, chunk);
            next = admit(tables, block, chunk, next);
            aim(tables, block, chunk);
            walking += chunk.size;
        }
    }
}

}  // namespace
}  // namespace megatron_graft
