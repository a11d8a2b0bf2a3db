// The C interface that Python calls. No exception leaves it; every function that can fail returns one of MC_OK...
#include <atomic>
#include <cstring>
#include <new>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "mc_cpu.h"

int run_moe(const McLayer&, const uint8_t*, const Isa&, const void*, int64_t, const int64_t*, const float*, int64_t,
            int64_t, void*, int);
int run_linear(const McLayer&, const uint8_t*, const Isa&, const void*, int64_t, int64_t, void*, int);

#if defined(__GNUC__)
#define MC_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define MC_EXPORT extern "C"
#endif

namespace {

// AMX: the processor has int8 tiles, the system saves them, and it lets this process use them (asked once).
bool amx_usable() {
#if defined(MC_AMX_EMULATED)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  static const bool usable = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned TILE_BIT = 1u << 24, INT8_BIT = 1u << 25;
    if (!(d & TILE_BIT) || !(d & INT8_BIT)) return false;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned SAVED = 3u << 17;  // XTILECFG, XTILEDATA
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return (low & SAVED) == SAVED && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
  }();
  return usable;
#else
  return false;
#endif
}

bool machine_has(int number) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (number) {
    case 0: return true;
    case 1: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case 2: return avx512;
    case 3: return avx512 && __builtin_cpu_supports("avx512vnni");
    case 4: return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    case 5: return machine_has(4) && amx_usable();
  }
  return false;
#else
  return number == 0;
#endif
}

const Isa* isa_of(int number) {
  switch (number) {
    case 0: return isa_scalar();
    case 1: return isa_avx2();
    case 2: return isa_avx512();
    case 3: return isa_avx512_vnni();
    case 4: return isa_avx512_bf16();
    case 5: return isa_amx();
  }
  return nullptr;
}

template <class F>
int guarded(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return MC_NO_MEMORY;
  } catch (...) {
    return MC_BAD_ARGUMENT;
  }
}

const McLayer& layer_of(const int64_t* table) { return *reinterpret_cast<const McLayer*>(table); }

}  // namespace

#if !defined(MC_SOURCES)
#define MC_SOURCES "unknown"
#endif
// Which sources this was built from; a library of other sources is not used.
MC_EXPORT const char* mc_sources() { return MC_SOURCES; }

// Name of instruction set `number`, or null when there is none. *usable: compiled in, and this machine has it.
MC_EXPORT const char* mc_isa(int number, int* usable) {
  static const char* const names[] = {"scalar", "AVX2", "AVX-512", "AVX-512 VNNI", "AVX-512 BF16", "AMX"};
  if (number < 0 || number > 5) return nullptr;
  *usable = isa_of(number) != nullptr && machine_has(number);
  return names[number];
}

// What multiplies int8 inputs in instruction set `number`, which is usable.
MC_EXPORT const char* mc_int8(int number) { return isa_of(number) ? isa_of(number)->int8 : nullptr; }

// Reads `bytes` (a multiple of 64) once on all threads: what memory gives at best, for benchmarks.
MC_EXPORT uint64_t mc_read(const uint8_t* at, int64_t bytes, int threads) {
  constexpr int64_t PIECE = 1 << 20;
  struct Context {
    const uint8_t* at;
    int64_t bytes;
    std::atomic<uint64_t> sum;
  } context = {at, bytes, {0}};
  auto task = [](void* with, int64_t i) {
    auto& c = *static_cast<Context*>(with);
    uint64_t sums[8] = {};
    for (int64_t from = i * PIECE; from < c.bytes && from < (i + 1) * PIECE; from += 64) {
      __builtin_prefetch(c.at + from + 8192, 0, 2);
      for (int k = 0; k < 8; ++k) {
        uint64_t word;
        std::memcpy(&word, c.at + from + 8 * k, 8);
        sums[k] += word;
      }
    }
    for (uint64_t sum : sums) c.sum += sum;
  };
  pool_run(pool_threads(threads), (bytes + PIECE - 1) / PIECE, task, &context);
  return context.sum;
}

// gomp_parallel: the function of that name in the OpenMP runtime that this process has already, or null.
MC_EXPORT void mc_use_openmp(void* gomp_parallel) { pool_use_openmp(gomp_parallel); }

MC_EXPORT int mc_threads(int wanted) { return pool_threads(wanted); }

// Expert i from records[i] (a row of the native format) into the blob; null: it shares the bytes of another expert.
MC_EXPORT int mc_pack(const int64_t* table, const uint8_t* const* records, uint8_t* blob, int threads) {
  return guarded([&] {
    constexpr int64_t PARTS = 8;  // of a matrix: a Linear has only one
    struct Context {
      const McLayer& layer;
      const uint8_t* const* records;
      uint8_t* blob;
    } context = {layer_of(table), records, blob};
    auto task = [](void* with, int64_t i) {
      auto& c = *static_cast<Context*>(with);
      const McMatrix& m = matrices_of(&c.layer)[i / PARTS];
      const uint8_t* record = c.records[i / PARTS / c.layer.matrices];
      int64_t part = i % PARTS;
      for (int64_t panel = m.panels * part / PARTS; record && panel < m.panels * (part + 1) / PARTS; ++panel)
        layout_pack(m, record, c.blob, panel);
    };
    pool_run(pool_threads(threads), context.layer.experts * context.layer.matrices * PARTS, task, &context);
    return int(MC_OK);
  });
}

MC_EXPORT int mc_unpack(const int64_t* table, const uint8_t* blob, int64_t expert, uint8_t* record) {
  return guarded([&] {
    const McLayer& layer = layer_of(table);
    if (expert < 0 || expert >= layer.experts) return int(MC_BAD_ID);
    for (int64_t i = 0; i < layer.matrices; ++i) {
      const McMatrix& m = matrices_of(&layer)[expert * layer.matrices + i];
      for (int64_t panel = 0; panel < m.panels; ++panel) layout_unpack(m, blob, record, panel);
    }
    return int(MC_OK);
  });
}

MC_EXPORT int mc_moe_mlp(const int64_t* table, const uint8_t* blob, const void* x, int64_t dtype, const int64_t* ids,
                         const float* weights, int64_t tokens, int64_t per_token, void* out, int threads, int isa) {
  return guarded([&] {
    const Isa* chosen = isa_of(isa);
    if (!chosen || !machine_has(isa)) return int(MC_BAD_ARGUMENT);
    return run_moe(layer_of(table), blob, *chosen, x, dtype, ids, weights, tokens, per_token, out,
                   pool_threads(threads));
  });
}

MC_EXPORT int mc_linear(const int64_t* table, const uint8_t* blob, const void* x, int64_t dtype, int64_t n, void* out,
                        int threads, int isa) {
  return guarded([&] {
    const Isa* chosen = isa_of(isa);
    if (!chosen || !machine_has(isa)) return int(MC_BAD_ARGUMENT);
    return run_linear(layer_of(table), blob, *chosen, x, dtype, n, out, pool_threads(threads));
  });
}
