// RMSNorm of rows into operands in global memory: what prefill multiplies.
#include "norm.cuh"

// A block normalises one row: row rows[blockIdx.x] of x, or the block's own where `rows` is null.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    rms_norm(const float* __restrict__ x, const int* __restrict__ rows, const float* __restrict__ weight,
             u16* __restrict__ out, int hidden, float eps) {
  SHARED(NormPartials, partials, );
  const NormRows row = {x, rows, (int)blockIdx.x, hidden};
  normalise(row, 1, weight, eps, out + (u64)blockIdx.x * padded(hidden), 0, partials);
}
