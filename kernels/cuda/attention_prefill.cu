// Causal attention of chunks of consecutive queries over their sequences' paged keys and values.
#include "kv.cuh"
#include "operands.cuh"

constexpr int ROWS = 64;  // of a block: 16 a warp
constexpr int STEP = 64;  // keys that pass through shared memory at a time
constexpr int EIGHTS = HEAD_DIM / 8;
constexpr float LOWEST = -1e30f;  // finite, so that a row that sees nothing of a step meets no inf - inf

// Where eight columns of a row are kept in shared memory: eight rows of a matrix meet no bank twice.
DEVICE int place_of(int row, int eight) { return row * EIGHTS + (eight ^ (row & 7)); }

// Starts the copy of one step's keys and values. Those outside first .. last are zeros, and neither they nor
// their table entries are read: a weight of 0 does not silence a NaN.
DEVICE void load_step(uint4* to_keys, uint4* to_values, const uint4* keys, const uint4* values,
                      const int* pages, int key_heads, int key_head, int start, int first, int last) {
  const int token = threadIdx.x / EIGHTS, eight = threadIdx.x % EIGHTS;
#pragma unroll
  for (int i = 0; i < STEP / BLOCK_TOKENS; ++i) {
    const int row = i * BLOCK_TOKENS + token, key = start + row;
    const bool valid = key >= first && key <= last;
    const int page = valid ? pages[key / BLOCK_TOKENS] : 0;
    const u64 offset = kv_offset(page, key_heads, key_head, token) / 8 + eight;
    copy_async(to_keys + place_of(row, eight), keys + offset, valid);
    copy_async(to_values + place_of(row, eight), values + offset, valid);
  }
  copy_async_commit();
}

// A block has 64 rows of a tile of consecutive queries; a row is one query head of one query, the heads that
// share a key head side by side, so that a few queries fill a block. A warp has 16 rows and goes through the
// visible keys 64 at a time. Grid: query heads per key head (a tile of 64 queries has so many blocks), key
// heads, tiles.
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_prefill(const float* __restrict__ q, const uint4* __restrict__ keys,
                      const uint4* __restrict__ values, const int* __restrict__ table,
                      const int* __restrict__ tiles, const float* __restrict__ sinks, u16* __restrict__ out,
                      int heads, int key_heads, int width, int window) {
  SHARED(uint4, shared_keys, [2][STEP * EIGHTS]);
  SHARED(uint4, shared_values, [2][STEP * EIGHTS]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int heads_per_key = heads / key_heads, key_head = blockIdx.y;

  // The last tiles have the most keys: they start first.
  const int* tile = tiles + 4 * (gridDim.z - 1 - blockIdx.z);
  const int sequence = tile[0], first_query = tile[1], position = tile[3];
  const int first_row = blockIdx.x * ROWS, rows = tile[2] * heads_per_key;
  if (first_row >= rows) return;
  const int* pages = table + (u64)sequence * width;

  int visible[2];   // the last key that rows g and g + 8 of this warp see
  u32 query[4][4];  // the A operands of 16 dimensions each
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first_row + 16 * warp + 8 * half + g, rows - 1), token = row / heads_per_key;
    visible[half] = position + token;
    const u64 head = (u64)(first_query + token) * heads + key_head * heads_per_key + row % heads_per_key;
    const float2* x = reinterpret_cast<const float2*>(q + head * HEAD_DIM) + t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 low = x[8 * i], high = x[8 * i + 4];
      query[i][half] = pack_kv(low.x, low.y);
      query[i][half + 2] = pack_kv(high.x, high.y);
    }
  }

  // Steps begin at multiples of 64 of the position: a row's sums do not depend on the tile that it is in.
  const int last_row = min(first_row + ROWS, rows) - 1;
  const int first_position = position + first_row / heads_per_key;
  const int last = position + last_row / heads_per_key;
  const int first = window > 0 ? max(0, first_position - window + 1) : 0;
  const int start = first / STEP * STEP;
  const int reach = window > 0 ? window : last + 1;  // a query sees so many keys, its own included

  float sum[8][4] = {};
  float maximum[2] = {LOWEST, LOWEST}, total[2] = {};
  load_step(shared_keys[0], shared_values[0], keys, values, pages, key_heads, key_head, start, first, last);
  for (int from = start; from <= last; from += STEP) {
    const int now = (from - start) / STEP % 2;
    copy_async_wait<0>();
    __syncthreads();  // this step has come, and every warp is done with the one before: its place is free
    if (from + STEP <= last)
      load_step(shared_keys[1 - now], shared_values[1 - now], keys, values, pages, key_heads, key_head,
                from + STEP, first, last);

    float s[8][4] = {};  // s[j]: keys 8j + 2t and + 1 of row g, then of row g + 8
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 b[4];
        const int key = 16 * j + lane / 16 * 8 + lane % 8;
        load_matrices(b, shared_keys[now] + place_of(key, 2 * i + lane / 8 % 2));
        mma_kv(s[2 * j], query[i][0], query[i][1], query[i][2], query[i][3], b[0], b[1]);
        mma_kv(s[2 * j + 1], query[i][0], query[i][1], query[i][2], query[i][3], b[2], b[3]);
      }
    }

    if (from + STEP - 1 > first_position || from <= last - reach) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int ahead = visible[e / 2] - (from + 8 * j + 2 * t + e % 2);
          if (ahead < 0 || ahead >= reach) s[j][e] = minus_infinity();
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = minus_infinity();
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      largest = fmaxf(largest * SCORE_SCALE, maximum[half]);
      const float kept = exp2f(maximum[half] - largest);
      maximum[half] = largest;
      total[half] *= kept;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[j][2 * half] *= kept;
        sum[j][2 * half + 1] *= kept;
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[j][e] = exp2f(fmaf(s[j][e], SCORE_SCALE, -largest));
          total[half] += s[j][e];
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&low)[4] = s[2 * i], (&high)[4] = s[2 * i + 1];
      const u32 a0 = pack_kv(low[0], low[1]), a1 = pack_kv(low[2], low[3]);
      const u32 a2 = pack_kv(high[0], high[1]), a3 = pack_kv(high[2], high[3]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 b[4];
        load_matrices_transposed(b, shared_values[now] + place_of(16 * i + lane % 16, 2 * j + lane / 16));
        mma_kv(sum[2 * j], a0, a1, a2, a3, b[0], b[1]);
        mma_kv(sum[2 * j + 1], a0, a1, a2, a3, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(~0u, total[half], 1);
    total[half] += __shfl_xor_sync(~0u, total[half], 2);
    const int row = first_row + 16 * warp + 8 * half + g;
    const int head = key_head * heads_per_key + row % heads_per_key;
    const float sink = sinks[head] * LOG2_E;
    const float largest = fmaxf(maximum[half], sink), kept = exp2f(maximum[half] - largest);
    const float factor = kept / fmaf(total[half], kept, exp2f(sink - largest));

    // Operand order puts columns four apart side by side: lanes t and t ^ 2 exchange half of theirs, and one
    // stores the even eights of columns, the other the odd ones.
    const u64 place = ((u64)(first_query + row / heads_per_key) * heads + head) * HEAD_DIM;
    uint2* to = reinterpret_cast<uint2*>(out + place) + t % 2;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      u32 packed[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float even = sum[j][2 * half + e] * factor, odd = sum[j + 1][2 * half + e] * factor;
        const float other = __shfl_xor_sync(~0u, t < 2 ? odd : even, 2);
        packed[e] = t < 2 ? pack_operands(even, other) : pack_operands(other, odd);
      }
      if (row < rows) to[2 * (j + t / 2)] = make_uint2(packed[0], packed[1]);
    }
  }
}
