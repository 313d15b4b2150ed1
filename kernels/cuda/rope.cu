// Rotary position embedding of projected rows, and the append of their keys and values to the cache.
#include "kv.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int QUADS = HALF / 4;  // threads a head takes

DEVICE float4 rotate(float4 a, float4 b, float4 cos, float4 sin) {  // a * cos + b * sin
  return make_float4(fmaf(a.x, cos.x, b.x * sin.x), fmaf(a.y, cos.y, b.y * sin.y),
                     fmaf(a.z, cos.z, b.z * sin.z), fmaf(a.w, cos.w, b.w * sin.w));
}

// A block rotates 16 heads of one row, a thread four pairs (i, i + 32) of a head. Grid: rows, heads / 16.
extern "C" __global__ void __launch_bounds__(128)
    rotate_append(const float* __restrict__ projected, const float* __restrict__ angles,
                  const int* __restrict__ sequences, const int* __restrict__ positions,
                  const int* __restrict__ table, u16* __restrict__ keys, u16* __restrict__ values,
                  float* __restrict__ q, int heads, int key_heads, int width) {
  const int row = blockIdx.x, all_heads = heads + 2 * key_heads;
  const int head = (blockIdx.y * 128 + threadIdx.x) / QUADS, quad = threadIdx.x % QUADS;
  if (head >= all_heads) return;
  const int position = positions[row];

  const float4* x = reinterpret_cast<const float4*>(projected + ((u64)row * all_heads + head) * HEAD_DIM);
  float4 low = x[quad], high = x[quad + QUADS];
  if (head < heads + key_heads) {
    const float4* angle = reinterpret_cast<const float4*>(angles + (u64)row * HEAD_DIM);
    const float4 cos = angle[quad], sin = angle[quad + QUADS];
    const float4 back = make_float4(-sin.x, -sin.y, -sin.z, -sin.w);
    const float4 turned = rotate(low, high, cos, back);
    high = rotate(high, low, cos, sin);
    low = turned;
  }

  if (head < heads) {
    float4* to = reinterpret_cast<float4*>(q + ((u64)row * heads + head) * HEAD_DIM);
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
    to[quad] = position < 0 ? zero : low;
    to[quad + QUADS] = position < 0 ? zero : high;
  } else if (position >= 0) {
    const int key_head = (head - heads) % key_heads;
    const int block = table[(u64)sequences[row] * width + position / BLOCK_TOKENS];
    u16* cache = head < heads + key_heads ? keys : values;
    uint2* to =
        reinterpret_cast<uint2*>(cache + kv_offset(block, key_heads, key_head, position % BLOCK_TOKENS));
    to[quad] = make_uint2(pack_kv(low.x, low.y), pack_kv(low.z, low.w));
    to[quad + QUADS] = make_uint2(pack_kv(high.x, high.y), pack_kv(high.z, high.w));
  }
}
