// Attention of one query per sequence over its paged keys and values, which several blocks share.
#include "kv.cuh"
#include "operands.cuh"

constexpr int WARPS = 4;
constexpr int HEADS = 8;              // query heads of a block
constexpr int QUADS = HEAD_DIM / 4;   // float4 of a head
constexpr int BLOCKS_PER_SPLIT = 16;  // 256 keys, four iterations of each warp
constexpr int EIGHTS = HEAD_DIM / 8;  // uint4 of a key or value

// Attention of eight heads over some of the keys: sum and total are relative to 2^maximum.
struct Part {
  float4 sum[HEADS * QUADS];  // operand order
  float maximum[HEADS];
  float total[HEADS];
};

struct Merged {
  float maximum, total;
  float4 sum;
};

// Adds parts to `start`; this thread's four columns are at `place`.
DEVICE Merged merge(const Part* parts, int count, int head, int place, Merged start) {
  Merged all = start;
  for (int i = 0; i < count; ++i) all.maximum = fmaxf(all.maximum, parts[i].maximum[head]);
  all.total *= exp2f(start.maximum - all.maximum);
  for (int i = 0; i < count; ++i) {
    const float share = exp2f(parts[i].maximum[head] - all.maximum);
    const float4 sum = parts[i].sum[place];
    all.total = fmaf(share, parts[i].total[head], all.total);
    all.sum.x = fmaf(share, sum.x, all.sum.x);
    all.sum.y = fmaf(share, sum.y, all.sum.y);
    all.sum.z = fmaf(share, sum.z, all.sum.z);
    all.sum.w = fmaf(share, sum.w, all.sum.w);
  }
  return all;
}

// Where a quad of a head is kept in shared memory: the eight lanes that store together meet no bank twice.
DEVICE int place_of(int head, int quad) { return head * QUADS + (quad ^ quad >> 3 ^ (head & 1) << 1); }

// The B operands of 16 keys: lane (g, t) has dimensions 8t .. 8t + 7 and 32 + 8t .. of the keys g and g + 8.
DEVICE void load_keys(uint4 (&k)[4], const uint4* block, int g, int t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) k[i] = load_once(block + (g + i / 2 * 8) * EIGHTS + i % 2 * 4 + t);
}

// Lane (g, t) has dimensions 8g .. 8g + 7 of the values 2t, 2t + 1, 2t + 8, 2t + 9. Those outside first ..
// last of the block are not read but zero: a weight of 0 does not silence a NaN.
DEVICE void load_values(uint4 (&v)[4], const uint4* block, int first, int last, int g, int t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 2 * t + i % 2 + i / 2 * 8;
    v[i] = token >= first && token <= last ? load_once(block + token * EIGHTS + g) : make_uint4(0, 0, 0, 0);
  }
}

// A block takes one split of one sequence's visible keys, for up to eight query heads of a key head; a warp
// takes 16 keys at a time, a thread what mma gives it. Rows 0 to 7 of an mma are the heads' queries, later
// their weights, rounded to 16 bits; rows 8 to 15 are what rounding left over, so that next to nothing is
// lost. Grid: most splits, key heads * groups of eight query heads, sequences.
extern "C" __global__ void __launch_bounds__(128, 4)
    attention_decode(const float* __restrict__ q, const uint4* __restrict__ keys,
                     const uint4* __restrict__ values, const int* __restrict__ table,
                     const int* __restrict__ positions, const float* __restrict__ sinks,
                     u16* __restrict__ out, Part* partial, u32* counters, int heads, int key_heads, int width,
                     int window) {
  SHARED(Part, parts, [WARPS]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int groups = gridDim.y / key_heads, key_head = blockIdx.y / groups;
  const int first_of_group = blockIdx.y % groups * HEADS, heads_per_key = heads / key_heads;
  const int first_head = key_head * heads_per_key + first_of_group;
  const int count = min(HEADS, heads_per_key - first_of_group);
  const u64 sequence = blockIdx.z;

  // In the merges a thread has four columns of a head.
  const int head = threadIdx.x / QUADS, quad = threadIdx.x % QUADS;
  uint2* to = reinterpret_cast<uint2*>(out + (sequence * heads + first_head + head) * HEAD_DIM) + quad;

  const int position = positions[sequence];
  if (position < 0) {
    if (blockIdx.x == 0 && head < count) *to = make_uint2(0, 0);
    return;
  }

  // How many splits there are depends on nothing but the visible keys, and none is empty.
  const int first = window > 0 ? max(0, position - window + 1) : 0;
  const int first_block = first / BLOCK_TOKENS, blocks = position / BLOCK_TOKENS + 1 - first_block;
  const int splits = min((int)gridDim.x, (blocks + BLOCKS_PER_SPLIT - 1) / BLOCKS_PER_SPLIT);
  const int split = blockIdx.x;
  if (split >= splits) return;
  const int even = blocks / splits, larger = blocks - even * splits;  // the first splits have one block more
  const int begin = first_block + even * split + min(split, larger);
  const int end = begin + even + (split < larger);

  const int* pages = table + sequence * width;
  uint4 k[4], v[4];
  int i = begin + warp, page = 0;
  if (i < end) {
    page = pages[i];
    const u64 offset = kv_offset(page, key_heads, key_head, 0) / 8;
    load_keys(k, keys + offset, g, t);
    load_values(v, values + offset, first - i * BLOCK_TOKENS, position - i * BLOCK_TOKENS, g, t);
    page = pages[min(i + WARPS, end - 1)];
  }

  u32 q_rounded[8], q_rest[8];  // dimensions 8t .. 8t + 7 and 32 + 8t .. of head g
  const float4* query = reinterpret_cast<const float4*>(q + (sequence * heads + first_head + g) * HEAD_DIM);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float4 x = g < count ? query[j / 2 * 8 + 2 * t + j % 2] : make_float4(0.f, 0.f, 0.f, 0.f);
    split_kv(x.x, x.y, q_rounded[2 * j], q_rest[2 * j]);
    split_kv(x.z, x.w, q_rounded[2 * j + 1], q_rest[2 * j + 1]);
  }

  // The sink is a logit without a value; it takes part in the last merge, once.
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
  const Merged sink = {head < count ? sinks[first_head + head] * LOG2_E : 0.f, 1.f, zero};

  float sum[8][4] = {};  // sum[j]: dimensions 16t + j and 16t + 8 + j of head g, then their rests
  float maximum = minus_infinity(), total = 0.f;
  for (; i < end; i += WARPS) {
    float s[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 b = k[2 * half + j];
        mma_kv(s[half], q_rounded[4 * j], q_rest[4 * j], q_rounded[4 * j + 1], q_rest[4 * j + 1], b.x, b.y);
        mma_kv(s[half], q_rounded[4 * j + 2], q_rest[4 * j + 2], q_rounded[4 * j + 3], q_rest[4 * j + 3], b.z,
               b.w);
      }
    }

    // The next keys travel while these are weighed; the next values follow when these are done with.
    const int next = i + WARPS;
    const u64 offset = kv_offset(page, key_heads, key_head, 0) / 8;
    if (next < end) {
      load_keys(k, keys + offset, g, t);
      page = pages[min(next + WARPS, end - 1)];
    }

    float largest = minus_infinity();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = i * BLOCK_TOKENS + half * 8 + 2 * t + e;
        const bool visible = key >= first && key <= position;
        s[half][e] = visible ? (s[half][e] + s[half][e + 2]) * SCORE_SCALE : minus_infinity();
        largest = fmaxf(largest, s[half][e]);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    largest = fmaxf(largest, maximum);  // not infinite: some key of every block is visible
    const float kept = exp2f(maximum - largest);
    maximum = largest;
    total *= kept;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[half][e] = exp2f(s[half][e] - maximum);
        total += s[half][e];
      }
    }

    u32 rounded[2], rest[2];
    split_kv(s[0][0], s[0][1], rounded[0], rest[0]);
    split_kv(s[1][0], s[1][1], rounded[1], rest[1]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] *= kept;
      const u32 pick = j % 2 ? 0x7632u : 0x5410u;
      mma_kv(sum[j], rounded[0], rest[0], rounded[1], rest[1],
             __byte_perm(word(v[0], j / 2), word(v[1], j / 2), pick),
             __byte_perm(word(v[2], j / 2), word(v[3], j / 2), pick));
    }
    if (next < end)
      load_values(v, values + offset, first - next * BLOCK_TOKENS, position - next * BLOCK_TOKENS, g, t);
  }
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);

#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = sum[j][e] + sum[j][e + 2];
    parts[warp].sum[place_of(g, 4 * t + 2 * e)] = make_float4(x[0], x[4], x[1], x[5]);
    parts[warp].sum[place_of(g, 4 * t + 2 * e + 1)] = make_float4(x[2], x[6], x[3], x[7]);
  }
  if (t == 0) {
    parts[warp].maximum[g] = maximum;
    parts[warp].total[g] = total;
  }
  __syncthreads();

  Merged all;
  if (splits == 1) {
    all = merge(parts, WARPS, head, place_of(head, quad), sink);
  } else {
    const u64 group = sequence * gridDim.y + blockIdx.y;
    Part* mine = partial + group * gridDim.x + split;
    const Merged nothing = {minus_infinity(), 0.f, zero};
    all = merge(parts, WARPS, head, place_of(head, quad), nothing);
    mine->sum[threadIdx.x] = all.sum;
    if (quad == 0) {
      mine->maximum[head] = all.maximum;
      mine->total[head] = all.total;
    }
    // Warps meet only their like in other blocks, each having two heads; the last to come merges these.
    // The counter is then 0 again by itself.
    __threadfence();
    __syncwarp();
    u32 before = 0;
    if (lane == 0) before = atomicInc(counters + group * WARPS + warp, splits - 1);
    before = __shfl_sync(~0u, before, 0);
    if ((int)before != splits - 1) return;
    __threadfence();
    all = merge(partial + group * gridDim.x, splits, head, threadIdx.x, sink);
  }
  const float factor = 1.f / all.total;
  if (head < count)
    *to = make_uint2(pack_operands(all.sum.x * factor, all.sum.y * factor),
                     pack_operands(all.sum.z * factor, all.sum.w * factor));
}
