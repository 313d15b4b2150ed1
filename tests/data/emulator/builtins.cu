// What test_emulator.py compares with NumPy: one kernel for each family of builtins.
#include "ptx.cuh"

// One warp: d = a b + d `times` times, every lane with the words it was given.
extern "C" __global__ void product(const u32* a, const u32* b, float* d, int bf16, int times) {
  const int lane = threadIdx.x % 32;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[4 * lane + i];
  for (int n = 0; n < times; ++n) {
    const u32* x = a + 4 * lane;
    const u32* y = b + 2 * lane;
    if (bf16)
      mma_bf16(sums, x[0], x[1], x[2], x[3], y[0], y[1]);
    else
      mma_f16(sums, x[0], x[1], x[2], x[3], y[0], y[1]);
  }
  if (threadIdx.x < 32)
    for (int i = 0; i < 4; ++i) d[4 * lane + i] = sums[i];
}

// One warp: four 8 x 8 matrices through shared memory.
extern "C" __global__ void matrices(const uint4* rows, u32* out, int transposed) {
  SHARED(uint4, staged, [32]);
  staged[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  u32 r[4];
  if (transposed)
    load_matrices_transposed(r, &staged[threadIdx.x]);
  else
    load_matrices(r, &staged[threadIdx.x]);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

// One warp: out[n][lane] is what collective n gives the lane.
extern "C" __global__ void collectives(const int* x, int* out) {
  const int lane = threadIdx.x, value = x[lane];
  const u32 all = 0xFFFFFFFFu, half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  out[0 * 32 + lane] = __shfl_sync(all, value, 5);
  out[1 * 32 + lane] = __shfl_sync(all, value, lane * 7, 8);
  out[2 * 32 + lane] = __shfl_xor_sync(all, value, 9);
  out[3 * 32 + lane] = __shfl_up_sync(all, value, 3, 16);
  out[4 * 32 + lane] = __shfl_down_sync(all, value, 3, 16);
  out[5 * 32 + lane] = (int)__ballot_sync(all, value & 1);
  out[6 * 32 + lane] = __any_sync(half, value == 3);
  out[7 * 32 + lane] = __all_sync(half, value < 16);
  out[8 * 32 + lane] = (int)__reduce_add_sync(half, (u32)value);
  out[9 * 32 + lane] = __reduce_max_sync(all, value);
  out[10 * 32 + lane] = (int)__match_any_sync(all, value % 3);
  int sum = 0;  // masks that change from one collective to the next, while other lanes lag behind
  for (int n = 0; n < lane / 16 * 3 + 2; ++n) sum += __shfl_xor_sync(half, value + n, 1);
  out[11 * 32 + lane] = __shfl_sync(all, sum, 31 - lane);
}

// One thread: bits in, bits out.
extern "C" __global__ void bits(const u32* x, u32* out) {
  const u32 a = x[0], b = x[1], selector = x[2];
  out[0] = __byte_perm(a, b, selector);
  out[1] = (u32)__popc(a);
  out[2] = (u32)__clz((int)b);
  out[3] = (u32)__ffs((int)a);
  out[4] = __brev(a);
  out[5] = __umulhi(a, b);
  out[6] = and_or(a, b, selector);
  out[7] = mul_half2(x[3], x[4]);
  out[8] = add_half2(x[3], x[4]);
  out[9] = mul_bf162(x[5], x[6]);
}

// One thread per value.
extern "C" __global__ void conversions(const float* x, u16* halves, u16* bf16s, float* back, float* roots) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  halves[i] = float_to_half(x[i]);
  bf16s[i] = float_to_bf16(x[i]);
  back[i] = half_to_float(halves[i]) + bf16_to_float(bf16s[i]);
  roots[i] = rsqrtf(fmaxf(x[i], 1.f));
}

// Every thread of every block: one of each.
extern "C" __global__ void atomics(u32* counters, u64* largest, float* sum, int* indices) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&counters[0], i);
  atomicInc(&counters[1], 9);
  atomicMax(&counters[2], i * 2654435761u);
  atomicMax(largest, (u64)i << 40 | 7);
  atomicAdd(sum, 1.f);
  __threadfence();
  indices[3 * i] = (int)(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z);
  indices[3 * i + 1] = (int)threadIdx.x;
  indices[3 * i + 2] = (int)(gridDim.x + 10 * gridDim.y + 100 * gridDim.z + 1000 * blockDim.x);
}

// Values rise by a constant, and each thread takes what the thread at the other end of the block has.
extern "C" __global__ void __launch_bounds__(128) turn(const float* x, float* y, float add, int guarded) {
  SHARED(float, staged, [128]);
  staged[threadIdx.x] = x[threadIdx.x];
  if (guarded) __syncthreads();
  y[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x] + add;
}

// The order in which threads come by.
extern "C" __global__ void arrivals(u32* counter, u32* order) {
  order[atomicAdd(counter, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// 16 bytes per thread through shared memory, in two groups; waits for all but `pending` of them.
extern "C" __global__ void copies(const uint4* x, uint4* y, int pending) {
  DYNAMIC_SHARED(uint4, staged);
  const int i = threadIdx.x, n = blockDim.x;
  copy_async(&staged[i], &x[i], true);
  copy_async_commit();
  copy_async(&staged[n + i], &x[i], i % 2 == 0);
  copy_async_commit();
  if (pending == 0) copy_async_wait<0>();
  if (pending == 1) copy_async_wait<1>();
  y[i] = staged[i];
  y[n + i] = staged[n + i];
}
