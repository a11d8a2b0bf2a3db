// The machine on a CPU, for tests: the kernels' own source runs on fibers, one per thread, a block at a time.
//
// Kept strict where a GPU is strict: shared memory starts as NaN, an asynchronous copy lands only when it is waited
// for and leaves NaN until then, threads run until they meet a barrier and in either order, the mma is computed from its
// documented fragments (wgmma: cuda_wgmma_shim.cuh).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define MC_BOTH inline
#define MC_DEVICE inline
#define MC_KERNEL(threads, blocks) static void
#define MC_SHARED(name) unsigned char* name = mc::shim::block().shared
#define __restrict__

namespace mc {

struct alignas(16) Word4 {
  unsigned x, y, z, w;
};
struct Index3 {
  int x, y, z;
};

namespace shim {

constexpr int kStack = 96 * 1024;

struct Copy {
  void* to;
  Word4 value;
};

struct Warp {  // where its lanes meet: a generation that counts meetings, and what each lane brings
  int arrived = 0, generation = 0;
  const void* brought[32];
  unsigned result[32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const int* waits_for = nullptr;  // a generation; runnable when it is no longer `seen`
  int seen = 0;
  bool done = false;
  std::deque<std::vector<Copy>> copies;
  std::vector<int> landed;  // pieces of 16 bytes that it copied since its last fence of the proxies
  void* fake_stack = nullptr;
};

struct Block {
  Index3 index, thread_count, grid;
  unsigned char* shared;
  int shared_bytes;
  std::vector<int> unfenced, reads;  // of each 16 bytes of shared memory: copies without a fence, products that read it
  std::shared_ptr<void> products;    // what cuda_wgmma_shim.cuh keeps
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, generation = 0, alive = 0, current = 0;
  bool any = false, any_result = false;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::function<void()> body;
};

inline Block*& block_pointer() {
  static thread_local Block* pointer = nullptr;
  return pointer;
}
inline Block& block() { return *block_pointer(); }
[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda shim: %s\n", what);
  std::abort();
}
inline Fiber& fiber() { return block().fibers[block().current]; }
inline size_t piece(const void* p) { return (static_cast<const unsigned char*>(p) - block().shared) / 16; }
inline int& order() {  // 0: threads run upwards, 1: downwards
  static int value = 0;
  return value;
}

inline void start_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, size);
#endif
}
inline void finish_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack = nullptr,
                          [[maybe_unused]] size_t* size = nullptr) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, size);
#endif
}

inline void yield_until_changed(const int& generation) {
  Fiber& self = fiber();
  self.waits_for = &generation;
  self.seen = generation;
  start_switch(&self.fake_stack, block().scheduler_stack, block().scheduler_size);
  swapcontext(&self.context, &block().scheduler);
  finish_switch(self.fake_stack, &block().scheduler_stack, &block().scheduler_size);
}

inline void release_block() {  // the last thread that arrives, or leaves, opens the barrier
  Block& b = block();
  if (b.arrived == 0 || b.arrived < b.alive) return;
  b.any_result = b.any;
  b.any = false;
  b.arrived = 0;
  ++b.generation;
}

inline void fiber_main() {
  finish_switch(nullptr, &block().scheduler_stack, &block().scheduler_size);
  block().body();
  fiber().done = true;
  --block().alive;
  release_block();
  start_switch(nullptr, block().scheduler_stack, block().scheduler_size);
  swapcontext(&fiber().context, &block().scheduler);
}

inline void run_block(Block& b, int threads) {
  b.alive = threads;
  b.arrived = b.generation = 0;
  for (Warp& warp : b.warps) warp.arrived = 0;
  b.unfenced.assign((b.shared_bytes + 15) / 16, 0);
  b.reads.assign(b.unfenced.size(), 0);
  for (Fiber& f : b.fibers) {
    f.done = false;
    f.waits_for = nullptr;
    f.copies.assign(1, {});
    f.landed.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  while (b.alive > 0) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      b.current = order() ? threads - 1 - i : i;
      Fiber& f = b.fibers[b.current];
      if (f.done || (f.waits_for && *f.waits_for == f.seen)) continue;
      f.waits_for = nullptr;
      moved = true;
      void* fake = nullptr;
      start_switch(&fake, f.stack.get(), kStack);
      swapcontext(&b.scheduler, &f.context);
      finish_switch(fake);
    }
    if (!moved) fail("threads wait for each other");
  }
  b.products.reset();
}

// All 32 lanes meet; the last one to arrive runs `work` on the warp.
template <class Work>
void meet(const void* brought, Work work) {
  Block& b = block();
  Warp& warp = b.warps[b.current / 32];
  warp.brought[b.current % 32] = brought;
  if (++warp.arrived < 32) {
    yield_until_changed(warp.generation);
  } else {
    work(warp);
    warp.arrived = 0;
    ++warp.generation;
  }
}

inline unsigned short round_bits(double value, int mantissa, int bias, int top) {  // nearest, ties to even
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = (top << mantissa);
  if (std::isnan(value)) return static_cast<unsigned short>(sign | infinity | 1 << (mantissa - 1));
  const double size = std::fabs(value);
  if (size == 0) return sign;
  if (std::isinf(size)) return static_cast<unsigned short>(sign | infinity);
  int exponent = std::max(std::ilogb(size), 1 - bias);
  const double units = std::nearbyint(std::ldexp(size, mantissa - exponent));  // may carry: the sum below is right then
  const long long bits = static_cast<long long>(units) + (static_cast<long long>(exponent + bias - 1) << mantissa);
  return static_cast<unsigned short>(sign | (bits >= infinity ? infinity : bits));
}

}  // namespace shim

inline Index3 thread_index() { return {shim::block().current, 0, 0}; }
#define threadIdx (mc::thread_index())
#define blockIdx (mc::shim::block().index)
#define gridDim (mc::shim::block().grid)
#define blockDim (mc::shim::block().thread_count)

inline float bits_to_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned float_to_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bf16_to_float(unsigned short bits) { return bits_to_float(static_cast<unsigned>(bits) << 16); }
inline float fp16_to_float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

template <class T>
struct Arithmetic {
  static unsigned fma2(unsigned a, unsigned b, unsigned c) {
    return fma(a, b, c) | static_cast<unsigned>(fma(a >> 16, b >> 16, c >> 16)) << 16;
  }
  static unsigned pack2(float low, float high) { return T::round(low) | static_cast<unsigned>(T::round(high)) << 16; }
  static void mma(float (&d)[4], const unsigned* a, unsigned b0, unsigned b1) {
    struct Operands {
      float* d;
      const unsigned* a;
      unsigned b[2];
    } mine{d, a, {b0, b1}};
    shim::meet(&mine, [](shim::Warp& warp) {
      float left[16][16], right[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const auto* o = static_cast<const Operands*>(warp.brought[lane]);
        const int r = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 4; ++i) left[r + 8 * (i & 1)][2 * q + half + 8 * (i >> 1)] = part(o->a[i], half);
          for (int i = 0; i < 2; ++i) right[2 * q + half + 8 * i][r] = part(o->b[i], half);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const auto* o = static_cast<const Operands*>(warp.brought[lane]);
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
          float sum = o->d[i];
          for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
          o->d[i] = sum;
        }
      }
    });
  }

 private:
  static float part(unsigned word, int half) { return T::to_float(static_cast<unsigned short>(word >> 16 * half)); }
  static unsigned short fma(unsigned a, unsigned b, unsigned c) {  // exact in double, then one rounding
    return T::round(static_cast<double>(part(a, 0)) * part(b, 0) + part(c, 0));
  }
};

struct Bf16 : Arithmetic<Bf16> {
  static constexpr int kMantissa = 7, kBias = 127;
  static float to_float(unsigned short bits) { return bf16_to_float(bits); }
  static unsigned short round(double value) { return shim::round_bits(value, 7, 127, 255); }
};
struct Fp16 : Arithmetic<Fp16> {
  static constexpr int kMantissa = 10, kBias = 15;
  static float to_float(unsigned short bits) { return fp16_to_float(bits); }
  static unsigned short round(double value) { return shim::round_bits(value, 10, 15, 31); }
};

inline void copy_async(void* to, const void* from, bool valid = true) {
  shim::Copy copy{to, {0, 0, 0, 0}};
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    shim::fail("a copy of 16 bytes is not aligned");
  if (shim::block().reads[shim::piece(to)]) shim::fail("a copy into shared memory that a product reads");
  if (valid) std::memcpy(&copy.value, from, 16);
  std::memset(to, 0xff, 16);  // from now on it may land
  shim::fiber().copies.back().push_back(copy);
}
inline void stream_async(void* to, const void* from, unsigned long long) { copy_async(to, from); }
inline unsigned long long evict_first() { return 0; }
inline void copy_commit() { shim::fiber().copies.emplace_back(); }
template <int kPending>
void copy_wait() {
  auto& groups = shim::fiber().copies;  // the last one is open
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const shim::Copy& copy : groups.front()) {
      std::memcpy(copy.to, &copy.value, 16);
      ++shim::block().unfenced[shim::piece(copy.to)];
      shim::fiber().landed.push_back(shim::piece(copy.to));
    }
    groups.pop_front();
  }
}
inline void allow_next() {}
inline void wait_previous() {}

inline Word4 load_shared(const void* p) { return *static_cast<const Word4*>(p); }
inline Word4 load_global(const void* p) { return *static_cast<const Word4*>(p); }
inline bool block_any(bool value) {
  shim::Block& b = shim::block();
  b.any |= value;
  const int before = b.generation;
  ++b.arrived;
  shim::release_block();
  if (b.generation == before) shim::yield_until_changed(b.generation);
  return b.any_result;
}
inline void block_sync() { block_any(false); }
inline void warp_sync() {
  shim::meet(nullptr, [](shim::Warp&) {});
}
inline unsigned same_value(int value) {
  shim::meet(&value, [](shim::Warp& warp) {
    for (int i = 0; i < 32; ++i) {
      warp.result[i] = 0;
      for (int j = 0; j < 32; ++j)
        if (*static_cast<const int*>(warp.brought[i]) == *static_cast<const int*>(warp.brought[j]))
          warp.result[i] |= 1u << j;
    }
  });
  return shim::block().warps[shim::block().current / 32].result[shim::block().current % 32];
}
inline int count_bits(unsigned value) { return __builtin_popcount(value); }
inline void add_shared(int* p, int value) { *p += value; }

struct Launch {
  int x, y, z, threads, shared;
  bool overlap;
};

template <class Params>
int launch(void (*kernel)(Params), const Launch& l, void*, Params params) {
  shim::Block b;
  std::unique_ptr<unsigned char[]> shared(new unsigned char[l.shared + 128]);
  b.shared = shared.get() + (128 - reinterpret_cast<uintptr_t>(shared.get()) % 128);
  b.shared_bytes = l.shared;
  b.thread_count = {l.threads, 1, 1};
  b.grid = {l.x, l.y, l.z};
  b.warps.resize((l.threads + 31) / 32);
  b.fibers.resize(l.threads);
  for (shim::Fiber& f : b.fibers) f.stack.reset(new char[shim::kStack]);
  b.body = [&] { kernel(params); };
  shim::block_pointer() = &b;
  for (int z = 0; z < l.z; ++z)
    for (int y = 0; y < l.y; ++y)
      for (int x = 0; x < l.x; ++x) {
        b.index = {x, y, z};
        std::memset(b.shared, 0xff, l.shared);  // NaN in every format
        shim::run_block(b, l.threads);
      }
  shim::block_pointer() = nullptr;
  return 0;
}

}  // namespace mc

extern "C" inline void mc_shim_order(int downwards) { mc::shim::order() = downwards; }
