// Kernels that are wrong, each in one way, for test_emulator.py: the emulator must say which.
#include "ptx.cuh"

extern "C" __global__ void two_barriers(int* x) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  x[threadIdx.x] = 1;
}

extern "C" __global__ void exited_at_barrier(int* x) {  // allowed: who is gone need not come
  if (threadIdx.x >= 32) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}

extern "C" __global__ void lane_exited(int* x) {
  if (threadIdx.x == 3) return;
  x[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

extern "C" __global__ void lane_at_barrier(int* x) {
  if (threadIdx.x == 3) __syncthreads();
  x[threadIdx.x] = (int)__ballot_sync(0xFFFFFFFFu, 1);
}

extern "C" __global__ void other_collective(int* x) {
  if (threadIdx.x == 3)
    __syncwarp();
  else
    x[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

extern "C" __global__ void not_in_mask(int* x) { x[threadIdx.x] = __shfl_xor_sync(0x0000FFFFu, 1, 1); }

extern "C" __global__ void read_at(const int* x, int* y, int index) { y[threadIdx.x] = x[index]; }

extern "C" __global__ void write_at(int* x, int index) { x[index] = 1; }

extern "C" __global__ void add_at(int* x, int index) { atomicAdd(&x[index], 1); }

extern "C" __global__ void read_words(const u8* x, uint4* y, int offset) {
  y[threadIdx.x] = *reinterpret_cast<const uint4*>(x + offset);
}

extern "C" __global__ void write_shared(int* y, int index) {
  SHARED(int, first, [8]);
  SHARED(int, second, [8]);
  int* p = first;
  p[index] = second[0] = 1;
  __syncthreads();
  y[threadIdx.x] = first[0];
}

extern "C" __global__ void write_dynamic(int* y, int index) {
  DYNAMIC_SHARED(int, values);
  values[index] = 1;
  y[threadIdx.x] = values[0];
}

extern "C" __global__ void shift_by(int* y, int by) { y[threadIdx.x] = 1 << by; }
