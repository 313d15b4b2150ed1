// The yardstick of decode: memory read as fast as a plain kernel can, and nothing else done with it.
#include "ptx.cuh"

constexpr int THREADS = 512;
constexpr int AHEAD = 8;  // loads that a thread has under way

// Threads of the whole grid stride over `words`, 16 bytes each; what they add up is written where it could
// matter, so that no compiler leaves the reading out.
extern "C" __global__ void __launch_bounds__(THREADS)
    read_words(const uint4* __restrict__ words, u64 count, u32* __restrict__ sums) {
  const u64 stride = (u64)gridDim.x * THREADS;
  u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
  u32 sum = 0;
  for (; i + (AHEAD - 1) * stride < count; i += AHEAD * stride) {
    uint4 loaded[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) loaded[j] = words[i + j * stride];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) sum += loaded[j].x + loaded[j].y + loaded[j].z + loaded[j].w;
  }
  for (; i < count; i += stride) {
    const uint4 word = words[i];
    sum += word.x + word.y + word.z + word.w;
  }
  sums[(u64)blockIdx.x * THREADS + threadIdx.x] = sum;
}
