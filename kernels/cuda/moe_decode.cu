// The two products of the experts in decode, over tiles of up to 8 tokens that chose the same expert.
#include "decode.cuh"
#include "swiglu.cuh"

constexpr int WARPS = 4;                     // share the chunks of a tile
constexpr int GROUPS = 4;                    // tiles of tokens that a block of down_decode has under way
constexpr int DEPTH = VECTORS == 1 ? 4 : 2;  // chunks under way in each warp: 2 or 4 KiB
constexpr int UP_ROWS = TILE_ROWS / 2;       // of the result that a tile makes

// Blocks at a time on a multiprocessor, as far as registers suffice without any spilt.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int UP_BLOCKS = 5;
#else
constexpr int UP_BLOCKS = 6;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200 && defined(WEIGHTS_INT8) && defined(OPERAND_BF16)
constexpr int DOWN_BLOCKS = 1;
#else
constexpr int DOWN_BLOCKS = 2;
#endif

typedef Walk<WARPS, DEPTH, Space::GLOBAL> TileWalk;

// A block has one tile of rows, 8 gates and their ups, and one tile of sorted tokens; a warp every fourth
// chunk of the rows. Then a thread has one gate and up of one token. Experts may lie in host memory.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, UP_BLOCKS)
    gate_up_decode(const u64* __restrict__ table, const float* __restrict__ bias, const u16* __restrict__ h,
                   const int* __restrict__ order, const int* __restrict__ tile_expert,
                   const int* __restrict__ tile_start, const int* __restrict__ tile_rows,
                   const int* __restrict__ count, u16* __restrict__ out, float limit, int intermediate,
                   int tiles, int chunks, int group_blocks, int bf16_out) {
  SHARED(Partial, partials, [WARPS]);
  const int slot = blockIdx.y;
  // Read together; past the count they mean nothing. A token of no sequence has no experts.
  const int used = count[0], expert = tile_expert[slot], start = tile_start[slot], tokens = tile_rows[slot];
  if (slot >= used || expert < 0) return;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;

  const Tile tile =
      tile_at(reinterpret_cast<const u8*>(table[expert]), tiles, chunks, group_blocks, blockIdx.x);
  const u16* row_h = h + (u64)order[start + min(g, tokens - 1)] * chunks * CHUNK;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  TileWalk(tile, row_h, chunks, group_blocks, warp).multiply(sum);
  store_partial(partials[warp], sum);
  __syncthreads();

  const int token = threadIdx.x / UP_ROWS, row = threadIdx.x % UP_ROWS;
  if (token >= tokens) return;
  const int j = blockIdx.x * UP_ROWS + row;  // past `intermediate`, weights and so the result are zeros
  float gate = add_partials(partials, token, row), up = add_partials(partials, token, row + UP_ROWS);
  if (j < intermediate) {
    const float* pair = bias + ((u64)expert * intermediate + j) * 2;
    gate += pair[0];
    up += pair[1];
  }
  const float y = swiglu(gate, up, limit);
  const u64 line = (u64)(start + token) * gridDim.x * UP_ROWS;
  out[line + operand_index(j)] = bf16_out ? float_to_bf16(y) : float_to_half(y);
}

// A block has one tile of rows for all the tokens: no two blocks add to the same numbers. Four warps share a
// tile of sorted tokens; the block's 16 warps have four tiles under way. What they make waits in shared
// memory, y[place][row], until a thread adds up one row of one token, in order of choice. The grouping
// arrays, and the thread's index, are read before and after each product rather than kept, which no register
// is to spare for; hence the arrays are not __restrict__.
extern "C" __global__ void __launch_bounds__(GROUPS * WARPS * WARP, DOWN_BLOCKS)
    down_decode(const u64* __restrict__ table, const float* __restrict__ bias, const u16* __restrict__ inner,
                const int* tile_expert, const int* tile_start, const int* tile_rows, const int* count,
                const int* __restrict__ place, const float* __restrict__ weights, float* __restrict__ x,
                int hidden, int tiles, int chunks, int group_blocks, int all_tokens, int choices) {
  DYNAMIC_SHARED(float, y);
  SHARED(Partial, partials, [GROUPS][WARPS]);
  const int first_row = blockIdx.x * TILE_ROWS;

  for (int first = 0; first < count[0]; first += GROUPS) {
    const int warp = threadIdx.x / WARP, group = warp / WARPS, g = threadIdx.x % WARP / 4;
    if (const int slot = first + group; slot < count[0] && tile_expert[slot] >= 0) {
      const u8* matrix = reinterpret_cast<const u8*>(table[tile_expert[slot]]);
      const Tile tile = tile_at(matrix, tiles, chunks, group_blocks, blockIdx.x);
      const u16* row = inner + (u64)(tile_start[slot] + min(g, tile_rows[slot] - 1)) * chunks * CHUNK;
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
      TileWalk(tile, row, chunks, group_blocks, warp % WARPS).multiply(sum);
      store_partial(partials[group][warp % WARPS], sum);
    }
    __syncthreads();
    const int thread = thread_again(), mine = thread / (WARPS * WARP), slot = first + mine;
    const int token = thread / TILE_ROWS % COLUMNS, row = thread % TILE_ROWS;
    if (slot < count[0] && token < tile_rows[slot] && first_row + row < hidden) {
      const int expert = tile_expert[slot];
      float sum = 0.f;
      if (expert >= 0) {
        const float b = bias[(u64)expert * hidden + first_row + row];
        sum = add_partials(partials[mine], token, row) + b;
      }
      y[(tile_start[slot] + token) * TILE_ROWS + row] = sum;
    }
    __syncthreads();
  }

  for (int i = threadIdx.x; i < all_tokens * TILE_ROWS; i += blockDim.x) {
    const int token = i / TILE_ROWS, row = i % TILE_ROWS;
    if (first_row + row < hidden) {
      float sum = 0.f;
      for (int j = 0; j < choices; ++j) {
        const int from = place[token * choices + j];
        if (from >= 0) sum = fmaf(weights[token * choices + j], y[from * TILE_ROWS + row], sum);
      }
      x[(u64)token * hidden + first_row + row] += sum;
    }
  }
}
