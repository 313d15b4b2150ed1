// The 16-bit type of both mma operands: fp16, or bf16 where OPERAND_BF16 is defined; and operand order.
#pragma once
#include "ptx.cuh"

// Rows of operands are padded with zeros to a multiple of 64 columns, and each eight columns are stored in
// the order 0 4 1 5 2 6 3 7: one 16-byte read gives a lane its B operands for the two mma of a block.
constexpr int OPERAND_PAD = 64;

DEVICE int padded(int columns) { return (columns + OPERAND_PAD - 1) / OPERAND_PAD * OPERAND_PAD; }

// Where column k of a row is stored.
DEVICE int operand_index(int k) { return (k & ~7) | (k & 3) << 1 | (k >> 2 & 1); }

#ifdef OPERAND_BF16
DEVICE u32 pack_operands(float low, float high) { return pack_bf162(low, high); }
DEVICE u16 to_operand(float x) { return float_to_bf16(x); }
DEVICE u32 mul_operands(u32 a, u32 b) { return mul_bf162(a, b); }
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_bf16(d, a0, a1, a2, a3, b0, b1);
}
#else
DEVICE u32 pack_operands(float low, float high) { return pack_half2(low, high); }
DEVICE u16 to_operand(float x) { return float_to_half(x); }
DEVICE u32 mul_operands(u32 a, u32 b) { return mul_half2(a, b); }
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_f16(d, a0, a1, a2, a3, b0, b1);
}
#endif

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Eight columns of a row, natural order -> one 16-byte store in operand order.
DEVICE uint4 pack_eight(const float (&x)[8]) {
  return make_uint4(pack_operands(x[0], x[4]), pack_operands(x[1], x[5]), pack_operands(x[2], x[6]),
                    pack_operands(x[3], x[7]));
}
