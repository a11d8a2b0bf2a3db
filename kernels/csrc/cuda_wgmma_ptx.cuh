// Products of a warp group, four warps, on compute capability 9.0: `wgmma`, for sm_90a alone. The same functions on a
// CPU: cuda_wgmma_shim.cuh. Sections are those of the PTX ISA, version 9.0.
#pragma once

namespace mc {

#define MC_1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MC_8 MC_1(0), MC_1(1), MC_1(2), MC_1(3), MC_1(4), MC_1(5), MC_1(6), MC_1(7)
#define MC_16 MC_8, MC_1(8), MC_1(9), MC_1(10), MC_1(11), MC_1(12), MC_1(13), MC_1(14), MC_1(15)
#define MC_NAMES_8                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20," \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MC_NAMES_16                                                                                      \
  MC_NAMES_8                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51," \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d += a * b with 64 rows, GROUPS * 8 columns and 16 terms (9.7.15.5.2). a: a warp's fragment of its 16 rows, as in
// mma.m16n8k16; b: K-major in shared memory, by its descriptor. d and a are the product's until it is waited for.
#define MC_WGMMA(Name, TYPE, GROUPS, N, A, B)                                                              \
  MC_DEVICE void wgmma(Name, float (&d)[GROUPS][4], const unsigned* a, unsigned long long b) {             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE                            \
                 " {" MC_NAMES_##GROUPS "}, {" A "}, " B ", add, 1, 1, 0;\n}"                              \
                 : MC_##GROUPS                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                    \
  }
MC_WGMMA(Bf16, "bf16", 8, "64", "%32, %33, %34, %35", "%36")
MC_WGMMA(Fp16, "f16", 8, "64", "%32, %33, %34, %35", "%36")
MC_WGMMA(Bf16, "bf16", 16, "128", "%64, %65, %66, %67", "%68")
MC_WGMMA(Fp16, "f16", 16, "128", "%64, %65, %66, %67", "%68")
#undef MC_WGMMA
#undef MC_NAMES_16
#undef MC_NAMES_8
#undef MC_16
#undef MC_8
#undef MC_1

// Registers written so far are seen by the products that follow (9.7.15.7.1).
MC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Products so far are one group (9.7.15.7.2); until at most kPending groups are not complete (9.7.15.7.3).
MC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
MC_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading a sum before the wait in front of this.
MC_DEVICE void wgmma_result(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// This thread's writes to shared memory, asynchronous copies that landed among them, are seen by products, which read
// through another proxy (9.7.15.4).
MC_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace mc
