// The core of every decode product: a block multiplies one tile of weights with up to 8 columns of x.
//
// Weights go from global memory to the A operand of mma, tokens are the 8 columns of B. The warps of a block
// split the chunks of a tile in an order that depends on nothing but their number, so that a token's sums are
// the same in any batch; more columns are more blocks, which share the weights through L2.
#pragma once
#include "weights.cuh"

constexpr int COLUMNS = 8;

// Where a lane finds its B operands: columns 8 t to 8 t + 7 of each block of row g. A column that nobody
// needs may repeat another one, which costs no traffic.
DEVICE const uint4* lane_operands(const u16* row) {
  return reinterpret_cast<const uint4*>(row) + threadIdx.x % 4;
}

// Where the walk's B operands lie: in global memory, or in shared memory, where they need not be yet when the
// first weights are loaded. They are read just before they are needed: registers are for weights.
enum class Space { GLOBAL, SHARED };

// A warp's walk over the chunks first, first + STEP, ... of a tile, with loads for DEPTH chunks under way.
// Its pointers move on by DEPTH chunks at a time: all that lies between is reached by constant offsets.
template <int STEP, int DEPTH, Space SPACE>
struct Walk {
  const uint4* codes;
  const u32* scales;
  const uint4* operands;          // column g's, the lane's part
  int chunk, group_blocks, left;  // the next chunk; how many are left
  Chunk weights[DEPTH];

  // Issues the first loads. `row` holds the operands of column g.
  DEVICE Walk(const Tile& tile, const u16* row, int chunks, int group_blocks, int first)
      : codes(tile.codes + first * (VECTORS * WARP)),
        scales(tile.scales),
        operands(lane_operands(row) + first * 8),
        chunk(first),
        group_blocks(group_blocks),
        left((chunks - first + STEP - 1) / STEP) {
#ifdef WEIGHTS_MXFP4
    scales += first * 8;
#endif
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
      if (i < left) load(i, i);
  }

  DEVICE void load(int slot, int ahead) {
    load_codes(weights[slot], codes + ahead * (STEP * VECTORS * WARP));
#ifdef WEIGHTS_INT8
    load_scales(weights[slot], scales, chunk + ahead * STEP, group_blocks);
#else
    load_scales(weights[slot], scales, ahead * STEP, group_blocks);
#endif
  }

  DEVICE void multiply_slot(int slot, int ahead, float (&sum)[4]) const {
    const uint4* at = operands + ahead * (STEP * 8);
    uint4 x[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) x[b] = SPACE == Space::GLOBAL ? __ldg(at + b * 4) : at[b * 4];
    multiply_chunk(weights[slot], x, sum);
  }

  // Adds the warp's share of the product to `sum`, laid out as mma's D. All lanes of a warp branch alike.
  DEVICE void multiply(float (&sum)[4]) {
#pragma unroll 1
    for (; left >= 2 * DEPTH; left -= DEPTH) {
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        multiply_slot(i, i, sum);
        load(i, i + DEPTH);
      }
      codes += DEPTH * STEP * VECTORS * WARP;
#ifdef WEIGHTS_MXFP4
      scales += DEPTH * STEP * 8;
#endif
      operands += DEPTH * STEP * 8;
      chunk += DEPTH * STEP;
    }
#pragma unroll
    for (int i = 0; i < 2 * DEPTH - 1; ++i) {
      if (i < left) {
        multiply_slot(i % DEPTH, i, sum);
        if (i + DEPTH < left) load(i % DEPTH, i + DEPTH);
      }
    }
  }
};

// Where the warps of a block meet: each leaves its sums [column][row]. The stride puts the 32 lanes of a
// store, and nearly those of a load, in different banks.
constexpr int PARTIAL_STRIDE = TILE_ROWS + 4;
typedef float Partial[COLUMNS][PARTIAL_STRIDE];

DEVICE void store_partial(Partial& partial, const float (&sum)[4]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) partial[2 * t + i % 2][g + i / 2 * 8] = sum[i];
}

// Adds what W warps stored, in the order of the warps; call after __syncthreads().
template <int W>
DEVICE float add_partials(const Partial (&partials)[W], int column, int row) {
  float sum = partials[0][column][row];
#pragma unroll
  for (int w = 1; w < W; ++w) sum += partials[w][column][row];
  return sum;
}
