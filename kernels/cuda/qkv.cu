// The first third of a layer in decode: RMSNorm, product with the qkv weights, bias, rotation, and the
// append of keys and values to the cache.
#include "decode.cuh"
#include "kv.cuh"
#include "norm.cuh"

constexpr int WARPS = NORM_WARPS;
constexpr int HALF = HEAD_DIM / 2;
constexpr int DEPTH = VECTORS == 4 ? 2 : 3;  // chunks under way in each warp: registers for three blocks

DEVICE u16 to_kv(float x) { return (u16)pack_kv(x, 0.f); }

// A block makes one tile, 8 pairs (i, i + 32) of one head, for up to 8 sequences: it normalises their x in
// shared memory, its warps split K, then a thread finishes one pair of one sequence.
extern "C" __global__ void __launch_bounds__(WARPS* WARP, 3)
    qkv_decode(const float* __restrict__ x, const float* __restrict__ norm_weight,
               const u8* __restrict__ weights, const float* __restrict__ bias,
               const float* __restrict__ angles, const int* __restrict__ positions,
               const int* __restrict__ table, u16* __restrict__ keys, u16* __restrict__ values,
               float* __restrict__ q, int sequences, int hidden, int heads, int key_heads, int width,
               int tiles, int chunks, int group_blocks, float eps) {
  DYNAMIC_SHARED(u16, staged);  // [column][staged_stride]
  SHARED(Partial, partials, [WARPS]);
  SHARED(NormPartials, squares, );
  const int groups = (sequences + COLUMNS - 1) / COLUMNS;
  const int tile = blockIdx.x / groups, first = blockIdx.x % groups * COLUMNS;
  const int count = min(sequences - first, COLUMNS);
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;

  // The weights are on their way while the block normalises.
  const Tile view = tile_at(weights, tiles, chunks, group_blocks, tile);
  const int stride = staged_stride(hidden);
  const u16* row_g = staged + min(g, count - 1) * stride;
  Walk<WARPS, DEPTH, Space::SHARED> walk(view, row_g, chunks, group_blocks, warp);
  const NormRows source = {x, nullptr, first, hidden};
  normalise(source, count, norm_weight, eps, staged, stride, squares);
  __syncthreads();

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  walk.multiply(sum);
  store_partial(partials[warp], sum);
  __syncthreads();

  const int column = threadIdx.x / 8, r = threadIdx.x % 8, s = first + column;
  if (column >= count) return;
  constexpr int HEAD_TILES = HEAD_DIM / TILE_ROWS;
  const int head = tile / HEAD_TILES, i = tile % HEAD_TILES * 8 + r, position = positions[s];
  float low = add_partials(partials, column, r) + bias[head * HEAD_DIM + i];
  float high = add_partials(partials, column, r + 8) + bias[head * HEAD_DIM + HALF + i];
  if (head < heads + key_heads) {
    const float cosine = angles[(u64)s * HEAD_DIM + i], sine = angles[(u64)s * HEAD_DIM + HALF + i];
    const float turned = fmaf(low, cosine, -high * sine);
    high = fmaf(high, cosine, low * sine);
    low = turned;
  }
  if (head < heads) {
    float* to = q + ((u64)s * heads + head) * HEAD_DIM;
    to[i] = position < 0 ? 0.f : low;
    to[HALF + i] = position < 0 ? 0.f : high;
  } else if (position >= 0) {
    const int block = table[(u64)s * width + position / BLOCK_TOKENS];
    u16* cache = head < heads + key_heads ? keys : values;
    u16* to = cache + kv_offset(block, key_heads, (head - heads) % key_heads, position % BLOCK_TOKENS);
    to[i] = to_kv(low);
    to[HALF + i] = to_kv(high);
  }
}
