// The paged cache of keys and values: [block][key head][token of 16][64] of bf16, or fp16 under KV_FP16.
#pragma once
#include "ptx.cuh"

constexpr int HEAD_DIM = 64;
constexpr int BLOCK_TOKENS = 16;

// A logit times this is the power of two that exp2f wants; scores are scaled by 1 / sqrt(64) as well.
constexpr float LOG2_E = 1.44269504f;
constexpr float SCORE_SCALE = 0.125f * LOG2_E;

DEVICE float minus_infinity() { return __int_as_float((int)0xFF800000u); }

// Where the key or value of a token begins, in elements.
DEVICE u64 kv_offset(int block, int key_heads, int key_head, int token) {
  return (((u64)block * key_heads + key_head) * BLOCK_TOKENS + token) * HEAD_DIM;
}

#ifdef KV_FP16
DEVICE u32 pack_kv(float low, float high) { return pack_half2(low, high); }
DEVICE float kv_to_float(u16 bits) { return half_to_float(bits); }
DEVICE void mma_kv(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_f16(d, a0, a1, a2, a3, b0, b1);
}
#else
DEVICE u32 pack_kv(float low, float high) { return pack_bf162(low, high); }
DEVICE float kv_to_float(u16 bits) { return bf16_to_float(bits); }
DEVICE void mma_kv(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_bf16(d, a0, a1, a2, a3, b0, b1);
}
#endif

// Two values as `rounded` + `rest`: twice the bits of one.
DEVICE void split_kv(float first, float second, u32& rounded, u32& rest) {
  rounded = pack_kv(first, second);
  rest = pack_kv(first - kv_to_float((u16)rounded), second - kv_to_float((u16)(rounded >> 16)));
}
