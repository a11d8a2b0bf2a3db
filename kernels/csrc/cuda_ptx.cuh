// The machine as a GPU gives it: thin wrappers, one instruction each.
#pragma once

#define MC_BOTH __host__ __device__ __forceinline__
#define MC_DEVICE __device__ __forceinline__
#define MC_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define MC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace mc {

struct alignas(16) Word4 {
  unsigned x, y, z, w;
};

MC_BOTH float bits_to_float(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}
MC_DEVICE unsigned float_to_bits(float value) { return __float_as_uint(value); }
MC_BOTH float bf16_to_float(unsigned short bits) { return bits_to_float(static_cast<unsigned>(bits) << 16); }
MC_BOTH float fp16_to_float(unsigned short bits) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return 0.0f * bits;  // device code only
#endif
}

// A 16-bit float: TYPE, its name in PTX; CONVERT, its bits to float32.
#define MC_SIXTEEN_BITS(Name, MANTISSA, BIAS, TYPE, CONVERT)                                                          \
  struct Name {                                                                                                        \
    static constexpr int kMantissa = MANTISSA, kBias = BIAS;                                                           \
    static MC_DEVICE unsigned fma2(unsigned a, unsigned b, unsigned c) {                                               \
      unsigned d;                                                                                                      \
      asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));                                     \
      return d;                                                                                                        \
    }                                                                                                                  \
    static MC_DEVICE unsigned pack2(float low, float high) {                                                           \
      unsigned d;                                                                                                      \
      asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));                                        \
      return d;                                                                                                        \
    }                                                                                                                  \
    static MC_DEVICE float to_float(unsigned short bits) { return CONVERT(bits); }                                     \
    static MC_DEVICE void mma(float (&d)[4], const unsigned* a, unsigned b0, unsigned b1) {                            \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                              \
                   ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                        \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                    \
    }                                                                                                                  \
  };
MC_SIXTEEN_BITS(Bf16, 7, 127, "bf16", bf16_to_float)
MC_SIXTEEN_BITS(Fp16, 10, 15, "f16", fp16_to_float)
#undef MC_SIXTEEN_BITS

MC_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, not through L1; zeros when not `valid`.
MC_DEVICE void copy_async(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// As above for bytes that are read once: the first to leave L2.
MC_DEVICE void stream_async(void* to, const void* from, unsigned long long policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}
MC_DEVICE unsigned long long evict_first() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
MC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
MC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch: the next kernel may start / wait for the one before to be complete and visible.
MC_DEVICE void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
MC_DEVICE void wait_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

MC_DEVICE Word4 load_shared(const void* p) { return *static_cast<const Word4*>(p); }
MC_DEVICE Word4 load_global(const void* p) { return *static_cast<const Word4*>(p); }
MC_DEVICE void block_sync() { __syncthreads(); }
MC_DEVICE bool block_any(bool value) { return __syncthreads_or(value); }
MC_DEVICE void warp_sync() { __syncwarp(); }
MC_DEVICE unsigned same_value(int value) { return __match_any_sync(0xffffffffu, value); }
MC_DEVICE int count_bits(unsigned value) { return __popc(value); }
MC_DEVICE void add_shared(int* p, int value) { atomicAdd(p, value); }

struct Launch {
  int x, y, z, threads, shared;
  bool overlap;  // may start before the kernel before it ends; it calls wait_previous()
};

// Launches with room for `shared` bytes. Returns a CUDA error code.
template <class Params>
int launch(void (*kernel)(Params), const Launch& l, void* stream, Params params) {
  if (l.shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(l.x, l.y, l.z);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = l.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace mc
