// Which token wins a draw: Philox4x32-10 noise, Gumbel-max, and the 64-bit keys whose maximum is the winner.
#pragma once
#include "ptx.cuh"

// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
constexpr int PHILOX_ROUNDS = 10;
constexpr u32 PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr u32 PHILOX_KEY_STEP_0 = 0x9E3779B9u, PHILOX_KEY_STEP_1 = 0xBB67AE85u;

// Below this temperature the best token is taken, without chance.
constexpr float GREEDY_BELOW = 1e-5f;

// Keys that no finite logit has: nothing was drawn, and a logit was NaN or +infinity.
constexpr u64 KEY_NONE = 0, KEY_NOT_FINITE = ~0ull;

// The first word of the random numbers: counter = (position, token, high word of seed, 0), key = (low word of
// seed, choice).
DEVICE u32 philox_word(u64 seed, int choice, int position, u32 token) {
  u32 c0 = (u32)position, c1 = token, c2 = (u32)(seed >> 32), c3 = 0;
  u32 k0 = (u32)seed, k1 = (u32)choice;
#pragma unroll
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const u64 p0 = (u64)c0 * PHILOX_MULTIPLIER_0, p1 = (u64)c2 * PHILOX_MULTIPLIER_1;
    c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
    c1 = (u32)p1;
    c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
    c3 = (u32)p0;
    k0 += PHILOX_KEY_STEP_0;
    k1 += PHILOX_KEY_STEP_1;
  }
  return c0;
}

// -log(-log(u)) for u = (word + 1/2) / 2^32. float32 has no such u near 1, hence log(1 - (1 - u)) there.
DEVICE float gumbel(u32 word) {
  const float inner =
      word >> 31 ? -log1pf(-((float)~word + 0.5f) * 0x1p-32f) : -logf(((float)word + 0.5f) * 0x1p-32f);
  return -logf(inner);
}

// Unsigned numbers in the order of the floats, denormal ones too; -0 and 0 are the same, as equal values must
// tie.
DEVICE u32 orderable(float x) {
  const u32 sign = 0x80000000u, bits = __float_as_uint(x) == sign ? 0 : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float from_orderable(u32 order) { return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order); }

// The larger key has the larger value, or the same and the lower token id.
DEVICE u64 key_of(float value, u32 token) { return (u64)orderable(value) << 32 | (u32)~token; }

DEVICE u32 key_token(u64 key) { return ~(u32)key; }

// The key of a token that may be drawn. position: where the drawn token will stand in its sequence.
DEVICE u64 sampling_key(float logit, float temperature, u64 seed, int choice, int position, u32 token) {
  const u32 bits = __float_as_uint(logit);
  if (bits == 0xFF800000u) return KEY_NONE;  // -infinity: forbidden
  if ((bits & 0x7F800000u) == 0x7F800000u) return KEY_NOT_FINITE;
  if (temperature < GREEDY_BELOW) return key_of(logit, token);
  return key_of(logit / temperature + gumbel(philox_word(seed, choice, position, token)), token);
}
