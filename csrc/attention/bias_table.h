// What a tile of similarities reads from the table of biases, and adds to the table's gradient. For
// *.simd.cpp only.
#pragma once

#include <cstdint>

#include "attention/tile.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

// s = scale * s + bias for `rows` queries; without codes there is no bias.
void finish_similarities(const AttentionCall& call, const Tile& tile, const float* table,
                         const int32_t* q_codes, int rows, float* s);

// dtable[entry of each pair] += ds for a tile.
void add_table_gradient(const TableTile& t, float* dtable, const int32_t* q_codes, int rows,
                        int groups, const float* ds);

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
