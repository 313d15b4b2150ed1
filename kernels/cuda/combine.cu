// x += the weighted sum of each token's experts.
#include "ptx.cuh"

constexpr int THREADS = 256;
constexpr int MAX_CHOICES = 8;

DEVICE void add_product(float4& sum, float weight, const float4& v) {
  sum.x = fmaf(weight, v.x, sum.x);
  sum.y = fmaf(weight, v.y, sum.y);
  sum.z = fmaf(weight, v.z, sum.z);
  sum.w = fmaf(weight, v.w, sum.w);
}

// A block has 1024 columns of one token, a thread four of them; experts are added in order of choice.
extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const float4* __restrict__ y, const int* __restrict__ place, const float* __restrict__ weights,
            float4* __restrict__ x, int quads, int choices) {
  const int token = blockIdx.x, column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= quads) return;
  float4 v[MAX_CHOICES];
#pragma unroll
  for (int j = 0; j < MAX_CHOICES; ++j) {
    v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (j < choices) {
      const int p = __ldg(place + token * choices + j);
      if (p >= 0) v[j] = y[(u64)p * quads + column];
    }
  }
  const u64 here = (u64)token * quads + column;
  const float4 before = x[here];
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int j = 0; j < MAX_CHOICES; ++j)
    if (j < choices) add_product(sum, __ldg(weights + token * choices + j), v[j]);
  x[here] = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
}
