// Sorts pairs (token, choice) by expert, stably, and cuts each expert's into tiles for the products to come.
#include "ptx.cuh"

constexpr int WARP = 32, THREADS = 1024, WARPS = THREADS / WARP;

// The lanes whose `value` of `bits` bits is this lane's.
DEVICE u32 lanes_like(u32 value, int bits) {
  u32 like = 0xFFFFFFFFu;
  for (int b = 0; b < bits; ++b) {
    const u32 set = __ballot_sync(0xFFFFFFFFu, value >> b & 1);
    like &= value >> b & 1 ? set : ~set;
  }
  return like;
}

// The sum of x over this thread and those before it in the block.
DEVICE int scan(int x, int (&totals)[WARPS]) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int i = 1; i < WARP; i *= 2) {
    const int before = __shfl_up_sync(0xFFFFFFFFu, x, i);
    if (lane >= i) x += before;
  }
  if (lane == WARP - 1) totals[warp] = x;
  __syncthreads();
  int before = lane < warp ? totals[lane] : 0;
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) before += __shfl_xor_sync(0xFFFFFFFFu, before, i);
  return before + x;
}

// One block. The pairs are cut into `walkers` runs, a warp each: it counts its run's experts, and when every
// thread has added up one expert over all runs, the warp walks its run again and gives each pair its place.
// ids (pairs,), -1 for none; the dynamic shared memory is int [walkers][experts].
extern "C" __global__ void __launch_bounds__(THREADS)
    group(const int* ids, int* order, int* place, int* tile_expert, int* tile_start, int* tile_rows,
          int* count, int pairs, int k, int experts, int tile, int walkers) {
  DYNAMIC_SHARED(int, counts);
  SHARED(int, starts, [THREADS]);
  SHARED(int, rows, [THREADS]);
  SHARED(int, first_tiles, [THREADS]);
  SHARED(int, row_totals, [WARPS]);
  SHARED(int, tile_totals, [WARPS]);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = threadIdx.x;
  const int steps = (pairs + WARP * walkers - 1) / (WARP * walkers);  // of 32 pairs, per walker
  const int begin = warp * steps * WARP, end = min(pairs, begin + steps * WARP);
  int* mine = counts + warp * experts;

  for (int i = threadIdx.x; i < walkers * experts; i += THREADS) counts[i] = 0;
  __syncthreads();
  if (warp < walkers)
    for (int p = begin + lane; p < end; p += WARP)
      if (const int id = ids[p]; id >= 0) atomicAdd(mine + id, 1);
  __syncthreads();

  int total = 0;
  if (expert < experts) {
    for (int w = 0; w < walkers; ++w) {  // counts become places relative to the expert's first
      const int n = counts[w * experts + expert];
      counts[w * experts + expert] = total;
      total += n;
    }
  }
  const int tiles = (total + tile - 1) / tile;
  const int rows_so_far = scan(total, row_totals), tiles_so_far = scan(tiles, tile_totals);
  starts[expert] = rows_so_far - total;
  rows[expert] = total;
  first_tiles[expert] = tiles_so_far - tiles;
  if (threadIdx.x == THREADS - 1) count[0] = tiles_so_far;
  __syncthreads();

  for (int e = warp; e < experts; e += WARPS) {
    for (int i = lane; i * tile < rows[e]; i += WARP) {
      tile_expert[first_tiles[e] + i] = e;
      tile_start[first_tiles[e] + i] = starts[e] + i * tile;
      tile_rows[first_tiles[e] + i] = min(tile, rows[e] - i * tile);
    }
  }

  if (warp < walkers) {
    const int bits = 32 - __clz(experts);  // enough for id + 1
    for (int step = begin; step < end; step += WARP) {
      const int p = step + lane, id = p < end ? ids[p] : -1;
      const u32 like = lanes_like((u32)(id + 1), bits);
      const int before = __popc(like & ((1u << lane) - 1));
      const int run = id >= 0 ? mine[id] : 0;
      __syncwarp();
      if (id >= 0 && before == 0) mine[id] = run + __popc(like);
      __syncwarp();
      if (id >= 0) {
        const int at = starts[id] + run + before;
        order[at] = p / k;
        place[p] = at;
      } else if (p < end) {
        place[p] = -1;
      }
    }
  }
}
