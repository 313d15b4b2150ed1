// Weights in fragment order, and how a block of them becomes the A operand of mma.
//
// A matrix of N rows and K columns is cut into tiles of 16 rows and chunks of 64 columns; a chunk is two
// blocks of 32 columns, a block is what two mma consume. What lane 4 g + t holds of a block are columns 8 t
// to 8 t + 7 of the tile's rows g and g + 8. Codes lie [tile][chunk][vector][lane] in uint4, so that a warp
// reads 512 contiguous bytes at a time; scales follow them as u32 [tile][unit][g]. layout.py packs the same
// in NumPy.
//
// Exactly one of WEIGHTS_DENSE, WEIGHTS_INT8 and WEIGHTS_MXFP4 is defined; OPERAND_BF16 makes both operands
// bf16 instead of fp16.
#pragma once
#include "operands.cuh"

#if defined(WEIGHTS_DENSE)
constexpr int VECTORS = 4;  // 16-bit values, [block][mma]: the A operand of one mma, as mma wants it
#elif defined(WEIGHTS_INT8)
constexpr int VECTORS = 2;  // codes + 128, [block]: two words of row g, two of row g + 8, in operand order
#elif defined(WEIGHTS_MXFP4)
constexpr int VECTORS = 1;  // one word each: block 0 row g, row g + 8, block 1 row g, row g + 8
#endif

constexpr int TILE_ROWS = 16;
constexpr int CHUNK = 64;  // columns
constexpr int WARP = 32;

// A warp's view of one tile; its lane is already added to the pointers.
struct Tile {
  const uint4* codes;
  const u32* scales;
};

// How many scale words each of the 8 row pairs of a tile has: int8 one per group, MXFP4 one per chunk.
DEVICE int scale_units(int chunks, int group_blocks) {
#if defined(WEIGHTS_INT8)
  return (2 * chunks + group_blocks - 1) / group_blocks;
#elif defined(WEIGHTS_MXFP4)
  return chunks;
#else
  return 0;
#endif
}

// `matrix` holds the codes of all `tiles` tiles, then their scales. group_blocks is int8's group size / 32.
DEVICE Tile tile_at(const u8* matrix, int tiles, int chunks, int group_blocks, int tile) {
  const int lane = threadIdx.x % WARP;
  const u64 codes = (u64)chunks * VECTORS * WARP;  // uint4 per tile
  Tile r;
  r.codes = reinterpret_cast<const uint4*>(matrix) + tile * codes + lane;
  r.scales = reinterpret_cast<const u32*>(matrix + tiles * codes * sizeof(uint4)) +
             (u64)tile * scale_units(chunks, group_blocks) * 8 + lane / 4;
  return r;
}

// A chunk in registers: what one lane holds of 16 rows by 64 columns.
struct Chunk {
  uint4 codes[VECTORS];
#if defined(WEIGHTS_INT8)
  u32 scales[2];  // per block: row g in the low half, row g + 8 in the high half
#elif defined(WEIGHTS_MXFP4)
  u32 scales;  // bytes: block 0 row g, row g + 8, block 1 row g, row g + 8
#endif
};

// Which scale of its row a block of int8 has: block / group_blocks, less the division, as every chunk asks.
// Exact below 2^16 blocks; the one that remains does not depend on the block and leaves the loop.
DEVICE u32 scale_unit(u32 block, u32 group_blocks) {
  const u32 inverse = 0xFFFFFFFFu / group_blocks + 1u;  // 2^32 / group_blocks, up; zero stands for 2^32
  return inverse == 0 ? block : (u32)((u64)block * inverse >> 32);
}

DEVICE void load_codes(Chunk& r, const uint4* codes) {
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) r.codes[v] = load_once(codes + v * WARP);
}

DEVICE void load_scales(Chunk& r, const u32* scales, int chunk, int group_blocks) {
#if defined(WEIGHTS_INT8)
#pragma unroll
  for (int b = 0; b < 2; ++b) r.scales[b] = __ldg(scales + scale_unit(2 * chunk + b, group_blocks) * 8);
#elif defined(WEIGHTS_MXFP4)
  r.scales = __ldg(scales + chunk * 8);
#endif
}

DEVICE void load_chunk(Chunk& r, const Tile& tile, int chunk, int group_blocks) {
  load_codes(r, tile.codes + chunk * (VECTORS * WARP));
  load_scales(r, tile.scales, chunk, group_blocks);
}

#if defined(WEIGHTS_DENSE)
DEVICE void load_block(Chunk& r, const Tile& tile, int chunk, int block) {
#pragma unroll
  for (int v = 2 * block; v < 2 * block + 2; ++v)
    r.codes[v] = load_once(tile.codes + (chunk * VECTORS + v) * WARP);
}
#endif

#if defined(WEIGHTS_MXFP4)
// A word of eight recoded E2M1 codes -> four pairs (code i, code i + 4). Each 16-bit half holds four codes:
// signs at bits 15, 12, 14, 13 and magnitudes at bits 11-9, 8-6, 5-3, 2-0, so that a shift and a mask put
// sign and magnitude where fp16 (there code * 2^-14, subnormals included) or bf16 (code * 2^-126) has them.
DEVICE void unpack_word(u32 w, u32 (&r)[4]) {
  constexpr u32 SIGN = 0x80008000u;
#ifdef OPERAND_BF16
  constexpr u32 MAGNITUDE = 0x01C001C0u;
  r[0] = and_or(w, SIGN, (w >> 3) & MAGNITUDE);
  r[1] = and_or(w << 3, SIGN, w & MAGNITUDE);
  r[2] = and_or(w << 1, SIGN, (w << 3) & MAGNITUDE);
  r[3] = and_or(w << 2, SIGN, (w << 6) & MAGNITUDE);
#else
  constexpr u32 MAGNITUDE = 0x0E000E00u;
  r[0] = w & (SIGN | MAGNITUDE);
  r[1] = (w << 3) & (SIGN | MAGNITUDE);
  r[2] = and_or(w << 1, SIGN, (w << 6) & MAGNITUDE);
  r[3] = and_or(w << 2, SIGN, (w << 9) & MAGNITUDE);
#endif
}
#endif

// The A operands of a block without its scale: a[i] of row g, a[4 + i] of row g + 8, each the pair of columns
// 8 t + i and 8 t + i + 4. Dense weights are whole then; int8 are the codes themselves; MXFP4 are codes in
// bf16, and codes * 2^-14 in fp16, which the stored scale makes up for.
DEVICE void unpack_block(const Chunk& chunk, int block, u32 (&a)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#if defined(WEIGHTS_DENSE)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * half + i] = word(chunk.codes[2 * block + i / 2], i % 2 * 2 + half);
#elif defined(WEIGHTS_INT8)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 codes = word(chunk.codes[block], 2 * half + i);
#ifdef OPERAND_BF16
      float f[4];  // 2^23 + byte is exact in float32
#pragma unroll
      for (int j = 0; j < 4; ++j)
        f[j] = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440 + j)) - 8388736.f;
      a[4 * half + 2 * i] = pack_bf162(f[0], f[1]);
      a[4 * half + 2 * i + 1] = pack_bf162(f[2], f[3]);
#else
      constexpr u32 HALF_1024 = 0x64646464u, MINUS_1152 = 0xE480E480u;  // 1024 + byte is exact in fp16
      a[4 * half + 2 * i] = add_half2(__byte_perm(codes, HALF_1024, 0x4140), MINUS_1152);
      a[4 * half + 2 * i + 1] = add_half2(__byte_perm(codes, HALF_1024, 0x4342), MINUS_1152);
#endif
    }
#elif defined(WEIGHTS_MXFP4)
    u32 r[4];
    unpack_word(word(chunk.codes[0], 2 * block + half), r);
#pragma unroll
#ifdef OPERAND_BF16
    for (int i = 0; i < 4; ++i) a[4 * half + i] = mul_bf162(r[i], 0x7E807E80u);  // 2^126
#else
    for (int i = 0; i < 4; ++i) a[4 * half + i] = r[i];
#endif
#endif
  }
}

// The scale of row g (half 0) or g + 8 (half 1) of a block, as the factor that sums of unpacked products
// want. The smallest E8M0 scale, 2^-127, counts as zero here: float32 arithmetic flushes numbers so small.
DEVICE float block_scale(const Chunk& chunk, int block, int half) {
#if defined(WEIGHTS_INT8)
  const u16 bits = (u16)(chunk.scales[block] >> 16 * half);
#ifdef SCALE_BF16
  return bf16_to_float(bits);
#else
  return half_to_float(bits);
#endif
#elif defined(WEIGHTS_MXFP4)
  const int byte = 2 * block + half;
  return __uint_as_float((byte == 3 ? chunk.scales >> 1 : chunk.scales << (23 - 8 * byte)) & 0x7F800000u);
#else
  return 1.f;
#endif
}

// The A operands of a block with its scale multiplied in: what prefill wants, where a block meets many
// tokens.
DEVICE void decode_block(const Chunk& chunk, int block, u32 (&a)[8]) {
  unpack_block(chunk, block, a);
#if defined(WEIGHTS_INT8)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = block_scale(chunk, block, half);
    const u32 pair = pack_operands(scale, scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * half + i] = mul_operands(a[4 * half + i], pair);
  }
#elif defined(WEIGHTS_MXFP4)
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 byte = chunk.scales >> (8 * (2 * block + half)) & 255u;
#ifdef OPERAND_BF16
    const u32 pair = byte == 0 ? 0x00400040u : (byte << 7) * 0x10001u;  // byte = E8M0: 2^(byte - 127)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * half + i] = mul_bf162(a[4 * half + i], pair);
#else
    const u32 pair = ((byte - 112u) << 10) * 0x10001u;  // byte = E8M0 + 14, 113 to 142: 2^(byte - 127)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[4 * half + i] = mul_half2(a[4 * half + i], pair);
#endif
  }
#endif
}

// Adds to `sum` the product of a chunk with 8 columns of x: lane (g, t) has x[block] = columns 8 t to 8 t + 7
// of that block for token g, in operand order. sum is laid out as mma's D. For decode, where a weight is used
// once: scales are applied after the product, in float32.
DEVICE void multiply_chunk(const Chunk& chunk, const uint4 (&x)[2], float (&sum)[4]) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    u32 a[8];
    unpack_block(chunk, b, a);
#if defined(WEIGHTS_DENSE)
    mma(sum, a[0], a[4], a[1], a[5], x[b].x, x[b].y);
    mma(sum, a[2], a[6], a[3], a[7], x[b].z, x[b].w);
#else
    float part[4] = {0.f, 0.f, 0.f, 0.f};
    mma(part, a[0], a[4], a[1], a[5], x[b].x, x[b].y);
    mma(part, a[2], a[6], a[3], a[7], x[b].z, x[b].w);
    const float upper = block_scale(chunk, b, 0), lower = block_scale(chunk, b, 1);
    sum[0] = fmaf(part[0], upper, sum[0]);
    sum[1] = fmaf(part[1], upper, sum[1]);
    sum[2] = fmaf(part[2], lower, sum[2]);
    sum[3] = fmaf(part[3], lower, sum[3]);
#endif
  }
}
