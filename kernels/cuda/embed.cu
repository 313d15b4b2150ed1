// Looks tokens up in the embedding table, and turns positions into the cosines and sines of rotation.
#include "ptx.cuh"
#include "table.cuh"

constexpr int THREADS = 128;
constexpr int PAIRS = 32;  // that rotate together in a head of 64

DEVICE float widen(u16 bits, int type) { return type == FP16 ? half_to_float(bits) : bf16_to_float(bits); }

// The i-th of a table's scales. The smallest of E8M0, 2^-127, may count as zero: float32 arithmetic flushes
// it.
DEVICE float read_scale(u64 scales, u64 i, int type) {
  if (type != E8M0) return widen(reinterpret_cast<const u16*>(scales)[i], type);
  const u32 byte = reinterpret_cast<const u8*>(scales)[i];
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23);
}

// An E2M1 code times a scale: as fp16 its bits are code * 2^-14, subnormals included.
DEVICE float scaled(u32 code, float scale) {
  return half_to_float((u16)((code & 8) << 12 | (code & 7) << 9)) * 16384.f * scale;
}

// Columns 4 i to 4 i + 3 of a token's row of `quads` times four.
DEVICE float4 read_four(u64 table, u64 scales, u64 token, int i, int quads, int type, int scale_type,
                        int group) {
  const u64 at = token * quads + i;
  if (type == FLOAT32) return reinterpret_cast<const float4*>(table)[at];
  if (type == INT8 || type == MXFP4) {
    const float scale = read_scale(scales, token * (quads * 4 / group) + i * 4 / group, scale_type);
    if (type == MXFP4) {
      const u32 codes = reinterpret_cast<const u16*>(table)[at];
      return make_float4(scaled(codes, scale), scaled(codes >> 4, scale), scaled(codes >> 8, scale),
                         scaled(codes >> 12, scale));
    }
    const u32 codes = reinterpret_cast<const u32*>(table)[at];
    return make_float4((float)((int)(codes << 24) >> 24) * scale, (float)((int)(codes << 16) >> 24) * scale,
                       (float)((int)(codes << 8) >> 24) * scale, (float)((int)codes >> 24) * scale);
  }
  const uint2 bits = reinterpret_cast<const uint2*>(table)[at];
  return make_float4(widen((u16)bits.x, type), widen((u16)(bits.x >> 16), type), widen((u16)bits.y, type),
                     widen((u16)(bits.y >> 16), type));
}

// cos and sin of an angle of 0 to 2^17 or so, in double: a long way round would need local memory, and one
// warp per token can afford it. The polynomials are Taylor's, whose next terms are below 1e-11 at pi / 4.
DEVICE void cosine_sine(float angle, double& cosine, double& sine) {
  constexpr double HALF_PI = 1.5707963267948966;
  const int quadrant = (int)((double)angle * (1 / HALF_PI) + 0.5);
  const double x = (double)angle - quadrant * HALF_PI, y = x * x;
  const double s = x * (1 - y / 6 * (1 - y / 20 * (1 - y / 42 * (1 - y / 72 * (1 - y / 110)))));
  const double c = 1 - y / 2 * (1 - y / 12 * (1 - y / 30 * (1 - y / 56 * (1 - y / 90 * (1 - y / 132)))));
  cosine = quadrant & 1 ? s : c;
  sine = quadrant & 1 ? c : s;
  if ((quadrant + 1) & 2) cosine = -cosine;
  if (quadrant & 2) sine = -sine;
}

// A block makes one row of x, a thread four columns at a time; its first warp makes the row of angles.
// table, scales: addresses on the device or in pinned host memory; `group` columns of a row share a scale, in
// a table that has any. Token -1 - r is the r-th of `drawn`: what the step before drew, which the host need
// not know yet.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(u64 table, u64 scales, const int* __restrict__ tokens, const int* __restrict__ drawn,
          const int* __restrict__ positions, const float* __restrict__ inv_freq, float* __restrict__ x,
          float* __restrict__ angles, int hidden, int type, int scale_type, int group, float concentration) {
  const int t = blockIdx.x, quads = hidden / 4, position = positions[t];
  const bool empty = position < 0;
  const int given = empty ? 0 : tokens[t];
  const u64 token = given < 0 ? drawn[-1 - given] : given;
  float4* out = reinterpret_cast<float4*>(x + (u64)t * hidden);
  for (int i = threadIdx.x; i < quads; i += THREADS) {
    out[i] = empty ? make_float4(0.f, 0.f, 0.f, 0.f)
                   : read_four(table, scales, token, i, quads, type, scale_type, group);
  }
  if (threadIdx.x < PAIRS) {
    double cosine = 0, sine = 0;
    if (!empty) cosine_sine((float)position * inv_freq[threadIdx.x], cosine, sine);  // a float32 product
    angles[(u64)t * 2 * PAIRS + threadIdx.x] = (float)(cosine * concentration);
    angles[(u64)t * 2 * PAIRS + PAIRS + threadIdx.x] = (float)(sine * concentration);
  }
}
