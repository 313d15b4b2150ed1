// out[T, N] (=|+=) a W^T + bias for prefill, of packed weights in any row order.
#include "gemm.cuh"

typedef Shape<192, 64, 4> Narrow;

template <class Shape>
DEVICE void product(typename Shape::Ring& ring, const Matrix& matrix, const int* order, const float* bias,
                    const uint4* a, float* out, int count, int rows, int accumulate) {
  const int first_tile = warp_tile<Shape>(blockIdx.y), first = blockIdx.x * Shape::TOKENS;
  const Tokens tokens = {a, nullptr, first, min(count - first, Shape::TOKENS)};
  Sums<Shape::TOKENS> sums;
  multiply<Shape>(sums, ring, matrix, first_tile, tokens);
  store_rows(sums, matrix, first_tile, tokens.count, rows, order, bias, out + (u64)first * rows,
             accumulate != 0);
}

// A block has 192 packed rows and 64 tokens, a warp 32 of the rows; a thread copies a share of the tokens'
// operands. Neighbouring blocks differ in their tokens: they read the same weights at about the same time.
extern "C" __global__ void __launch_bounds__(Narrow::THREADS, 2)
    linear(const u8* __restrict__ matrix, const int* __restrict__ order, const float* __restrict__ bias,
           const uint4* __restrict__ a, float* __restrict__ out, int count, int rows, int tiles, int chunks,
           int group_blocks, int accumulate) {
  SHARED(Narrow::Ring, ring, );
  product<Narrow>(ring, {matrix, tiles, chunks, group_blocks}, order, bias, a, out, count, rows, accumulate);
}

#if defined(WEIGHTS_DENSE)
typedef Shape<128, 128, 3> Wide;

// The same with 128 rows and 128 tokens: a quarter less to read for the same sums, if blocks are enough.
extern "C" __global__ void __launch_bounds__(Wide::THREADS, 2)
    linear_wide(const u8* __restrict__ matrix, const int* __restrict__ order, const float* __restrict__ bias,
                const uint4* __restrict__ a, float* __restrict__ out, int count, int rows, int tiles,
                int chunks, int group_blocks, int accumulate) {
  SHARED(Wide::Ring, ring, );
  product<Wide>(ring, {matrix, tiles, chunks, group_blocks}, order, bias, a, out, count, rows, accumulate);
}
#endif
