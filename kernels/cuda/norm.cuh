// RMSNorm of rows of x into operands, by a block of 8 warps. Every sum has the same order whatever the number
// of rows: each thread over its own columns, a tree over its warp, then the warps in turn.
#pragma once
#include "operands.cuh"

constexpr int NORM_WARPS = 8, NORM_THREADS = 32 * NORM_WARPS;
constexpr int NORM_ROWS = 8;  // at most, per block
constexpr int EIGHT = 8;      // columns that a thread takes at a time

typedef float NormPartials[NORM_ROWS][NORM_WARPS];

// The rows of x that a block normalises: in sequence, or where `gather` says; -1 there stands for any row.
struct NormRows {
  const float* x;
  const int* gather;
  int first, hidden;

  DEVICE const float4* row(int r) const {
    const int index = gather ? max(gather[first + r], 0) : first + r;
    return reinterpret_cast<const float4*>(x + (u64)index * hidden);
  }
};

DEVICE float add_squares(float sum, float4 v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}

// The warp's sums of squares of N rows. AHEAD eights of each row are loaded together.
template <int N, int AHEAD>
DEVICE void sum_squares(const NormRows& rows, int first, NormPartials& partials) {
  const int lane = threadIdx.x % 32, eights = rows.hidden / EIGHT;
  const float4* row[N];
  float sums[N];
#pragma unroll
  for (int r = 0; r < N; ++r) {
    row[r] = rows.row(first + r);
    sums[r] = 0.f;
  }
#pragma unroll 1  // the registers are for weights
  for (int begin = threadIdx.x; begin < eights; begin += AHEAD * NORM_THREADS) {
    float4 values[AHEAD][N][2];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int eight = begin + i * NORM_THREADS;
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          values[i][r][half] = eight < eights ? row[r][2 * eight + half] : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) sums[r] = add_squares(sums[r], values[i][r][half]);
  }
#pragma unroll
  for (int r = 0; r < N; ++r) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sums[r] += __shfl_xor_sync(0xFFFFFFFFu, sums[r], offset);
    if (lane == 0) partials[first + r][threadIdx.x / 32] = sums[r];
  }
}

// Writes the operands of rows 0 .. count - 1 to `out`, `stride` apart, with zeros in the columns of padding.
// The block must wait before it reads them; all its threads call this.
DEVICE void normalise(const NormRows& rows, int count, const float* __restrict__ weight, float eps, u16* out,
                      u64 stride, NormPartials& partials) {
  int r = 0;
#pragma unroll 1
  for (; r + 2 <= count; r += 2) sum_squares<2, 1>(rows, r, partials);
  if (r < count) sum_squares<1, 2>(rows, r, partials);
  __syncthreads();

  // Squared, one over the size: a division would be a call, and cost the registers that hold weights.
  const float root = rsqrtf((float)rows.hidden);
  const int eights = rows.hidden / EIGHT, padded_eights = padded(rows.hidden) / EIGHT;
#pragma unroll 1
  for (r = 0; r < count; ++r) {
    float sum = partials[r][0];
#pragma unroll
    for (int w = 1; w < NORM_WARPS; ++w) sum += partials[r][w];
    const float inverse = rsqrtf(sum * root * root + eps);
    const float4* row = rows.row(r);
    uint4* to = reinterpret_cast<uint4*>(out + r * stride);
#pragma unroll 2
    for (int eight = threadIdx.x; eight < padded_eights; eight += NORM_THREADS) {
      if (eight >= eights) {
        to[eight] = make_uint4(0, 0, 0, 0);
        continue;
      }
      float y[EIGHT];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 v = row[2 * eight + half];
        const float4 w = __ldg(reinterpret_cast<const float4*>(weight) + 2 * eight + half);
        y[4 * half] = v.x * inverse * w.x;
        y[4 * half + 1] = v.y * inverse * w.y;
        y[4 * half + 2] = v.z * inverse * w.z;
        y[4 * half + 3] = v.w * inverse * w.w;
      }
      to[eight] = pack_eight(y);
    }
  }
}

// How far apart rows lie in shared memory: 64 mod 128 bytes, so that the 16-byte reads of lanes (g, t) at
// row g, eight t, meet no bank conflict.
DEVICE int staged_stride(int hidden) { return padded(hidden) + 32; }
