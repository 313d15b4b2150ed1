// Looks tokens up in the embedding table, and turns positions into the cosines and sines of rotation.
#include "ptx.cuh"
#include "table.cuh"

constexpr int THREADS = 128;
constexpr int PAIRS = 32;  // that rotate together in a head of 64

DEVICE float widen(u16 bits, int type) { return type == FP16 ? half_to_float(bits) : bf16_to_float(bits); }

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
// table: the address of a matrix on the device or in pinned host memory. Token -1 - r is the r-th of `drawn`:
// what the step before drew, which the host need not know yet.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(u64 table, const int* __restrict__ tokens, const int* __restrict__ drawn,
          const int* __restrict__ positions, const float* __restrict__ inv_freq, float* __restrict__ x,
          float* __restrict__ angles, int hidden, int type, float concentration) {
  const int t = blockIdx.x, quads = hidden / 4, position = positions[t];
  const bool empty = position < 0;
  const int given = empty ? 0 : tokens[t];
  const u64 row = (u64)(given < 0 ? drawn[-1 - given] : given) * quads;
  float4* out = reinterpret_cast<float4*>(x + (u64)t * hidden);
  for (int i = threadIdx.x; i < quads; i += THREADS) {
    float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
    if (!empty && type == FLOAT32) {
      value = reinterpret_cast<const float4*>(table)[row + i];
    } else if (!empty) {
      const uint2 bits = reinterpret_cast<const uint2*>(table)[row + i];
      value = make_float4(widen((u16)bits.x, type), widen((u16)(bits.x >> 16), type),
                          widen((u16)bits.y, type), widen((u16)(bits.y >> 16), type));
    }
    out[i] = value;
  }
  if (threadIdx.x < PAIRS) {
    double cosine = 0, sine = 0;
    if (!empty) cosine_sine((float)position * inv_freq[threadIdx.x], cosine, sine);  // a float32 product
    angles[(u64)t * 2 * PAIRS + threadIdx.x] = (float)(cosine * concentration);
    angles[(u64)t * 2 * PAIRS + PAIRS + threadIdx.x] = (float)(sine * concentration);
  }
}
