// The core of every product of prefill: a strip of packed weight rows by a tile of tokens, on tensor cores.
//
// D^T (rows x tokens) = W (rows x K) X^T. Weights are the A operand: each warp loads its own 32 rows in
// fragment order from global memory straight into registers, half a chunk ahead, and decodes them there once
// for all the tokens of the tile. Tokens are B: operand rows come through a ring of stages in shared memory,
// a chunk each. A sum runs over K in one order whatever the tile, so a token's result is its own.
#pragma once
#include "weights.cuh"

constexpr int WARP_TILES = 2;  // of 16 rows, that one warp multiplies
constexpr int UNITS = 8;       // 16-byte units in a row of a stage: 64 columns
constexpr int MMA_TOKENS = 8;  // tokens that one mma takes

// A packed matrix as the kernels are told of it.
struct Matrix {
  const u8* data;
  int tiles, chunks, group_blocks;
};

// Which rows of x a block multiplies: `count` rows from `first`, through `order` unless it is null.
struct Tokens {
  const uint4* x;
  const int* order;
  int first, count;
};

// The form of a block: its threads, the tokens it multiplies, the stages of its ring.
template <int THREADS_, int TOKENS_, int STAGES_>
struct Shape {
  static constexpr int THREADS = THREADS_, TOKENS = TOKENS_, STAGES = STAGES_;
  static constexpr int ROWS = THREADS / WARP * WARP_TILES * TILE_ROWS;  // of the matrix
  static constexpr int PASS = THREADS / UNITS;                          // token rows that it copies at once
  static constexpr int LINES = (TOKENS + PASS - 1) / PASS * PASS;       // of a stage: whole passes
  static constexpr int FEWEST = TOKENS / (TOKENS > 64 ? 2 : 4);         // that a smaller tile counts as
  static_assert(PASS % 2 == 0, "the rows that a thread copies are all even or all odd");

  struct Ring {
    uint4 stage[STAGES][LINES][UNITS];
  };
};

// The first row tile of this warp in block `block` of the matrix.
template <class Shape>
DEVICE int warp_tile(int block) {
  return (block * (Shape::THREADS / WARP) + (int)threadIdx.x / WARP) * WARP_TILES;
}

// Where a row of a stage keeps a unit: every other row has its halves swapped, so that the 8 lanes (g, t) and
// (g + 1, t) that one read of 16 bytes serves together meet all the banks.
DEVICE int unit_at(int row, int unit) { return unit ^ (row & 1) << 2; }

// What a warp has summed: d[i][n] is mma's D for its tile i and the tokens 8 n to 8 n + 7.
template <int TOKENS>
struct Sums {
  float d[WARP_TILES][TOKENS / MMA_TOKENS][4];
};

// Adds the product of a block of weights, decoded, with the first 8 COLUMNS tokens of a stage.
template <int COLUMNS, int TOKENS>
DEVICE void multiply_block(Sums<TOKENS>& sums, const u32 (&a)[WARP_TILES][8], int block,
                           const uint4 (*stage)[UNITS]) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const uint4* tokens = &stage[g][unit_at(g, 4 * block + t)];
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    const uint4 x = tokens[n * MMA_TOKENS * UNITS];
#pragma unroll
    for (int i = 0; i < WARP_TILES; ++i) {
      mma(sums.d[i][n], a[i][0], a[i][4], a[i][1], a[i][5], x.x, x.y);
      mma(sums.d[i][n], a[i][2], a[i][6], a[i][3], a[i][7], x.z, x.w);
    }
  }
}

// Each warp sums its tiles over all of K for the first 8 COLUMNS tokens, or for half of them if that is all.
template <class Shape, int COLUMNS>
DEVICE void multiply_columns(Sums<Shape::TOKENS>& sums, typename Shape::Ring& ring, const Matrix& matrix,
                             int first_tile, const Tokens& tokens) {
  if constexpr (COLUMNS * MMA_TOKENS > Shape::FEWEST) {
    if (tokens.count <= COLUMNS / 2 * MMA_TOKENS) {
      multiply_columns<Shape, COLUMNS / 2>(sums, ring, matrix, first_tile, tokens);
      return;
    }
  }
  constexpr int STAGES = Shape::STAGES, PASS = Shape::PASS;
  constexpr int PASSES = (COLUMNS * MMA_TOKENS + PASS - 1) / PASS;
  const int chunks = matrix.chunks, unit = threadIdx.x % UNITS, line = threadIdx.x / UNITS;

  Tile tile[WARP_TILES];
  Chunk weights[WARP_TILES];
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i) {
    const int row_tile = min(first_tile + i, matrix.tiles - 1);
    tile[i] = tile_at(matrix.data, matrix.tiles, chunks, matrix.group_blocks, row_tile);
    load_chunk(weights[i], tile[i], 0, matrix.group_blocks);
  }

  u32 source[PASSES];  // the unit of x that this thread copies next, for each of its rows
#pragma unroll
  for (int p = 0; p < PASSES; ++p) {
    const int r = p * PASS + line;
    // Rows past the last are not read, but only where nothing is looked up may they be named.
    const int place = tokens.first + (r < tokens.count || !tokens.order ? r : 0);
    source[p] = (u32)(tokens.order ? __ldg(tokens.order + place) : place) * (chunks * UNITS) + unit;
  }
  uint4* target = &ring.stage[0][line][unit_at(line, unit)];
  auto fill = [&](int slot) {
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
      copy_async(target + (slot * Shape::LINES + p * PASS) * UNITS, tokens.x + source[p],
                 p * PASS + line < tokens.count);
      source[p] += UNITS;
    }
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < chunks) fill(s);
    copy_async_commit();
  }

  int slot = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this chunk's stage is filled, and nobody reads the stage before it any more
    if (chunk + STAGES - 1 < chunks) fill(slot == 0 ? STAGES - 1 : slot - 1);
    copy_async_commit();
    // The next weights go into the same registers as soon as these are free: a second set would be spilled.
    // Dense ones are multiplied where they lie, the others decoded elsewhere first.
    const bool more = chunk + 1 < chunks;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      u32 a[WARP_TILES][8];
#pragma unroll
      for (int i = 0; i < WARP_TILES; ++i) decode_block(weights[i], block, a[i]);
#if !defined(WEIGHTS_DENSE)
      if (block == 1 && more) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) load_chunk(weights[i], tile[i], chunk + 1, matrix.group_blocks);
      }
#endif
      multiply_block<COLUMNS>(sums, a, block, ring.stage[slot]);
#if defined(WEIGHTS_DENSE)
      if (more) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) load_block(weights[i], tile[i], chunk + 1, block);
      }
#endif
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
}

// Sums the product of the block's rows and tokens; a tile with few tokens does not multiply the empty ones.
template <class Shape>
DEVICE void multiply(Sums<Shape::TOKENS>& sums, typename Shape::Ring& ring, const Matrix& matrix,
                     int first_tile, const Tokens& tokens) {
  constexpr int COLUMNS = Shape::TOKENS / MMA_TOKENS;
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i)
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.d[i][n][j] = 0.f;
  multiply_columns<Shape, COLUMNS>(sums, ring, matrix, first_tile, tokens);
}

// The natural row that a lane's sums d[i][..][2 half] and [2 half + 1] are of, -1 for padding: order names it
// for each packed row, and where that is null the two are the same.
DEVICE int natural_row(const Matrix& matrix, const int* __restrict__ order, int rows, int tile, int half) {
  const int packed = tile * TILE_ROWS + 8 * half + threadIdx.x % WARP / 4;
  const int row = !order ? packed : tile < matrix.tiles ? __ldg(order + packed) : -1;
  return row < rows ? row : -1;
}

// out[token][natural row] (+)= sum + bias. Lanes with the same token have 8 rows in turn, so that a store
// fills sectors of 32 bytes.
template <int TOKENS>
DEVICE void store_rows(Sums<TOKENS>& sums, const Matrix& matrix, int first_tile, int count, int rows,
                       const int* __restrict__ order, const float* __restrict__ bias, float* __restrict__ out,
                       bool accumulate) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < WARP_TILES; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = natural_row(matrix, order, rows, first_tile + i, half);
      if (row < 0) continue;
      float* column = out + (u64)(2 * t) * rows + row;
      if (accumulate) {  // all the loads before the first store, which they could not pass
#pragma unroll
        for (int n = 0; n < TOKENS / MMA_TOKENS; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (n * MMA_TOKENS + 2 * t + j < count)
              sums.d[i][n][2 * half + j] += column[(u64)(n * MMA_TOKENS + j) * rows];
      }
      const float shift = bias ? __ldg(bias + row) : 0.f;
#pragma unroll
      for (int n = 0; n < TOKENS / MMA_TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (n * MMA_TOKENS + 2 * t + j < count)
            column[(u64)(n * MMA_TOKENS + j) * rows] = sums.d[i][n][2 * half + j] + shift;
    }
  }
}
