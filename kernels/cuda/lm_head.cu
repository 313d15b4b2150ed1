// The last step of decode: RMSNorm of the wanted rows, logits, and, where asked for, the draw of a token.
#include "decode.cuh"
#include "norm.cuh"
#include "philox.cuh"

constexpr int WARPS = NORM_WARPS;
// Chunks under way in each warp: what two blocks have registers for.
#if defined(WEIGHTS_INT8) && defined(OPERAND_BF16)
constexpr int DEPTH = 2;
#else
constexpr int DEPTH = 3;
#endif

// A block makes 8 tiles of the vocabulary for up to 8 rows: it normalises them in shared memory, then each
// warp makes one tile. best: the maximum of the keys of each row, added to with atomicMax.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, 2)
    lm_head_decode(const float* __restrict__ x, const int* __restrict__ rows,
                   const float* __restrict__ norm_weight, const u8* __restrict__ weights,
                   float* __restrict__ logits, u64* __restrict__ best, const float* __restrict__ temperature,
                   const u64* __restrict__ seed, const int* __restrict__ choice,
                   const int* __restrict__ positions, int wanted, int hidden, int vocab, int tiles,
                   int chunks, int group_blocks, float eps) {
  DYNAMIC_SHARED(u16, staged);  // [column][staged_stride]
  SHARED(NormPartials, squares, );
  SHARED(u64, keys, [WARPS][COLUMNS]);
  const int groups = (wanted + COLUMNS - 1) / COLUMNS;
  const int first = blockIdx.x % groups * COLUMNS, count = min(wanted - first, COLUMNS);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const int tile = blockIdx.x / groups * WARPS + warp;

  // A warp past the last tile has no chunks.
  const int share = tile < tiles ? chunks : 0;
  const Tile view = tile_at(weights, tiles, chunks, group_blocks, tile);
  const int stride = staged_stride(hidden);
  const u16* row_g = staged + min(g, count - 1) * stride;
  Walk<1, DEPTH, Space::SHARED> walk(view, row_g, share, group_blocks, 0);
  const NormRows source = {x, rows, first, hidden};
  normalise(source, count, norm_weight, eps, staged, stride, squares);
  __syncthreads();

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  walk.multiply(sum);

  // Not unrolled: a draw is long, and registers are few.
#pragma unroll 1
  for (int j = 0; j < 2; ++j) {
    const int column = 2 * t + j, r = first + column;
    const bool present = column < count, drawn = present && rows[r] >= 0;
    u64 key = KEY_NONE;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int token = tile * TILE_ROWS + half * 8 + g;
      const float logit = half ? (j ? sum[3] : sum[2]) : (j ? sum[1] : sum[0]);
      if (token >= vocab) continue;
      if (logits && present) logits[(u64)r * vocab + token] = drawn ? logit : 0.f;
      if (best && drawn) {
        const u64 other = sampling_key(logit, temperature[r], seed[r], choice[r], positions[r], (u32)token);
        key = other > key ? other : key;
      }
    }
#pragma unroll
    for (int offset = 4; offset < WARP; offset *= 2) {  // over g
      const u64 other = __shfl_xor_sync(0xFFFFFFFFu, key, offset);
      key = other > key ? other : key;
    }
    if (g == 0) keys[warp][column] = key;
  }
  if (!best) return;
  __syncthreads();
  if (threadIdx.x < count) {
    u64 key = KEY_NONE;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) key = keys[w][threadIdx.x] > key ? keys[w][threadIdx.x] : key;
    if (key != KEY_NONE) atomicMax(best + first + threadIdx.x, key);
  }
}
