// AVX-512 with VNNI: int8 activations; those in float32 take the path of isa_avx512.cpp.
#include "mc_cpu.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vnni.h"

namespace {

void panel(const PanelCall& call) { isa_avx512()->panel(call); }

const Isa ISA = {"AVX-512 VNNI", false, panel, nullptr, "AVX-512 VNNI", Int<W>::panel, activate};

}  // namespace

const Isa* isa_avx512_vnni() { return &ISA; }
#else
const Isa* isa_avx512_vnni() { return nullptr; }
#endif
