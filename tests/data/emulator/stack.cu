// Needs more local memory than a thread has.
extern "C" __global__ void stack(int* y, int index) {
  volatile char local[200000];
  local[index] = 1;
  __syncthreads();
  y[threadIdx.x] = local[index];
}
