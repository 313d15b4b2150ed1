// CUDA C on a CPU: force-included before a .cu file, it makes a shared object that runs the file's kernels.
//
// Every CUDA thread is a fiber with its own stack, and every operating system thread runs one block at a
// time. A fiber gives way only where it must wait: at __syncthreads, and in a warp collective for the other
// lanes of its mask. The lane that comes last does the work for all of them, so an mma is computed once for a
// warp. In which order threads and blocks run is chosen at launch, shared memory starts as NaN, and a wait
// that cannot end is reported instead of entered: what a GPU would do at random then fails every time.
//
// EMULATOR_CHECKED: the compiler calls __asan_* before each access and __ubsan_* where C++ is undefined; both
// are defined below and know the arrays, the block's shared memory and the thread's stack.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>

// NVRTC has neither, and a kernel must not come to rely on them here.
#undef INFINITY
#undef NAN

#define __CUDA_ARCH__ 900
#define __global__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define DEVICE inline __attribute__((always_inline))  // of methods too, so not static

struct uint2 {
  unsigned int x, y;
};
struct uint3 {
  unsigned int x, y, z;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#if defined(EMULATOR_CHECKED)
#define UNCHECKED __attribute__((no_sanitize("address", "kernel-address", "undefined")))
#else
#define UNCHECKED
#endif
#define OUT_OF_LINE UNCHECKED __attribute__((noinline))

constexpr int LANES = 32;
constexpr int MOST_THREADS = 1024;
constexpr int MOST_WARPS = MOST_THREADS / LANES;
constexpr int MOST_COPIES = 256;  // cp.async of one thread under way at once
constexpr int MOST_SHARED_ARRAYS = 64;
constexpr u32 MOST_STATIC = 48 * 1024;   // what a GPU allows without asking
constexpr u32 MOST_SHARED = 227 * 1024;  // static and dynamic on sm_90
constexpr u32 GUARD = 128;               // bytes after each shared array that nothing may touch
constexpr u8 GUARD_BYTE = 0xA5;
constexpr u8 POISON = 0xFF;  // NaN as float, fp16 and bf16, -1 as an integer
constexpr u64 CANARY = 0x5AFE57ACC0FFEE00ull;

// Stacks lie in one region aligned to its own size, block first: the stack pointer alone says which block and
// which thread is running, which is several times faster than a thread_local of a shared object.
constexpr u64 REGION = 1ull << 28;
constexpr u64 STACK = 1ull << 17;
constexpr u64 BLOCK_STACKS = 128;  // as much of the region as a Block may take

struct Site {  // where in the source a thread waits
  const char* file;
  int line;
};
#define AT const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()

enum State : u8 { RUNNING, IN_COLLECTIVE, AT_BARRIER, EXITED };
enum Collective : u8 {
  SHUFFLE,
  BALLOT,
  MATCH,
  REDUCE,
  SYNCWARP,
  MMA_F16,
  MMA_BF16,
  LDMATRIX,
  LDMATRIX_TRANS
};
constexpr const char* COLLECTIVE_NAMES[] = {"__shfl_sync",   "__ballot_sync", "__match_any_sync",
                                            "__reduce_sync", "__syncwarp",    "mma_f16",
                                            "mma_bf16",      "load_matrices", "load_matrices_transposed"};

struct Fiber {
  void* stack_pointer;
  uint3 index;  // threadIdx
  u32 linear;
  Site site;
  u32 group;   // cp.async groups committed so far
  u32 copies;  // cp.async not yet done
  State state;
};

struct Copy {  // a cp.async under way
  void* target;
  const void* source;
  u32 group;
  bool valid;
};

struct alignas(64) Warp {
  u32 ready;    // lanes that can run now
  u32 waiting;  // lanes inside a collective
  Collective kinds[LANES];
  u32 masks[LANES];
  u64 values[LANES];  // what each lane brings, and then what it takes away
  u32 sources[LANES];
  const void* rows[LANES];
  alignas(
      64) u32 words[6][LANES];  // register by register: the lanes' words of a0 are 8 x 8 values in row order
  alignas(64) float sums[16][8];
};

struct Launch {  // as runtime.py fills it in
  u32 grid[3];
  u32 block;
  u32 dynamic_bytes;
  u32 order;
  u64 seed;
  u32 workers;
  u32 message_bytes;
  const u64* arguments;  // one word each
  const u64* starts;     // arrays that kernels may touch, ascending
  const u64* sizes;
  u64 arrays;
  char* message;
};

enum Order : u32 { FORWARD, REVERSED, RANDOM };

struct SharedArray {
  int key;  // which SHARED; -1 is the dynamic part
  u32 start, bytes;
};

struct Grid;

struct Block {
  void* scheduler;  // its stack pointer while fibers run
  Grid* grid;
  const Launch* launch;
  uint3 index, block_dim, grid_dim;
  u64 random;
  u32 threads, order, warp, ready_warps, at_barrier, exited, running;
  bool failed;
  Site barrier;
  u32 barrier_thread;
  u32 shared_arrays, static_bytes, shared_end;
  SharedArray arrays[MOST_SHARED_ARRAYS];
  Warp warps[MOST_WARPS];
  Fiber fibers[MOST_THREADS];
  alignas(128) u8 shared[MOST_SHARED + (MOST_SHARED_ARRAYS + 1) * GUARD];
  Copy copies[MOST_THREADS][MOST_COPIES];
};
static_assert(sizeof(Block) < BLOCK_STACKS * STACK && BLOCK_STACKS + MOST_THREADS <= REGION / STACK);

struct Grid {  // one launch, shared by all workers
  const Launch* launch;
  void (*body)(const u64*);
  u64 blocks, next, stride, offset;
  int failed;
};

UNCHECKED inline u64 stack_pointer() {
  u64 r;
#if defined(__x86_64__)
  asm("mov %%rsp, %0" : "=r"(r));
#elif defined(__aarch64__)
  asm("mov %0, sp" : "=r"(r));
#else
#error "the emulator knows x86-64 and aarch64"
#endif
  return r;
}

UNCHECKED inline Block& block() { return *reinterpret_cast<Block*>(stack_pointer() & ~(REGION - 1)); }
UNCHECKED inline u32 thread() { return (u32)((stack_pointer() & (REGION - 1)) / STACK - BLOCK_STACKS); }
UNCHECKED inline Fiber& fiber() { return block().fibers[thread()]; }
UNCHECKED inline u8* stack_of(Block& b, u32 thread) {
  return reinterpret_cast<u8*>(&b) + (BLOCK_STACKS + thread) * STACK;
}

// Saves the callee-saved registers and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr int SAVED_WORDS = 8;  // six registers, the return address, and a word that aligns the stack
constexpr int RETURN_WORD = 6;
#else
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr int SAVED_WORDS = 20;
constexpr int RETURN_WORD = 11;
#endif

// Ends the launch with a message that names the block and the thread. The fibers of the block are abandoned.
template <class... Values>
OUT_OF_LINE void report(Block& b, u32 culprit, const char* format, Values... values) {
  b.failed = true;
  if (__atomic_exchange_n(&b.grid->failed, 1, __ATOMIC_ACQ_REL)) return;  // another block was first
  const u64 room = b.launch->message_bytes;
  const int used = snprintf(b.launch->message, room, "block (%u, %u, %u), thread %u: ", b.index.x, b.index.y,
                            b.index.z, culprit);
  snprintf(b.launch->message + used, room - used, format, values...);
}

template <class... Values>
OUT_OF_LINE void fail(const char* format, Values... values) {
  Block& b = block();
  Fiber& f = fiber();
  report(b, f.linear, format, values...);
  emulator_switch(&f.stack_pointer, b.scheduler);
}

UNCHECKED inline const char* base_name(const char* path) {
  const char* slash = path;
  for (const char* p = path; *p; ++p)
    if (*p == '/') slash = p + 1;
  return slash;
}

// ---------------------------------------------------------------------------------------------- scheduling

UNCHECKED inline u32 random_word(Block& b) {
  b.random ^= b.random << 13;
  b.random ^= b.random >> 7;
  b.random ^= b.random << 17;
  return (u32)(b.random >> 32);
}

// A set bit of `bits`, which is not zero, in the order that the launch asks for; the search starts at `from`.
UNCHECKED inline u32 pick_bit(u32 bits, Order order, u32 from) {
  const u32 turned = from ? bits >> from | bits << (32 - from) : bits;
  const u32 found = order == REVERSED ? 31 - __builtin_clz(turned) : __builtin_ctz(turned);
  return (found + from) & 31;
}

UNCHECKED inline void wake(Block& b, u32 warp, u32 lanes) {
  if (!lanes) return;
  b.warps[warp].ready |= lanes;
  b.ready_warps |= 1u << warp;
}

// Takes the next thread to run off the ready lists. It stays with a warp while that can run: its data are
// warm.
UNCHECKED inline Fiber* next_fiber(Block& b) {
  if (!b.ready_warps) return nullptr;
  const Order order = (Order)b.order;
  u32 lane_from = 0;
  if (order == RANDOM) {
    const u32 r = random_word(b);
    lane_from = r & 31;
    if ((r >> 8 & 7) == 0) b.warp = pick_bit(b.ready_warps, FORWARD, r >> 16 & 31);
  }
  if (!(b.ready_warps >> b.warp & 1))
    b.warp = pick_bit(b.ready_warps, order, order == RANDOM ? random_word(b) & 31 : b.warp);
  Warp& w = b.warps[b.warp];
  const u32 lane = pick_bit(w.ready, order, lane_from);
  w.ready &= ~(1u << lane);
  if (!w.ready) b.ready_warps &= ~(1u << b.warp);
  return &b.fibers[b.warp * LANES + lane];
}

UNCHECKED inline void release_barrier(Block& b) {
  b.at_barrier = 0;
  for (u32 t = 0; t < b.threads; ++t)
    if (b.fibers[t].state == AT_BARRIER) wake(b, t / LANES, 1u << t % LANES);
  b.warp = b.order == REVERSED ? (b.threads - 1) / LANES : 0;
}

// Nothing can run and not everybody is done: says why.
OUT_OF_LINE void report_deadlock(Block& b) {
  for (u32 t = 0; t < b.threads; ++t) {
    Fiber& f = b.fibers[t];
    if (f.state != IN_COLLECTIVE) continue;
    const Warp& w = b.warps[t / LANES];
    const u32 lane = t % LANES;
    const char* name = COLLECTIVE_NAMES[w.kinds[lane]];
    for (u32 other = 0; other < LANES; ++other) {
      const u32 u = t / LANES * LANES + other;
      if (!(w.masks[lane] >> other & 1)) continue;
      if (u >= b.threads || b.fibers[u].state == EXITED) {
        return report(b, t, "%s at %s:%d has mask 0x%08x, but lane %u %s", name, base_name(f.site.file),
                      f.site.line, w.masks[lane], other, u >= b.threads ? "does not exist" : "has exited");
      }
      const Fiber& g = b.fibers[u];
      if (g.state == AT_BARRIER) {
        return report(b, t, "%s at %s:%d has mask 0x%08x, but lane %u waits at __syncthreads, %s:%d", name,
                      base_name(f.site.file), f.site.line, w.masks[lane], other, base_name(g.site.file),
                      g.site.line);
      }
      if (w.kinds[other] != w.kinds[lane] || w.masks[other] != w.masks[lane]) {
        return report(b, t, "%s at %s:%d has mask 0x%08x, but lane %u waits in %s at %s:%d with mask 0x%08x",
                      name, base_name(f.site.file), f.site.line, w.masks[lane], other,
                      COLLECTIVE_NAMES[w.kinds[other]], base_name(g.site.file), g.site.line, w.masks[other]);
      }
    }
  }
  report(b, 0, "deadlock");
}

// Runs another thread, or the scheduler when there is none; returns when this thread may go on.
OUT_OF_LINE void give_way(Block& b, Fiber& f) {
  Fiber* next = next_fiber(b);
  if (!next && b.at_barrier && b.at_barrier + b.exited == b.threads) {
    release_barrier(b);
    next = next_fiber(b);
  }
  if (*reinterpret_cast<u64*>(stack_of(b, f.linear)) != CANARY) {
    report(b, f.linear, "stack overflow: more than %llu bytes of local variables", STACK);
    next = nullptr;
  } else if (!next && b.exited != b.threads) {
    report_deadlock(b);
  }
  if (next == &f) return;
  emulator_switch(&f.stack_pointer, next ? next->stack_pointer : b.scheduler);
}

OUT_OF_LINE void fiber_main() {
  Block& b = block();
  Fiber& f = fiber();
  b.grid->body(b.launch->arguments);
  f.state = EXITED;
  ++b.exited;
  give_way(b, f);
  __builtin_trap();
}

OUT_OF_LINE void barrier(Site site) {
  Block& b = block();
  Fiber& f = fiber();
  if (!b.at_barrier) {
    b.barrier = site;
    b.barrier_thread = f.linear;
  } else if (b.barrier.line != site.line || strcmp(b.barrier.file, site.file)) {
    fail("waits at __syncthreads, %s:%d, but thread %u waits at another, %s:%d", base_name(site.file),
         site.line, b.barrier_thread, base_name(b.barrier.file), b.barrier.line);
  }
  ++b.at_barrier;
  f.state = AT_BARRIER;
  f.site = site;
  give_way(b, f);
  f.state = RUNNING;
}

// Joins a collective, whose inputs the lane has put in its warp already. Returns the warp to the lane that
// came last: it computes, then calls `leave`. The others return null, with their results ready.
OUT_OF_LINE Warp* join(Collective kind, u32 mask, Site site) {
  Block& b = block();
  Fiber& f = fiber();
  Warp& w = b.warps[f.linear / LANES];
  const u32 lane = f.linear % LANES;
  if (!(mask >> lane & 1))
    fail("%s at %s:%d has mask 0x%08x without the lane itself", COLLECTIVE_NAMES[kind], base_name(site.file),
         site.line, mask);
  w.kinds[lane] = kind;
  w.masks[lane] = mask;
  if (((w.waiting | 1u << lane) & mask) == mask) {
    u32 differ = 0;
    for (int i = 0; i < LANES; ++i) differ |= (u32)(w.masks[i] != mask || w.kinds[i] != kind) << i;
    if (!(differ & mask)) return &w;
  }
  w.waiting |= 1u << lane;
  f.state = IN_COLLECTIVE;
  f.site = site;
  give_way(b, f);
  f.state = RUNNING;
  return nullptr;
}

UNCHECKED inline void leave(u32 mask) {
  Block& b = block();
  const u32 t = thread();
  const u32 others = mask & ~(1u << t % LANES);
  b.warps[t / LANES].waiting &= ~mask;
  wake(b, t / LANES, others);
}

UNCHECKED inline Warp& warp() { return block().warps[thread() / LANES]; }
UNCHECKED inline u32 lane() { return thread() % LANES; }

// ---------------------------------------------------------------------------------------- blocks and
// launches

OUT_OF_LINE void run_block(Block& b, u64 number) {
  const Launch& launch = *b.launch;
  b.index = {(u32)(number % launch.grid[0]), (u32)(number / launch.grid[0] % launch.grid[1]),
             (u32)(number / launch.grid[0] / launch.grid[1])};
  b.random = (launch.seed + number + 1) * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 4; ++i) random_word(b);
  b.at_barrier = b.exited = b.ready_warps = 0;
  memset(b.shared, GUARD_BYTE, b.shared_end + GUARD);
  for (u32 i = 0; i < b.shared_arrays; ++i) memset(b.shared + b.arrays[i].start, POISON, b.arrays[i].bytes);
  for (u32 t = 0; t < b.threads; ++t) {
    Fiber& f = b.fibers[t];
    f.index = {t, 0, 0};
    f.linear = t;
    f.state = RUNNING;
    f.copies = f.group = 0;
    u8* stack = stack_of(b, t);
    *reinterpret_cast<u64*>(stack) = CANARY;
    // Stacks start at different offsets: at one offset they would all compete for the same lines of the
    // cache.
    u64* top = reinterpret_cast<u64*>(stack + STACK - 64 - t * 576 % 16384);
    memset(top - SAVED_WORDS, 0, SAVED_WORDS * sizeof(u64));
    top[-SAVED_WORDS + RETURN_WORD] = (u64)&fiber_main;
    f.stack_pointer = top - SAVED_WORDS;
  }
  for (u32 w = 0; w * LANES < b.threads; ++w) {
    b.warps[w].ready = b.warps[w].waiting = 0;
    const u32 lanes = b.threads - w * LANES;
    wake(b, w, lanes >= LANES ? ~0u : (1u << lanes) - 1);
  }
  b.warp = b.order == REVERSED ? (b.threads - 1) / LANES : 0;
  emulator_switch(&b.scheduler, next_fiber(b)->stack_pointer);
  if (b.failed) return;
  for (u32 i = 0; i < b.shared_arrays; ++i) {
    const SharedArray& a = b.arrays[i];
    for (u32 j = 0; j < GUARD; ++j) {
      if (b.shared[a.start + a.bytes + j] == GUARD_BYTE) continue;
      return report(b, 0,
                    "a thread of this block wrote %u bytes past the end of %s shared memory of %u bytes", j,
                    a.key < 0 ? "dynamic" : "an array in", a.bytes);
    }
  }
}

// Regions are kept for the next launch: a stack of used ones for this shared object.
struct Regions {
  pthread_mutex_t lock;
  int count;
  Block* free[256];
};
static Regions regions = {PTHREAD_MUTEX_INITIALIZER, 0, {}};

OUT_OF_LINE Block* take_region() {
  Block* r = nullptr;
  pthread_mutex_lock(&regions.lock);
  if (regions.count) r = regions.free[--regions.count];
  pthread_mutex_unlock(&regions.lock);
  if (r) return r;
  void* p =
      mmap(nullptr, 2 * REGION, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  const u64 start = (u64)p, aligned = (start + REGION - 1) & ~(REGION - 1);
  if (aligned > start) munmap(p, aligned - start);
  munmap(reinterpret_cast<void*>(aligned + REGION), start + REGION - aligned);
  return reinterpret_cast<Block*>(aligned);
}

OUT_OF_LINE void give_region(Block* b) {
  pthread_mutex_lock(&regions.lock);
  if (regions.count < 256) {
    regions.free[regions.count++] = b;
    b = nullptr;
  }
  pthread_mutex_unlock(&regions.lock);
  if (b) munmap(b, REGION);
}

#ifdef EMULATOR_CHECKED
static thread_local Block* checking;  // the block whose fibers run on this operating system thread
#endif

OUT_OF_LINE void* work(void* argument) {
  Grid& grid = *static_cast<Grid*>(argument);
  const Launch& launch = *grid.launch;
  Block* b = take_region();
  if (!b) {
    if (!__atomic_exchange_n(&grid.failed, 1, __ATOMIC_ACQ_REL))
      snprintf(launch.message, launch.message_bytes, "no address space for the stacks of a block");
    return nullptr;
  }
  b->grid = &grid;
  b->launch = &launch;
  b->failed = false;
  b->order = launch.order;
  b->threads = launch.block;
  b->block_dim = {launch.block, 1, 1};
  b->grid_dim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  b->shared_arrays = b->static_bytes = b->shared_end = 0;
  if (launch.dynamic_bytes) {
    b->arrays[b->shared_arrays++] = {-1, 0, launch.dynamic_bytes};
    b->shared_end = (launch.dynamic_bytes + GUARD + 15) / 16 * 16;
  }
#ifdef EMULATOR_CHECKED
  checking = b;
#endif
  while (!__atomic_load_n(&grid.failed, __ATOMIC_ACQUIRE)) {
    const u64 turn = __atomic_fetch_add(&grid.next, 1, __ATOMIC_RELAXED);
    if (turn >= grid.blocks) break;
    const u64 number = launch.order == FORWARD    ? turn
                       : launch.order == REVERSED ? grid.blocks - 1 - turn
                                                  : (turn * grid.stride + grid.offset) % grid.blocks;
    run_block(*b, number);
  }
#ifdef EMULATOR_CHECKED
  checking = nullptr;
#endif
  give_region(b);
  return nullptr;
}

OUT_OF_LINE int run(const Launch* launch, void (*body)(const u64*)) {
  Grid grid = {launch, body, (u64)launch->grid[0] * launch->grid[1] * launch->grid[2], 0, 1, 0, 0};
  // Every block once, in an order that looks like none: a stride without a common divisor.
  grid.stride = launch->seed * 2654435761u % grid.blocks + grid.blocks / 3 + 1;
  grid.offset = launch->seed % grid.blocks;
  for (;; ++grid.stride) {
    u64 a = grid.stride, c = grid.blocks;
    while (c) {
      const u64 rest = a % c;
      a = c;
      c = rest;
    }
    if (a == 1) break;
  }
  constexpr u32 MOST_WORKERS = 256;
  u32 workers = launch->workers < MOST_WORKERS ? launch->workers : MOST_WORKERS;
  if (workers > grid.blocks) workers = (u32)grid.blocks;
  pthread_t helpers[MOST_WORKERS];
  u32 started = 0;
  while (started + 1 < workers && !pthread_create(&helpers[started], nullptr, work, &grid)) ++started;
  work(&grid);
  for (u32 i = 0; i < started; ++i) pthread_join(helpers[i], nullptr);
  return grid.failed;
}

// Calls a kernel with the words that runtime.py wrote, one for each parameter.
template <class T>
UNCHECKED inline T argument(u64 word) {
  static_assert(sizeof(T) <= sizeof(u64), "parameters are pointers and scalars");
  T r;
  memcpy(&r, &word, sizeof(T));
  return r;
}

template <class T>
constexpr bool IS_POINTER = false;
template <class T>
constexpr bool IS_POINTER<T*> = true;
template <class T>
constexpr bool IS_REAL = false;
template <>
constexpr bool IS_REAL<float> = true;
template <>
constexpr bool IS_REAL<double> = true;

// "p8 i4 f4": what runtime.py compares the arguments with.
template <class... Parameters>
struct Signature {
  static const char* text(void (*)(Parameters...)) {
    static const char r[] = {kind<Parameters>()..., 0};
    return r;
  }
  template <class T>
  static constexpr char kind() {
    // Lower case for integers of 1, 2, 4, 8 bytes; upper case for the rest.
    return IS_POINTER<T> ? 'P' : IS_REAL<T> ? (sizeof(T) == 4 ? 'F' : 'D') : (char)('0' + sizeof(T));
  }
};

template <class... Parameters>
const char* signature(void (*kernel)(Parameters...)) {
  return Signature<Parameters...>::text(kernel);
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Indices<I...>;
};

template <auto kernel>
struct Call;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Call<kernel> {
  template <int... I>
  UNCHECKED static void spread(const u64* words, Indices<I...>) {
    (void)words;
    kernel(argument<Parameters>(words[I])...);
  }
  UNCHECKED static void body(const u64* words) {
    spread(words, typename Count<sizeof...(Parameters)>::type{});
  }
};

// Put after the source for each of its kernels; `bound` is what __launch_bounds__ says, 1024 without it.
#define EMULATOR_ENTRY(name, bound)                                                           \
  extern "C" __attribute__((visibility("default"))) int emulator_launch_##name(               \
      const ::emulator::Launch* launch) {                                                     \
    return ::emulator::run(launch, &::emulator::Call<&name>::body);                           \
  }                                                                                           \
  extern "C" __attribute__((visibility("default"))) const char* emulator_signature_##name() { \
    return ::emulator::signature(&name);                                                      \
  }                                                                                           \
  extern "C" __attribute__((visibility("default"))) int emulator_bound_##name() { return bound; }

// ------------------------------------------------------------------------------------------- shared memory

// Which SHARED this is, given out at first use: an instance of a template has one of its own.
static int shared_keys;
OUT_OF_LINE int new_shared_key() { return __atomic_fetch_add(&shared_keys, 1, __ATOMIC_RELAXED); }

OUT_OF_LINE void* shared_array(int key, u32 bytes) {
  Block& b = block();
  for (u32 i = 0; i < b.shared_arrays; ++i)
    if (b.arrays[i].key == key) return b.shared + b.arrays[i].start;
  b.static_bytes += bytes;
  if (b.static_bytes > MOST_STATIC) fail("more than %u bytes of static shared memory", MOST_STATIC);
  if (b.static_bytes + b.launch->dynamic_bytes > MOST_SHARED)
    fail("more than %u bytes of shared memory", MOST_SHARED);
  if (b.shared_arrays == MOST_SHARED_ARRAYS) fail("more than %d shared arrays", MOST_SHARED_ARRAYS);
  const SharedArray a = {key, b.shared_end, bytes};
  b.arrays[b.shared_arrays++] = a;
  b.shared_end = (a.start + bytes + GUARD + 15) / 16 * 16;
  memset(b.shared + a.start, POISON, bytes);
  memset(b.shared + a.start + bytes, GUARD_BYTE, b.shared_end + GUARD - a.start - bytes);
  return b.shared + a.start;
}

#define SHARED(type, name, dims)                               \
  typedef type name##_shared_ dims;                            \
  static const int name##_key_ = ::emulator::new_shared_key(); \
  name##_shared_& name =                                       \
      *static_cast<name##_shared_*>(::emulator::shared_array(name##_key_, sizeof(name##_shared_)))
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::emulator::block().shared)

// ------------------------------------------------------------------------------------------ fp16, bf16, mma

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif
typedef float Floats __attribute__((vector_size(32)));

UNCHECKED inline float from_bits(u32 u) {
  float r;
  memcpy(&r, &u, 4);
  return r;
}

UNCHECKED inline u32 to_bits(float x) {
  u32 r;
  memcpy(&r, &x, 4);
  return r;
}

UNCHECKED inline float widen_half(u16 h) {
  Half r;
  memcpy(&r, &h, 2);
  return (float)r;
}

UNCHECKED inline u16 narrow_half(float x) {
  if (x != x) return 0x7FFF;  // a GPU keeps nothing else of a NaN
  const Half h = (Half)x;
  u16 r;
  memcpy(&r, &h, 2);
  return r;
}

UNCHECKED inline float widen_bf16(u16 h) { return from_bits((u32)h << 16); }

UNCHECKED inline u16 narrow_bf16(float x) {
  if (x != x) return 0x7FFF;
  const u32 u = to_bits(x);
  return (u16)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

template <bool bf16>
UNCHECKED inline Floats widen_eight(const u32* words) {
#if defined(__F16C__)
  if (!bf16) {
#if defined(__clang__)
    typedef _Float16 Halves __attribute__((vector_size(16)));
    Halves bits;
    memcpy(&bits, words, 16);
    return __builtin_convertvector(bits, Floats);
#else
    typedef short Halves __attribute__((vector_size(16)));
    Halves bits;
    memcpy(&bits, words, 16);
    return (Floats)__builtin_ia32_vcvtph2ps256(bits);
#endif
  }
#endif
  u16 halves[8];
  memcpy(halves, words, 16);
  Floats r;
  for (int i = 0; i < 8; ++i) r[i] = bf16 ? widen_bf16(halves[i]) : widen_half(halves[i]);
  return r;
}

// sums += A B, from the words of all lanes. A lane's word of a register is two neighbours of an 8 x 8 matrix
// in row order, so the 32 words in order are that matrix: a0 to a3 are quarters of A, b0 and b1 halves of
// B^T.
template <bool bf16>
OUT_OF_LINE void multiply(Warp& w) {
  alignas(32) float a[16][16], b[16][8];
  for (int quarter = 0; quarter < 4; ++quarter)
    for (int row = 0; row < 8; ++row) {
      const Floats v = widen_eight<bf16>(&w.words[quarter][4 * row]);
      memcpy(&a[quarter % 2 * 8 + row][quarter / 2 * 8], &v, sizeof(v));
    }
  for (int half = 0; half < 2; ++half)
    for (int column = 0; column < 8; ++column) {
      const Floats v = widen_eight<bf16>(&w.words[4 + half][4 * column]);
      for (int k = 0; k < 8; ++k) b[8 * half + k][column] = v[k];
    }
  for (int row = 0; row < 16; row += 4) {  // four at a time: their sums do not wait for each other
    Floats sums[4];
    memcpy(sums, w.sums[row], sizeof(sums));
    for (int k = 0; k < 16; ++k) {
      Floats v;
      memcpy(&v, b[k], sizeof(v));
      for (int i = 0; i < 4; ++i) sums[i] += a[row + i][k] * v;
    }
    memcpy(w.sums[row], sums, sizeof(sums));
  }
}

template <bool bf16>
UNCHECKED inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Site site) {
  Warp& w = warp();
  const u32 l = lane(), g = l / 4, t = l % 4;
  const u32 words[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; ++i) w.words[i][l] = words[i];
  memcpy(&w.sums[g][2 * t], &d[0], 8);
  memcpy(&w.sums[g + 8][2 * t], &d[2], 8);
  if (join(bf16 ? MMA_BF16 : MMA_F16, ~0u, site)) {
    multiply<bf16>(w);
    leave(~0u);
  }
  memcpy(&d[0], &w.sums[g][2 * t], 8);
  memcpy(&d[2], &w.sums[g + 8][2 * t], 8);
}

#ifdef EMULATOR_CHECKED
OUT_OF_LINE void check(u64 address, u64 bytes, bool write);
#else
inline void check(u64, u64, bool) {}
#endif

UNCHECKED inline void load_matrices(u32 (&r)[4], const void* row, bool transposed, Site site) {
  Warp& w = warp();
  const u32 l = lane();
  if ((u64)row % 16)
    fail("load_matrices of %p, which is not 16-byte aligned, at %s:%d", row, base_name(site.file), site.line);
  check((u64)row, 16, false);
  w.rows[l] = row;
  if (join(transposed ? LDMATRIX_TRANS : LDMATRIX, ~0u, site)) {
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < 8; ++g) {
        u16 values[8];
        memcpy(values, w.rows[8 * i + g], 16);
        if (transposed) {
          u16* words = reinterpret_cast<u16*>(w.words[i]);
          for (int c = 0; c < 8; ++c) words[8 * c + g] = values[c];
        } else {
          memcpy(&w.words[i][4 * g], values, 16);
        }
      }
    leave(~0u);
  }
  for (int i = 0; i < 4; ++i) r[i] = w.words[i][l];
}

// Every lane brings a value and takes that of lane `source`.
UNCHECKED inline u64 shuffle(u32 mask, u64 value, u32 source, Site site) {
  Warp& w = warp();
  const u32 l = lane();
  w.values[l] = value;
  w.sources[l] = source;
  if (join(SHUFFLE, mask, site)) {
    u64 taken[LANES];
    for (int i = 0; i < LANES; ++i) taken[i] = w.values[w.sources[i] & 31];
    for (int i = 0; i < LANES; ++i) {
      if (!(mask >> i & 1)) continue;
      if (!(mask >> (w.sources[i] & 31) & 1)) taken[i] = ~0ull;  // undefined on a GPU
      w.values[i] = taken[i];
    }
    leave(mask);
  }
  return w.values[l];
}

UNCHECKED inline u32 ballot(u32 mask, bool vote, Site site) {
  Warp& w = warp();
  const u32 l = lane();
  w.values[l] = vote;
  if (join(BALLOT, mask, site)) {
    u32 votes = 0;
    for (int i = 0; i < LANES; ++i) votes |= (u32)(w.values[i] & 1) << i;
    for (int i = 0; i < LANES; ++i)
      if (mask >> i & 1) w.values[i] = votes & mask;
    leave(mask);
  }
  return (u32)w.values[l];
}

template <class T>
UNCHECKED inline u64 to_word(T value) {
  static_assert(sizeof(T) <= 8, "warp collectives take up to eight bytes");
  u64 r = 0;
  memcpy(&r, &value, sizeof(T));
  return r;
}
template <class T>
UNCHECKED inline T from_word(u64 word) {
  T r;
  memcpy(&r, &word, sizeof(T));
  return r;
}

UNCHECKED inline u32 match(u32 mask, u64 value, Site site) {
  Warp& w = warp();
  const u32 l = lane();
  w.values[l] = value;
  if (join(MATCH, mask, site)) {
    u32 equal[LANES] = {};
    for (int i = 0; i < LANES; ++i)
      for (int j = 0; j < LANES; ++j) equal[i] |= (u32)(w.values[i] == w.values[j]) << j;
    for (int i = 0; i < LANES; ++i)
      if (mask >> i & 1) w.values[i] = equal[i] & mask;
    leave(mask);
  }
  return (u32)w.values[l];
}

template <class T, class Combine>
UNCHECKED inline T reduce(u32 mask, T value, Combine combine, Site site) {
  Warp& w = warp();
  const u32 l = lane();
  w.values[l] = to_word(value);
  if (join(REDUCE, mask, site)) {
    T total = value;
    for (int i = 0; i < LANES; ++i)
      if (mask >> i & 1 && i != (int)l) total = combine(total, from_word<T>(w.values[i]));
    for (int i = 0; i < LANES; ++i)
      if (mask >> i & 1) w.values[i] = to_word(total);
    leave(mask);
  }
  return from_word<T>(w.values[l]);
}

// ------------------------------------------------------------------------------------------------- cp.async

UNCHECKED inline void start_copy(void* target, const void* source, bool valid, Site site) {
  Block& b = block();
  Fiber& f = fiber();
  if ((u64)target % 16 || (valid && (u64)source % 16))
    fail("copy_async of addresses that are not 16-byte aligned, at %s:%d", base_name(site.file), site.line);
  check((u64)target, 16, true);
  if (valid) check((u64)source, 16, false);
  if (f.copies == MOST_COPIES) fail("more than %d copy_async under way", MOST_COPIES);
  b.copies[f.linear][f.copies++] = {target, source, f.group, valid};
}

// Copies happen only here: a kernel that forgets to wait finds poison.
OUT_OF_LINE void wait_copies(u32 pending) {
  Block& b = block();
  Fiber& f = fiber();
  u32 kept = 0;
  for (u32 i = 0; i < f.copies; ++i) {
    const Copy c = b.copies[f.linear][i];
    if (c.group + pending >= f.group) {
      b.copies[f.linear][kept++] = c;
    } else if (c.valid) {
      memcpy(c.target, c.source, 16);
    } else {
      memset(c.target, 0, 16);
    }
  }
  f.copies = kept;
}

}  // namespace emulator

// -------------------------------------------------------------------------------------------- CUDA builtins

#define threadIdx (::emulator::fiber().index)
#define blockIdx (::emulator::block().index)
#define blockDim (::emulator::block().block_dim)
#define gridDim (::emulator::block().grid_dim)

DEVICE void __syncthreads(AT) { ::emulator::barrier({file_, line_}); }
UNCHECKED inline void __syncwarp(unsigned mask = ~0u, AT) {
  if (::emulator::join(::emulator::SYNCWARP, mask, {file_, line_})) ::emulator::leave(mask);
}

template <class T>
UNCHECKED inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, AT) {
  const unsigned lane = ::emulator::lane();
  const unsigned from = (lane & ~(width - 1u)) | ((unsigned)source & (width - 1u));
  return ::emulator::from_word<T>(
      ::emulator::shuffle(mask, ::emulator::to_word(value), from, {file_, line_}));
}
template <class T>
UNCHECKED inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, AT) {
  const unsigned lane = ::emulator::lane(), from = lane ^ (unsigned)bits;
  // Lanes of a later segment cannot be reached; those of an earlier one can.
  const unsigned reached = from <= (lane | (width - 1u)) ? from : lane;
  return ::emulator::from_word<T>(
      ::emulator::shuffle(mask, ::emulator::to_word(value), reached, {file_, line_}));
}
template <class T>
UNCHECKED inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, AT) {
  const unsigned lane = ::emulator::lane(), first = lane & ~(width - 1u);
  const unsigned from = lane >= first + delta ? lane - delta : lane;
  return ::emulator::from_word<T>(
      ::emulator::shuffle(mask, ::emulator::to_word(value), from, {file_, line_}));
}
template <class T>
UNCHECKED inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, AT) {
  const unsigned lane = ::emulator::lane(), last = lane | (width - 1u);
  const unsigned from = lane + delta <= last ? lane + delta : lane;
  return ::emulator::from_word<T>(
      ::emulator::shuffle(mask, ::emulator::to_word(value), from, {file_, line_}));
}
UNCHECKED inline unsigned __ballot_sync(unsigned mask, int vote, AT) {
  return ::emulator::ballot(mask, vote != 0, {file_, line_});
}
UNCHECKED inline int __any_sync(unsigned mask, int vote, AT) {
  return ::emulator::ballot(mask, vote != 0, {file_, line_}) != 0;
}
UNCHECKED inline int __all_sync(unsigned mask, int vote, AT) {
  return ::emulator::ballot(mask, vote != 0, {file_, line_}) == mask;
}
template <class T>
UNCHECKED inline unsigned __match_any_sync(unsigned mask, T value, AT) {
  return ::emulator::match(mask, ::emulator::to_word(value), {file_, line_});
}

#define EMULATOR_REDUCE(name, T, expression)                                                          \
  UNCHECKED inline T name(unsigned mask, T value, AT) {                                               \
    return ::emulator::reduce(mask, value, [](T a, T b) -> T { return expression; }, {file_, line_}); \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATOR_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b))
EMULATOR_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, int, a > b ? a : b)

template <class T>
DEVICE T __ldg(const T* p) {
  return *p;
}

DEVICE float __uint_as_float(unsigned u) { return ::emulator::from_bits(u); }
DEVICE float __int_as_float(int i) { return ::emulator::from_bits((unsigned)i); }
DEVICE unsigned __float_as_uint(float x) { return ::emulator::to_bits(x); }

// Every atomic is a loop on compare-and-swap over the value's bits.
namespace emulator {
template <class T, class Change>
UNCHECKED inline T atomic(T* p, Change change) {
  if ((u64)p % sizeof(T)) fail("atomic on %p, which is not aligned", (void*)p);
  check((u64)p, sizeof(T), true);
  T old, fresh;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do fresh = change(old);
  while (!__atomic_compare_exchange(p, &old, &fresh, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}
}  // namespace emulator

#define EMULATOR_ATOMIC(name, T, expression)                                  \
  UNCHECKED inline T name(T* p, T value) {                                    \
    return ::emulator::atomic(p, [value](T old) -> T { return expression; }); \
  }
EMULATOR_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicMax, unsigned, old > value ? old : value)
EMULATOR_ATOMIC(atomicMax, unsigned long long, old > value ? old : value)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)

DEVICE void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
DEVICE unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
DEVICE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i;  // bit 3 would repeat the sign: __byte_perm ignores it
    r |= (unsigned)(bytes >> 8 * (which & 7) & 255) << 8 * i;
  }
  return r;
}
DEVICE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

#define EMULATOR_MIN_MAX(T)                        \
  DEVICE T min(T a, T b) { return a < b ? a : b; } \
  DEVICE T max(T a, T b) { return a > b ? a : b; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(unsigned long long)
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }

DEVICE float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }

// ------------------------------------------------------------------------------------------ as in ptx.cuh

DEVICE unsigned thread_again() { return threadIdx.x; }
DEVICE unsigned and_or(unsigned a, unsigned mask, unsigned b) { return (a & mask) | b; }

DEVICE float half_to_float(unsigned short h) { return ::emulator::widen_half(h); }
DEVICE unsigned short float_to_half(float x) { return ::emulator::narrow_half(x); }
DEVICE unsigned pack_half2(float low, float high) {
  return float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
DEVICE float bf16_to_float(unsigned short b) { return ::emulator::widen_bf16(b); }
DEVICE unsigned short float_to_bf16(float x) { return ::emulator::narrow_bf16(x); }
DEVICE unsigned pack_bf162(float low, float high) {
  return float_to_bf16(low) | (unsigned)float_to_bf16(high) << 16;
}

// One rounding from float is right: 24 bits are enough for the sum and product of numbers of 11.
DEVICE unsigned mul_half2(unsigned a, unsigned b) {
  return pack_half2(half_to_float((unsigned short)a) * half_to_float((unsigned short)b),
                    half_to_float((unsigned short)(a >> 16)) * half_to_float((unsigned short)(b >> 16)));
}
DEVICE unsigned add_half2(unsigned a, unsigned b) {
  return pack_half2(half_to_float((unsigned short)a) + half_to_float((unsigned short)b),
                    half_to_float((unsigned short)(a >> 16)) + half_to_float((unsigned short)(b >> 16)));
}
DEVICE unsigned mul_bf162(unsigned a, unsigned b) {
  return pack_bf162(bf16_to_float((unsigned short)a) * bf16_to_float((unsigned short)b),
                    bf16_to_float((unsigned short)(a >> 16)) * bf16_to_float((unsigned short)(b >> 16)));
}

UNCHECKED inline void mma_f16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                              unsigned b1, AT) {
  ::emulator::mma<false>(d, a0, a1, a2, a3, b0, b1, {file_, line_});
}
UNCHECKED inline void mma_bf16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                               unsigned b1, AT) {
  ::emulator::mma<true>(d, a0, a1, a2, a3, b0, b1, {file_, line_});
}
UNCHECKED inline void load_matrices(unsigned (&r)[4], const void* row, AT) {
  ::emulator::load_matrices(r, row, false, {file_, line_});
}
UNCHECKED inline void load_matrices_transposed(unsigned (&r)[4], const void* row, AT) {
  ::emulator::load_matrices(r, row, true, {file_, line_});
}
UNCHECKED inline void copy_async(void* shared, const void* global, bool valid, AT) {
  ::emulator::start_copy(shared, global, valid, {file_, line_});
}
UNCHECKED inline void copy_async_commit() { ++::emulator::fiber().group; }
template <int pending>
UNCHECKED inline void copy_async_wait() {
  ::emulator::wait_copies(pending);
}
DEVICE uint4 load_once(const uint4* p) { return *p; }

// --------------------------------------------------------------------------------------------------- checks

#ifdef EMULATOR_CHECKED
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace emulator {

OUT_OF_LINE void check(u64 address, u64 bytes, bool write) {
  Block* b = checking;
  if (!b || !bytes) return;
  const u64 end = address + bytes, base = (u64)b;
  if (address >= base && end <= base + REGION) {
    const u64 stack = (u64)stack_of(*b, thread()), shared = (u64)b->shared;
    if (address >= stack && end <= stack + STACK) return;
    if (address < shared || (address >= shared + sizeof(b->shared) && end <= base + sizeof(Block))) return;
    if (address < shared + sizeof(b->shared)) {
      const SharedArray* nearest = nullptr;
      for (u32 i = 0; i < b->shared_arrays; ++i) {
        const SharedArray& a = b->arrays[i];
        if (address >= shared + a.start && end <= shared + a.start + a.bytes) return;
        if (shared + a.start <= address) nearest = &a;
      }
      if (!nearest)
        fail("%s %llu bytes of shared memory, of which the block has none", write ? "writes" : "reads",
             bytes);
      fail("%s %llu bytes at byte %llu of %s of %u bytes", write ? "writes" : "reads", bytes,
           address - shared - nearest->start,
           nearest->key < 0 ? "dynamic shared memory" : "an array in shared memory", nearest->bytes);
    }
    fail("%s local variables of thread %llu", write ? "writes" : "reads",
         (address - base) / STACK - BLOCK_STACKS);
  }
  if (address >= (u64)__ehdr_start && end <= (u64)_end) return;  // constants
  const Launch& launch = *b->launch;
  u64 low = 0, high = launch.arrays;  // the first array that starts after the address
  while (low < high) {
    const u64 middle = (low + high) / 2;
    if (launch.starts[middle] <= address)
      low = middle + 1;
    else
      high = middle;
  }
  if (low && end <= launch.starts[low - 1] + launch.sizes[low - 1]) return;
  const u64 before = low ? address - launch.starts[low - 1] : ~0ull;
  const u64 after = low < launch.arrays ? launch.starts[low] - address : ~0ull;
  const char* verb = write ? "writes" : "reads";
  if (!launch.arrays) fail("%s %llu bytes at 0x%llx, and the launch has no arrays", verb, bytes, address);
  if (low && before - launch.sizes[low - 1] <= after) {
    const long long past = (long long)(before - launch.sizes[low - 1]);
    if (past < 0)
      fail("%s %llu bytes at 0x%llx, across the end of an array of %llu bytes", verb, bytes, address,
           launch.sizes[low - 1]);
    fail("%s %llu bytes at 0x%llx, %lld bytes past the end of an array of %llu bytes at 0x%llx", verb, bytes,
         address, past, launch.sizes[low - 1], launch.starts[low - 1]);
  }
  fail("%s %llu bytes at 0x%llx, %llu bytes before an array of %llu bytes at 0x%llx", verb, bytes, address,
       after, launch.sizes[low], launch.starts[low]);
}

// What the compiler hands to __ubsan_*.
struct Location {
  const char* file;
  u32 line, column;
};

}  // namespace emulator

extern "C" {
#define EMULATOR_HOOKS(bytes)                                           \
  OUT_OF_LINE void __asan_load##bytes##_noabort(unsigned long long p) { \
    ::emulator::check(p, bytes, false);                                 \
  }                                                                     \
  OUT_OF_LINE void __asan_store##bytes##_noabort(unsigned long long p) { ::emulator::check(p, bytes, true); }
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
OUT_OF_LINE void __asan_loadN_noabort(unsigned long long p, unsigned long long bytes) {
  ::emulator::check(p, bytes, false);
}
OUT_OF_LINE void __asan_storeN_noabort(unsigned long long p, unsigned long long bytes) {
  ::emulator::check(p, bytes, true);
}
OUT_OF_LINE void __asan_handle_no_return() {}
OUT_OF_LINE void* __asan_memcpy(void* target, const void* source, size_t bytes) {
  ::emulator::check((unsigned long long)source, bytes, false);
  ::emulator::check((unsigned long long)target, bytes, true);
  return memcpy(target, source, bytes);
}
OUT_OF_LINE void* __asan_memset(void* target, int value, size_t bytes) {
  ::emulator::check((unsigned long long)target, bytes, true);
  return memset(target, value, bytes);
}
OUT_OF_LINE void __ubsan_handle_type_mismatch_v1(::emulator::Location* at, unsigned long long p) {
  if (::emulator::checking)
    ::emulator::fail("misaligned access at 0x%llx, %s:%u", p, ::emulator::base_name(at->file), at->line);
}
OUT_OF_LINE void __ubsan_handle_out_of_bounds(::emulator::Location* at, unsigned long long index) {
  if (::emulator::checking)
    ::emulator::fail("index %lld out of bounds, %s:%u", (long long)index, ::emulator::base_name(at->file),
                     at->line);
}
OUT_OF_LINE void __ubsan_handle_shift_out_of_bounds(::emulator::Location* at, unsigned long long,
                                                    unsigned long long by) {
  if (::emulator::checking)
    ::emulator::fail("shift by %lld, %s:%u", (long long)by, ::emulator::base_name(at->file), at->line);
}
}
#endif  // EMULATOR_CHECKED
