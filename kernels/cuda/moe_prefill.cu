// The two products of the experts in prefill, over tiles of up to 64 tokens that chose the same expert.
#include "gemm.cuh"
#include "swiglu.cuh"

typedef Shape<192, 64, 4> Block;
constexpr int BLOCKS = 2;  // at a time on a multiprocessor

// One tile of sorted places, all of the same expert. Kernels read it before and after the product rather than
// keep it: no register is to spare in between, and so its arrays are not __restrict__.
struct Group {
  int expert, first, count;
};

DEVICE Group group_at(const int* expert, const int* start, const int* rows) {
  return {expert[blockIdx.y], start[blockIdx.y], rows[blockIdx.y]};
}

DEVICE Matrix matrix_of(const u64* table, int expert, int tiles, int chunks, int group_blocks) {
  return {reinterpret_cast<const u8*>(table[expert]), tiles, chunks, group_blocks};
}

// A block has 192 packed rows and one tile of sorted tokens; a warp 32 of the rows, gates and ups in turn, so
// that a lane has both of a pair. A thread copies a share of the tokens' operands in, and of the result out.
// Neighbouring blocks differ in rows: those of one expert run together and share its weights.
extern "C" __global__ void __launch_bounds__(Block::THREADS, BLOCKS)
    moe_gate_up_prefill(const u64* __restrict__ table, const float* __restrict__ bias,
                        const uint4* __restrict__ h, const int* __restrict__ order, const int* tile_expert,
                        const int* tile_start, const int* tile_rows, const int* count, u16* __restrict__ out,
                        float limit, int intermediate, int tiles, int chunks, int group_blocks,
                        int bf16_out) {
  constexpr int COLUMNS = Block::ROWS / 2;  // of the result
  constexpr int STRIDE = COLUMNS + 8;       // meets all the banks
  constexpr int LINE = COLUMNS / 8;         // 16-byte units of a token
  typedef u16 Result[Block::TOKENS][STRIDE];
  SHARED(Block::Ring, ring, );
  static_assert(sizeof(Result) <= sizeof(Block::Ring), "the result takes the place of the stages");
  if ((int)blockIdx.y >= count[0]) return;
  Group group = group_at(tile_expert, tile_start, tile_rows);
  const int first_tile = warp_tile<Block>(blockIdx.x);
  const Matrix matrix = matrix_of(table, group.expert, tiles, chunks, group_blocks);
  Sums<Block::TOKENS> sums;
  multiply<Block>(sums, ring, matrix, first_tile, {h, order, group.first, group.count});

  __syncthreads();  // the stages have been read
  group = group_at(tile_expert, tile_start, tile_rows);
  Result& result = *reinterpret_cast<Result*>(&ring);
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, warp = threadIdx.x / WARP;
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i) {
    const int j = (first_tile + i) * 8 + g;
    float gate_bias = 0.f, up_bias = 0.f;
    if (j < intermediate) {
      const float* pair = bias + ((u64)group.expert * intermediate + j) * 2;
      gate_bias = pair[0];
      up_bias = pair[1];
    }
    u16* column = &result[0][(warp * WARP_TILES + i) * 8 + operand_index(g)];
#pragma unroll
    for (int n = 0; n < Block::TOKENS / MMA_TOKENS; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float inner = swiglu(sums.d[i][n][k] + gate_bias, sums.d[i][n][2 + k] + up_bias, limit);
        const int token = n * MMA_TOKENS + 2 * t + k;
        column[token * STRIDE] = bf16_out ? float_to_bf16(inner) : float_to_half(inner);
      }
    }
  }
  __syncthreads();
  const int line = min(LINE, tiles - (int)blockIdx.x * LINE);  // each tile of rows makes one unit
  uint4* target = reinterpret_cast<uint4*>(out) + (u64)group.first * tiles + blockIdx.x * LINE;
  for (int i = threadIdx.x; i < group.count * LINE; i += Block::THREADS) {
    const int token = i / LINE, unit = i % LINE;
    if (unit < line) target[(u64)token * tiles + unit] = *reinterpret_cast<uint4*>(&result[token][unit * 8]);
  }
}

// The same shape over the inner operands, which lie in sorted order already; a result float32 in that order.
extern "C" __global__ void __launch_bounds__(Block::THREADS, BLOCKS)
    moe_down_prefill(const u64* __restrict__ table, const float* __restrict__ bias,
                     const uint4* __restrict__ inner, const int* tile_expert, const int* tile_start,
                     const int* tile_rows, const int* count, float* __restrict__ y, int hidden, int tiles,
                     int chunks, int group_blocks) {
  SHARED(Block::Ring, ring, );
  if ((int)blockIdx.y >= count[0]) return;
  Group group = group_at(tile_expert, tile_start, tile_rows);
  const int first_tile = warp_tile<Block>(blockIdx.x);
  const Matrix matrix = matrix_of(table, group.expert, tiles, chunks, group_blocks);
  Sums<Block::TOKENS> sums;
  multiply<Block>(sums, ring, matrix, first_tile, {inner, nullptr, group.first, group.count});
  group = group_at(tile_expert, tile_start, tile_rows);
  store_rows(sums, matrix, first_tile, group.count, hidden, nullptr, bias + (u64)group.expert * hidden,
             y + (u64)group.first * hidden, false);
}
