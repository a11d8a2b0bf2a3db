// AVX-512 without bf16 products: activations in float32.
#include "mc_cpu.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"

namespace {
const Isa ISA = {"AVX-512", false, false, F32<V>::panel, activate};
}  // namespace

const Isa* isa_avx512() { return &ISA; }
#else
const Isa* isa_avx512() { return nullptr; }
#endif
