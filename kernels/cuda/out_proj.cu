// Attention's output projection in decode: x += W a + bias.
#include "decode.cuh"

constexpr int WARPS = 16;
constexpr int DEPTH = 2;  // chunks under way in each warp: registers for two blocks

// A block adds one tile of 16 rows for up to 8 tokens: its warps split K, then a thread adds one (row, token)
// to x.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, 2)
    out_proj_decode(const u16* __restrict__ a, const u8* __restrict__ weights, const float* __restrict__ bias,
                    float* __restrict__ x, int tokens, int hidden, int tiles, int chunks, int group_blocks) {
  SHARED(Partial, partials, [WARPS]);
  SHARED(float, before, [COLUMNS * TILE_ROWS]);
  const int groups = (tokens + COLUMNS - 1) / COLUMNS;
  const int tile = blockIdx.x / groups, first = blockIdx.x % groups * COLUMNS;
  const int count = min(tokens - first, COLUMNS);
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;

  const Tile view = tile_at(weights, tiles, chunks, group_blocks, tile);
  const u16* row_g = a + (u64)(first + min(g, count - 1)) * chunks * CHUNK;
  Walk<WARPS, DEPTH, Space::GLOBAL> walk(view, row_g, chunks, group_blocks, warp);

  // What the product is added to waits in shared memory, as registers are full of weights.
  const int column = threadIdx.x / TILE_ROWS, r = threadIdx.x % TILE_ROWS, row = tile * TILE_ROWS + r;
  const bool mine = column < count && row < hidden;
  float* target = x + (u64)(first + column) * hidden + row;
  if (mine) before[threadIdx.x] = *target + bias[row];

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  walk.multiply(sum);
  store_partial(partials[warp], sum);
  __syncthreads();
  if (mine) *target = before[threadIdx.x] + add_partials(partials, column, r);
}
