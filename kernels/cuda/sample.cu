// Draws a token from each row of logits: top_k, top_p, min_p, then Gumbel-max over what is left.
//
// Each filter keeps the first so many tokens in one order: larger logits first, of equal ones the lower id.
// What is kept is therefore always "closer to the best logit than some distance", distances being exact
// integers, and a filter is a search for that distance: histograms of 2048 bins, each finer than the last.
#include "philox.cuh"

constexpr int WARP = 32, THREADS = 1024, WARPS = THREADS / WARP;
constexpr int UNROLL = 8;  // loads under way per thread
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS;
constexpr u32 MINUS_INFINITY = 0xFF800000u;  // its bits
constexpr u32 ORDER_MINUS_INFINITY = 0x007FFFFFu, ORDER_INFINITY = 0xFF800000u;

// The first histogram has bins of 1/64 of a logit where the best is 16 to 32, and reaches 8 or more below the
// best. Everything worse is counted in registers, as thousands of tokens in a few bins would be slow; only if
// the target lies there does the search go on among the rest.
constexpr int NEAR_SHIFT = 13, FAR_SHIFT = 32 - BIN_BITS;
constexpr int HISTOGRAMS = 4;  // at most: the near one, and three from 32 bits down to one value

// Probabilities are summed as whole multiples of 2^-44 of the best token's: any order gives the same sum, and
// 2^18 tokens stay below 2^63. Each is as good as float32's exp, about 1e-6 of itself; what is rounded off
// besides is below 2^-26 of the sum.
constexpr int MASS_BITS = 44;

// What is searched for: the token with rank `target`; the one where so much probability is reached; or, of
// the tokens at the limit, the one with rank `target` in order of ids.
enum Search { BY_RANK, BY_MASS, BY_ID };

// Tokens at a smaller distance from the best are kept, and of those at just this distance the first `ties`,
// or all of them if not `cut`.
struct Limit {
  u32 distance;
  u64 ties;
  bool cut;
};

// value: a distance, or an id. The tokens before it are worth less than the target, with those at it no less;
// not reached where all tokens together are worth less.
struct Found {
  u32 value;
  u64 before, at, target;
  bool reached;
};

struct Scratch {
  u32 low[BINS], high[BINS];  // a bin's sum; two halves, as shared memory adds no 64-bit numbers by itself
  u64 partial[WARPS];
  u64 all;  // in the bins and before them
  Found found;
  u32 word;
};

struct Row {
  const float* logits;
  int size;
  float best;
  u32 best_order;
  float rate;  // log2(e) / temperature
};

// Call after a barrier since the last use of `partial`.
DEVICE u64 block_sum(u64 x, Scratch& scratch) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
  if (threadIdx.x % WARP == 0) scratch.partial[threadIdx.x / WARP] = x;
  __syncthreads();
  x = scratch.partial[threadIdx.x % WARP];
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
  return x;
}

DEVICE u64 block_max(u64 x, Scratch& scratch) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  __syncthreads();  // the last use of `partial` is over
  if (threadIdx.x % WARP == 0) scratch.partial[threadIdx.x / WARP] = x;
  __syncthreads();
  x = scratch.partial[threadIdx.x % WARP];
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) x = max(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  return x;
}

// The sum of x over the threads before this one. Call after a barrier since the last use of `partial`.
DEVICE u64 block_scan(u64 x, Scratch& scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u64 sum = x;
#pragma unroll
  for (int i = 1; i < WARP; i *= 2) {
    const u64 before = __shfl_up_sync(0xFFFFFFFFu, sum, i);
    if (lane >= i) sum += before;
  }
  if (lane == WARP - 1) scratch.partial[warp] = sum;
  __syncthreads();
  u64 before = lane < warp ? scratch.partial[lane] : 0;
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) before += __shfl_xor_sync(0xFFFFFFFFu, before, i);
  return before + sum - x;
}

// Integers only, so that the order of the additions does not matter.
DEVICE void add_to_bin(Scratch& scratch, int bin, u64 amount) {
  const u32 low = (u32)amount;
  u32 high = (u32)(amount >> 32);
  if (low != 0) {
    const u32 before = atomicAdd(&scratch.low[bin], low);
    high += (u32)(before + low) < low;
  }
  if (high != 0) atomicAdd(&scratch.high[bin], high);
}

DEVICE u64 bin_sum(const Scratch& scratch, int bin) {
  return (u64)scratch.high[bin] << 32 | scratch.low[bin];
}

// exp((logit - best) / temperature) in units of 2^-MASS_BITS.
DEVICE u64 mass(const Row& row, float logit) {
  const u32 bits = __float_as_uint(exp2f((logit - row.best) * row.rate));
  const u64 mantissa = (bits & 0x7FFFFFu) | 0x800000u;
  const int shift = (int)(bits >> 23) - 150 + MASS_BITS;
  return shift >= 0 ? mantissa << shift : shift > -24 ? mantissa >> -shift : 0;
}

DEVICE float logit_at(const Row& row, u32 distance) { return from_orderable(row.best_order - distance); }

DEVICE void load_logits(const Row& row, int start, float (&logits)[UNROLL]) {
#pragma unroll
  for (int i = 0; i < UNROLL; ++i) {
    const int token = start + i * THREADS;
    logits[i] = token < row.size ? __ldg(row.logits + token) : __uint_as_float(MINUS_INFINITY);
  }
}

// Finds the token where the target is reached, among those that `limit` keeps; for BY_MASS the target is the
// share `p` of all that they are worth.
template <Search SEARCH>
DEVICE Found search(const Row& row, const Limit& limit, u64 target, float p, Scratch& scratch) {
  u32 base = 0;
  int shift = NEAR_SHIFT;
  if (SEARCH == BY_ID)
    for (shift = 0; (u32)(row.size - 1) >> shift >= BINS;) ++shift;
  u64 before = 0;
  for (int histogram = 0; histogram < HISTOGRAMS; ++histogram) {
    const bool first = histogram == 0;
    for (int i = threadIdx.x; i < BINS; i += THREADS) scratch.low[i] = scratch.high[i] = 0;
    __syncthreads();
    u64 sum = 0;
    for (int start = threadIdx.x; start < row.size; start += UNROLL * THREADS) {
      float logits[UNROLL];
      load_logits(row, start, logits);
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        if (__float_as_uint(logits[i]) == MINUS_INFINITY) continue;
        const u32 distance = row.best_order - orderable(logits[i]);
        const bool at_limit = distance == limit.distance;
        const bool beyond = distance > limit.distance || (at_limit && limit.cut);
        if (SEARCH == BY_ID ? !at_limit : beyond) continue;
        const u32 value = SEARCH == BY_ID ? start + i * THREADS : distance;
        const u32 bin = (value - base) >> shift;
        const bool inside = value >= base && bin < BINS;
        if (!first && !inside) continue;
        const u64 worth = SEARCH == BY_MASS ? mass(row, logits[i]) : 1;
        sum += worth;
        if (inside) add_to_bin(scratch, bin, worth);
      }
    }
    if (SEARCH != BY_ID && limit.cut && threadIdx.x == 0) {  // those at the limit that stay
      const u64 worth = limit.ties * (SEARCH == BY_MASS ? mass(row, logit_at(row, limit.distance)) : 1);
      const u32 bin = (limit.distance - base) >> shift;
      sum += worth;
      if (limit.distance >= base && bin < BINS) add_to_bin(scratch, bin, worth);
    }
    if (first) {
      const u64 total = block_sum(sum, scratch);
      if (SEARCH == BY_MASS) target = min(max((u64)((double)p * (double)total), (u64)1), total);
      if (target > total) return {0, 0, 0, target, false};
    }
    if (threadIdx.x == 0) scratch.found.reached = false;
    __syncthreads();
    const u64 even = bin_sum(scratch, 2 * threadIdx.x), odd = bin_sum(scratch, 2 * threadIdx.x + 1);
    const u64 ahead = before + block_scan(even + odd, scratch);
    if (ahead < target && target <= ahead + even + odd) {
      const bool second = ahead + even < target;
      scratch.found = {2 * threadIdx.x + second, ahead + (second ? even : 0), second ? odd : even, target,
                       true};
    }
    if (threadIdx.x == THREADS - 1) scratch.all = ahead + even + odd;
    __syncthreads();
    const Found found = scratch.found;
    const u64 all = scratch.all;
    if (!found.reached) {  // only the first histogram may end before the target
      before = all;
      base = (u32)BINS << NEAR_SHIFT;
      shift = FAR_SHIFT;
      continue;
    }
    before = found.before;
    base += found.value << shift;
    if (shift == 0) return {base, before, found.at, target, true};
    shift = max(0, shift - BIN_BITS);
  }
  return {0, 0, 0, target, false};  // does not happen: the last histogram has bins of one value
}

// The distance of the worst logit that min_p keeps. Exact: the sum is made in double, by one thread.
DEVICE u32 min_p_distance(const Row& row, float temperature, float min_p, Scratch& scratch) {
  if (threadIdx.x == 0) {
    const double lowest = (double)row.best + (double)temperature * log((double)min_p);
    const float rounded = (float)lowest;
    scratch.word = row.best_order - orderable(rounded) - ((double)rounded < lowest ? 1 : 0);
  }
  __syncthreads();
  return scratch.word;
}

// A block draws for one row of logits (R, V) and writes the winner's key. positions: where the drawn tokens
// will stand, -1 for an empty row.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const float* logits, const float* temperatures, const int* top_k, const float* top_p,
           const float* min_p, const u64* seed, const int* choice, const int* positions, u64* best, int V) {
  SHARED(Scratch, scratch, [1]);
  const int r = blockIdx.x, position = positions[r];
  const float temperature = temperatures[r];
  Row row = {logits + (u64)r * V, V, 0.f, 0, 1.44269504f / temperature};
  u32 rank = 0, token = 0;  // of this thread's best; -infinity is 0, and NaN of either sign above the rest
  if (position >= 0) {
    for (int start = threadIdx.x; start < V; start += UNROLL * THREADS) {
      float values[UNROLL];
      load_logits(row, start, values);
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        const u32 other = orderable(values[i]) - ORDER_MINUS_INFINITY;
        if (other > rank) {
          rank = other;
          token = start + i * THREADS;
        }
      }
    }
  }
  u64 top = (u64)(rank + ORDER_MINUS_INFINITY) << 32 | (u32)~token;  // key_of
  if (rank == 0) top = KEY_NONE;
  if (rank >= ORDER_INFINITY - ORDER_MINUS_INFINITY) top = KEY_NOT_FINITE;
  top = block_max(top, scratch[0]);
  if (top == KEY_NONE || top == KEY_NOT_FINITE || temperature < GREEDY_BELOW) {  // all threads agree
    if (threadIdx.x == 0) best[r] = top;
    return;
  }
  row.best_order = (u32)(top >> 32);
  row.best = from_orderable(row.best_order);

  Limit limit = {0xFFFFFFFFu, 0, false};
  if (const int k = top_k[r]; k > 0) {
    const Found found = search<BY_RANK>(row, limit, k, 0.f, scratch[0]);
    if (found.reached) limit = {found.value, k - found.before, found.before + found.at > k};
  }
  if (const float p = top_p[r]; p < 1.f) {
    const Found found = search<BY_MASS>(row, limit, 0, p, scratch[0]);
    const u64 each = mass(row, logit_at(row, found.value));
    const u64 ties = (found.target - found.before + each - 1) / each;
    const bool cut = ties < found.at / each || (limit.cut && found.value == limit.distance);
    limit = {found.value, ties, cut};
  }
  if (min_p[r] > 0.f) {
    const u32 distance = min_p_distance(row, temperature, min_p[r], scratch[0]);
    if (distance < limit.distance) limit = {distance, 0, false};
  }
  u32 last = (u32)V;  // the last id that stays at the limit
  if (limit.cut) last = search<BY_ID>(row, limit, limit.ties, 0.f, scratch[0]).value;

  top = KEY_NONE;
  for (int start = threadIdx.x; start < V; start += UNROLL * THREADS) {
    float values[UNROLL];
    load_logits(row, start, values);
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const u32 id = start + i * THREADS, distance = row.best_order - orderable(values[i]);
      if (__float_as_uint(values[i]) == MINUS_INFINITY || distance > limit.distance) continue;
      if (distance == limit.distance && id > last) continue;
      top = max(top, sampling_key(values[i], temperature, seed[r], choice[r], position, id));
    }
  }
  top = block_max(top, scratch[0]);
  if (threadIdx.x == 0) best[r] = top;
}

// One block, a thread per row: turns keys into tokens, in `drawn` for the next step to look up. result (R,
// 2), for the host: the token, and 1 where none could be drawn because a logit was NaN or +infinity or all
// were -infinity (the token is 0 then, which is safe to go on with). Keys end as 0.
extern "C" __global__ void __launch_bounds__(256) finish(u64* best, int* drawn, int* result, int rows) {
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    const u64 key = best[r];
    best[r] = KEY_NONE;
    const bool failed = key == KEY_NONE || key == KEY_NOT_FINITE;
    drawn[r] = result[2 * r] = failed ? 0 : (int)key_token(key);
    result[2 * r + 1] = failed;
  }
}
