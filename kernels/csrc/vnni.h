// int32 lanes of AVX-512 with VNNI: four products of a code and an int8 activation per lane and instruction.
#pragma once
#include "avx512.h"
#include "panel_int.h"

namespace {

struct W {
  static constexpr int LANES = 16, ROWS = 10, CHAINS = 4;
  using V = ::V;
  __m512i x;

  static W zero() { return {_mm512_setzero_si512()}; }
  static W set(int32_t value) { return {_mm512_set1_epi32(value)}; }
  static W load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static void store(void* p, W w) { _mm512_storeu_si512(p, w.x); }
  static W load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set(four);
  }
  template <int N>
  static W right(W w) { return {_mm512_srli_epi32(w.x, N)}; }
  template <int N>
  static W left(W w) { return {_mm512_slli_epi32(w.x, N)}; }
  static W mask(W w, uint32_t bits) { return {_mm512_and_si512(w.x, _mm512_set1_epi32(int32_t(bits)))}; }
  static W pick(uint32_t bits, W a, W b) {
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(int32_t(bits)), a.x, b.x, 0xca)};
  }
  static W add(W a, W b) { return {_mm512_add_epi32(a.x, b.x)}; }
  static W sub(W a, W b) { return {_mm512_sub_epi32(a.x, b.x)}; }
  static W mul(W a, W b) { return {_mm512_mullo_epi32(a.x, b.x)}; }
  template <int B>
  static W dot(W sum, W codes, W inputs) { return {_mm512_dpbusd_epi32(sum.x, codes.x, inputs.x)}; }
  static V to_float(W w) { return {_mm512_cvtepi32_ps(w.x)}; }
  static V fma(V a, V b, V c) { return V::fma(a, b, c); }
};

}  // namespace
