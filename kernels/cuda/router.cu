// The router: RMSNorm, a product in float32, the k best experts of each token, softmax over just those.
#include "operands.cuh"
#include "philox.cuh"

constexpr int WARP = 32, WARPS = 8, THREADS = WARPS * WARP;
constexpr int TOKENS = 4;  // at most, per block: what a weight is read once for
constexpr int MAX_K = 8;

// Eight weights of a row, as they lie in memory: bf16, or float32.
template <bool FLOAT32>
struct Eight {
  uint4 words[FLOAT32 ? 2 : 1];
};

template <bool FLOAT32>
DEVICE void load_eight(Eight<FLOAT32>& r, const void* weights, u64 octet) {
  constexpr int VECTORS = FLOAT32 ? 2 : 1;
  const uint4* p = reinterpret_cast<const uint4*>(weights) + octet * VECTORS;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) r.words[i] = __ldg(p + i);
}

DEVICE void unpack_eight(const Eight<false>& from, float (&w)[8]) {
  const u32 pairs[4] = {from.words[0].x, from.words[0].y, from.words[0].z, from.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[2 * i] = __uint_as_float(pairs[i] << 16);
    w[2 * i + 1] = __uint_as_float(pairs[i] & 0xFFFF0000u);
  }
}

DEVICE void unpack_eight(const Eight<true>& from, float (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    w[4 * i] = __uint_as_float(from.words[i].x);
    w[4 * i + 1] = __uint_as_float(from.words[i].y);
    w[4 * i + 2] = __uint_as_float(from.words[i].z);
    w[4 * i + 3] = __uint_as_float(from.words[i].w);
  }
}

// Shared rows keep the first four of each eight columns apart from the last four, so that lanes which read
// neighbouring eights meet no bank conflict. Pointers to both halves of an eight of row t:
DEVICE float4* half_of(float* rows, int hidden, int t, int octet, int half) {
  return reinterpret_cast<float4*>(rows + t * hidden + half * (hidden / 2)) + octet;
}

// Normalises rows first .. first + count of x into shared memory; this block's share of them also goes to h.
// Every sum has the same order whatever the count: per thread, then a tree over its warp, then over warps.
DEVICE void normalise(const float* x, const float* norm_weight, const int* positions, u16* h, float* rows,
                      float (&squares)[TOKENS][WARPS], int hidden, float eps, int first, int count) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, octets = hidden / 8;
  float sums[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) sums[t] = 0.f;
#pragma unroll 1
  for (int o = threadIdx.x; o < octets; o += THREADS) {
    float4 values[TOKENS][2];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool valid = t < count && positions[first + t] >= 0;
        const float4* row = reinterpret_cast<const float4*>(x + (u64)(first + (t < count ? t : 0)) * hidden);
        values[t][half] = valid ? row[2 * o + half] : make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (t >= count) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = values[t][half];
        *half_of(rows, hidden, t, o, half) = v;
        sums[t] = fmaf(v.x, v.x, sums[t]);
        sums[t] = fmaf(v.y, v.y, sums[t]);
        sums[t] = fmaf(v.z, v.z, sums[t]);
        sums[t] = fmaf(v.w, v.w, sums[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) sums[t] += __shfl_xor_sync(0xFFFFFFFFu, sums[t], i);
    if (lane == 0) squares[t][warp] = sums[t];
  }
  __syncthreads();

  const int padded_octets = padded(hidden) / 8;
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += squares[t][w];
    const float scale = rsqrtf(sum / hidden + eps);
    uint4* out = reinterpret_cast<uint4*>(h) + (u64)(first + t) * padded_octets;
#pragma unroll 1
    for (int o = threadIdx.x; o < padded_octets; o += THREADS) {  // the eights that this thread stored above
      float y[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
      if (o < octets) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float4* value = half_of(rows, hidden, t, o, half);
          const float4 v = *value, w = __ldg(reinterpret_cast<const float4*>(norm_weight) + 2 * o + half);
          const float4 scaled =
              make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
          *value = scaled;
          y[4 * half] = scaled.x;
          y[4 * half + 1] = scaled.y;
          y[4 * half + 2] = scaled.z;
          y[4 * half + 3] = scaled.w;
        }
      }
      if (o % gridDim.x == blockIdx.x) out[o] = pack_eight(y);
    }
  }
  __syncthreads();
}

// The logits of this warp's experts for the block's tokens. A logit's sum has one order: eights in turn per
// lane, then a tree over the lanes.
template <bool FLOAT32, int EXPERTS>
DEVICE void multiply(const void* weights, const float* bias, const float* x, const float* norm_weight,
                     const int* positions, u16* h, float* logits, float* rows,
                     float (&squares)[TOKENS][WARPS], int hidden, int experts, float eps, int first,
                     int count) {
  constexpr int AHEAD = (EXPERTS == 1 ? 12 : 2) / (FLOAT32 ? 2 : 1);  // eights under way, per expert
  const int lane = threadIdx.x % WARP, octets = hidden / 8;
  const int expert = (blockIdx.x * WARPS + threadIdx.x / WARP) * EXPERTS;
  Eight<FLOAT32> loaded[EXPERTS][AHEAD];
  float sums[TOKENS][EXPERTS], shift[EXPERTS];
#pragma unroll
  for (int e = 0; e < EXPERTS; ++e) shift[e] = expert + e < experts ? __ldg(bias + expert + e) : 0.f;
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) sums[t][e] = 0.f;

  constexpr bool LOAD_FIRST = EXPERTS == 1;  // where there are blocks enough, others hide the wait
  if (!LOAD_FIRST) normalise(x, norm_weight, positions, h, rows, squares, hidden, eps, first, count);
#pragma unroll 1
  for (int base = 0; base < octets; base += AHEAD * WARP) {
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e)
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int o = base + i * WARP + lane;
        if (expert + e < experts && o < octets)
          load_eight(loaded[e][i], weights, (u64)(expert + e) * octets + o);
        else
          loaded[e][i] = {};
      }
    if (LOAD_FIRST && base == 0)
      normalise(x, norm_weight, positions, h, rows, squares, hidden, eps, first, count);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int o = base + i * WARP + lane;
      if (o >= octets) continue;
      float w[EXPERTS][8];
#pragma unroll
      for (int e = 0; e < EXPERTS; ++e) unpack_eight(loaded[e][i], w[e]);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        if (t >= count) continue;
        const float4 low = *half_of(rows, hidden, t, o, 0), high = *half_of(rows, hidden, t, o, 1);
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
          float part = w[e][0] * low.x;
          part = fmaf(w[e][1], low.y, part);
          part = fmaf(w[e][2], low.z, part);
          part = fmaf(w[e][3], low.w, part);
          part = fmaf(w[e][4], high.x, part);
          part = fmaf(w[e][5], high.y, part);
          part = fmaf(w[e][6], high.z, part);
          part = fmaf(w[e][7], high.w, part);
          sums[t][e] += part;
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    if (t >= count) continue;
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {
      float sum = sums[t][e];
#pragma unroll
      for (int i = WARP / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, i);
      if (lane == 0 && expert + e < experts) logits[(u64)(first + t) * experts + expert + e] = sum + shift[e];
    }
  }
}

// One warp: the k best of a token's logits, and their softmax. `keys` is the warp's own, `experts` long.
DEVICE void choose(const float* logits, u64* keys, int* ids, float* weights, int experts, int k, bool empty) {
  const int lane = threadIdx.x % WARP;
  u64 best = 0;  // of those that this lane looks after
#pragma unroll 1
  for (int e = lane; e < experts; e += WARP) {
    keys[e] = key_of(logits[e], e);
    best = max(best, keys[e]);
  }
  float values[MAX_K];
#pragma unroll
  for (int j = 0; j < MAX_K; ++j) {
    values[j] = 0.f;
    if (j >= k) continue;
    u64 winner = best;
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) winner = max(winner, __shfl_xor_sync(0xFFFFFFFFu, winner, i));
    values[j] = from_orderable((u32)(winner >> 32));
    if (lane == 0) ids[j] = empty ? -1 : (int)key_token(winner);
    if (best == winner) {  // keys differ: one lane
      keys[key_token(winner)] = 0;
      best = 0;
#pragma unroll 1
      for (int e = lane; e < experts; e += WARP) best = max(best, keys[e]);
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < MAX_K; ++j)
    if (j < k) sum += expf(values[j] - values[0]);
#pragma unroll
  for (int j = 0; j < MAX_K; ++j)
    if (j < k && lane == j) weights[j] = empty ? 0.f : expf(values[j] - values[0]) / sum;
}

// A block has WARPS * EXPERTS experts and up to `tokens` tokens, a warp EXPERTS experts. The last block of a
// group of tokens to finish chooses for them, a warp per token. router (E, hidden) is bf16 or float32. The
// blocks meet in logits (T, E) and counters (groups,), which begin and end as zero.
template <int EXPERTS>
DEVICE void route_tokens(const float* x, const float* norm_weight, const void* router, const float* bias,
                         const int* positions, u16* h, int* ids, float* weights, float* logits, u32* counters,
                         int T, int hidden, int experts, int k, int tokens, float eps, int router_f32) {
  DYNAMIC_SHARED(float, rows);
  SHARED(float, squares, [TOKENS][WARPS]);
  SHARED(u32, last, [1]);
  const int first = blockIdx.y * tokens, count = min(tokens, T - first), warp = threadIdx.x / WARP;
  if (router_f32)
    multiply<true, EXPERTS>(router, bias, x, norm_weight, positions, h, logits, rows, squares, hidden,
                            experts, eps, first, count);
  else
    multiply<false, EXPERTS>(router, bias, x, norm_weight, positions, h, logits, rows, squares, hidden,
                             experts, eps, first, count);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicInc(counters + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last[0] && warp < count) {
    const int t = first + warp;
    u64* keys = reinterpret_cast<u64*>(rows) + warp * experts;  // the rows are done with
    choose(logits + (u64)t * experts, keys, ids + (u64)t * k, weights + (u64)t * k, experts, k,
           positions[t] < 0);
  }
}

// For few tokens: a warp has one expert.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    route_few(const float* x, const float* norm_weight, const void* router, const float* bias,
              const int* positions, u16* h, int* ids, float* weights, float* logits, u32* counters, int T,
              int hidden, int experts, int k, int tokens, float eps, int router_f32) {
  route_tokens<1>(x, norm_weight, router, bias, positions, h, ids, weights, logits, counters, T, hidden,
                  experts, k, tokens, eps, router_f32);
}

// For many tokens: a warp has four experts, so that rows are normalised, and read from shared memory, less.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    route_many(const float* x, const float* norm_weight, const void* router, const float* bias,
               const int* positions, u16* h, int* ids, float* weights, float* logits, u32* counters, int T,
               int hidden, int experts, int k, int tokens, float eps, int router_f32) {
  route_tokens<4>(x, norm_weight, router, bias, positions, h, ids, weights, logits, counters, T, hidden,
                  experts, k, tokens, eps, router_f32);
}
