// Weights from a checkpoint's form to fragment order, as layout.py packs them, byte for byte.
//
// `order` names the source row of each packed row of `tiles` tiles, -1 for padding, which is zeros. `codes`
// and `scales` point at the first of these tiles. Sources have a multiple of 32 columns, and so whole blocks.
#include "ptx.cuh"
#include "table.cuh"

constexpr int THREADS = 256, WARP = 32, TILE_ROWS = 16, CHUNK = 64, BLOCK = 32;

DEVICE int thread_index() { return blockIdx.x * THREADS + threadIdx.x; }

// The first of the 8 columns that lane 4 g + t holds of a block.
DEVICE int first_column(int chunk, int block, int lane) {
  return chunk * CHUNK + block * BLOCK + lane % 4 * 8;
}

DEVICE float read_float(const void* source, u64 i, int kind) {
  if (kind == FLOAT32) return reinterpret_cast<const float*>(source)[i];
  const u16 bits = reinterpret_cast<const u16*>(source)[i];
  return kind == FP16 ? half_to_float(bits) : bf16_to_float(bits);
}

DEVICE u16 read_bits(const void* source, u64 i, int kind, int bf16_out) {
  if (kind == (bf16_out ? BF16 : FP16)) return reinterpret_cast<const u16*>(source)[i];
  const float value = read_float(source, i, kind);
  return bf16_out ? float_to_bf16(value) : float_to_half(value);
}

// A thread packs the A operand of one mma: of eight columns, four of row g and four of row g + 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_dense(const void* __restrict__ source, const int* __restrict__ order, uint4* __restrict__ codes,
               int columns, int tiles, int chunks, int kind, int bf16_out) {
  const int i = thread_index(), lane = i % WARP, product = i / WARP % 2, block = i / (2 * WARP) % 2;
  const int chunk = i / (4 * WARP) % chunks, tile = i / (4 * WARP) / chunks;
  if (tile >= tiles) return;
  const int column = first_column(chunk, block, lane) + 2 * product;
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = order[tile * TILE_ROWS + half * 8 + lane / 4];
    if (row >= 0 && column < columns) {
      const u64 from = (u64)row * columns + column;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const u32 bits = read_bits(source, from + pair + 4 * high, kind, bf16_out);
          words[2 * pair + half] |= bits << 16 * high;
        }
      }
    }
  }
  codes[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

// A thread packs eight columns of rows g and g + 8, one 16-byte vector; those past the vectors pack two
// scales.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_int8(const u32* __restrict__ source, const void* __restrict__ source_scales,
              const int* __restrict__ order, uint4* __restrict__ codes, u32* __restrict__ scales, int columns,
              int tiles, int chunks, int groups, int units, int e8m0) {
  const int vectors = tiles * chunks * 2 * WARP;
  int i = thread_index();
  if (i < vectors) {
    const int lane = i % WARP, block = i / WARP % 2, chunk = i / (2 * WARP) % chunks;
    const int tile = i / (2 * WARP) / chunks, column = first_column(chunk, block, lane);
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = order[tile * TILE_ROWS + half * 8 + lane / 4];
      if (row >= 0 && column < columns) {
        const u64 from = ((u64)row * columns + column) / 4;
        const u32 low = source[from], high = source[from + 1];
        words[2 * half] = __byte_perm(low, high, 0x5140);
        words[2 * half + 1] = __byte_perm(low, high, 0x7362);
      }
    }
    constexpr u32 BIAS = 0x80808080u;  // codes + 128
    codes[i] = make_uint4(words[0] ^ BIAS, words[1] ^ BIAS, words[2] ^ BIAS, words[3] ^ BIAS);
    return;
  }
  i -= vectors;
  const int g = i % 8, unit = i / 8 % units, tile = i / 8 / units;
  if (tile >= tiles) return;
  u32 pair = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = order[tile * TILE_ROWS + half * 8 + g];
    if (row >= 0 && unit < groups) {
      const u64 from = (u64)row * groups + unit;
      u32 bits;
      if (e8m0) {  // a power of two to bf16; the smallest is not a normal number
        const u32 byte = reinterpret_cast<const u8*>(source_scales)[from];
        bits = byte == 0 ? 0x40u : byte << 7;
      } else {
        bits = reinterpret_cast<const u16*>(source_scales)[from];
      }
      pair |= bits << 16 * half;
    }
  }
  scales[i] = pair;
}

// Eight codes as the checkpoint has them, code i in bits 4 i to 4 i + 3 -> the word that unpack_word takes
// apart.
DEVICE u32 recode(u32 w) {
  u32 r = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 four = w >> 16 * half;
    const u32 signs = (four & 8) << 12 | (four & 0x80) << 5 | (four & 0x800) << 3 | (four & 0x8000) >> 2;
    const u32 magnitudes = (four & 7) << 9 | (four & 0x70) << 2 | (four & 0x700) >> 5 | (four & 0x7000) >> 12;
    r |= (signs | magnitudes) << 16 * half;
  }
  return r;
}

// A thread packs eight columns of rows g and g + 8 of both blocks, one 16-byte vector; those past the vectors
// pack four scales. With fp16 operands, scales are raised by `offset`, and blocks of a scale below `smallest`
// become zero.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_mxfp4(const u32* __restrict__ source, const u8* __restrict__ source_scales,
               const int* __restrict__ order, uint4* __restrict__ codes, u32* __restrict__ scales,
               int columns, int tiles, int chunks, int smallest, int offset) {
  const int vectors = tiles * chunks * WARP, blocks = columns / BLOCK;
  int i = thread_index();
  if (i < vectors) {
    const int lane = i % WARP, chunk = i / WARP % chunks, tile = i / WARP / chunks;
    u32 words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int row = order[tile * TILE_ROWS + w % 2 * 8 + lane / 4], block = chunk * 2 + w / 2;
      words[w] = 0;
      if (row >= 0 && block < blocks) {
        const u64 from = (u64)row * blocks + block;
        if (source_scales[from] >= smallest) words[w] = recode(source[from * 4 + lane % 4]);
      }
    }
    codes[i] = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  i -= vectors;
  const int g = i % 8, chunk = i / 8 % chunks, tile = i / 8 / chunks;
  if (tile >= tiles) return;
  u32 four = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int row = order[tile * TILE_ROWS + w % 2 * 8 + g], block = chunk * 2 + w / 2;
    if (row >= 0 && block < blocks) {
      const int scale = max((int)source_scales[(u64)row * blocks + block], smallest);
      four |= (u32)(scale + offset) << 8 * w;
    }
  }
  scales[i] = four;
}
