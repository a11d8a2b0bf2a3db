// AVX-512 without bf16 and byte products: activations in float32; int8 activations as on AVX2.
#include "mc_cpu.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"

namespace {
void integers(const PanelCall& call) { isa_avx2()->integers(call); }

const Isa ISA = {"AVX-512", false, F32<V>::panel, nullptr, "AVX2", integers, activate};
}  // namespace

const Isa* isa_avx512() { return &ISA; }
#else
const Isa* isa_avx512() { return nullptr; }
#endif
