// AVX2 with FMA: float32 activations, 8 lanes; int8 activations by products of pairs of bytes and of 16-bit pairs.
#include "mc_cpu.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "activate.h"
#include "panel_f32.h"
#include "panel_int.h"

namespace {

struct V {
  static constexpr int LANES = 8, ROWS = 2;
  __m256 x;

  static V set(float value) { return {_mm256_set1_ps(value)}; }
  static V zero() { return {_mm256_setzero_ps()}; }
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static V load_bf16(const uint16_t* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static V load_u8(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v.x); }
  static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static V add(V a, V b) { return {_mm256_add_ps(a.x, b.x)}; }
  static V sub(V a, V b) { return {_mm256_sub_ps(a.x, b.x)}; }

  static __m256i line(const uint8_t* lines, int number, int part) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + number * LINE + part * 32));
  }

  template <int B>
  struct Codes {
    __m256 table;  // up to three bits; four and eight are converted
    __m256i mask, centre;
    explicit Codes(bool binary) {
      float values[8];
      for (int i = 0; i < 8; ++i) {
        int code = i % (1 << (B < 3 ? B : 3));
        values[i] = binary ? float(2 * code - 1) : float(code - (1 << B) / 2);
      }
      table = _mm256_loadu_ps(values);
      mask = _mm256_set1_epi32((1 << B) - 1);
      centre = _mm256_set1_epi32((1 << B) / 2);
    }
    V decode(const uint8_t* lines, int c, int part) const {
      __m256i code;
      if (B == 3 && c >= 30) {
        int at = 15 + 16 * (c & 1);
        code = _mm256_and_si256(_mm256_srli_epi32(line(lines, 0, part), at), _mm256_set1_epi32(1));
        __m256i second = _mm256_srli_epi32(line(lines, 1, part), at - 1);
        __m256i third = _mm256_srli_epi32(line(lines, 2, part), at - 2);
        code = _mm256_or_si256(code, _mm256_and_si256(second, _mm256_set1_epi32(2)));
        code = _mm256_or_si256(code, _mm256_and_si256(third, _mm256_set1_epi32(4)));
      } else {
        code = _mm256_srli_epi32(line(lines, line_of(B, c), part), shift_of(B, c));
      }
      if (B <= 3) return {_mm256_permutevar8x32_ps(table, code)};
      return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(code, mask), centre))};
    }
  };
};

template <>
struct V::Codes<16> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int part) const {
    __m256i pair = line(lines, c / 2, part);
    __m256i value = c & 1 ? _mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000u))) : _mm256_slli_epi32(pair, 16);
    return {_mm256_castsi256_ps(value)};
  }
};

template <>
struct V::Codes<32> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int part) const {
    return load(reinterpret_cast<const float*>(lines + c * LINE + part * 32));
  }
};

struct W {
  static constexpr int LANES = 8, ROWS = 2, CHAINS = 2;
  using V = ::V;
  __m256i x;

  static W zero() { return {_mm256_setzero_si256()}; }
  static W set(int32_t value) { return {_mm256_set1_epi32(value)}; }
  static W load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static void store(void* p, W w) { _mm256_storeu_si256(static_cast<__m256i*>(p), w.x); }
  static W load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set(four);
  }
  template <int N>
  static W right(W w) { return {_mm256_srli_epi32(w.x, N)}; }
  template <int N>
  static W left(W w) { return {_mm256_slli_epi32(w.x, N)}; }
  static W mask(W w, uint32_t bits) { return {_mm256_and_si256(w.x, _mm256_set1_epi32(int32_t(bits)))}; }
  static W pick(uint32_t bits, W a, W b) {
    __m256i select = _mm256_set1_epi32(int32_t(bits));
    return {_mm256_or_si256(_mm256_and_si256(select, a.x), _mm256_andnot_si256(select, b.x))};
  }
  static W add(W a, W b) { return {_mm256_add_epi32(a.x, b.x)}; }
  static W sub(W a, W b) { return {_mm256_sub_epi32(a.x, b.x)}; }
  static W mul(W a, W b) { return {_mm256_mullo_epi32(a.x, b.x)}; }
  template <int B>
  static W dot(W sum, W codes, W inputs) {
    if (B < 8) {  // two products of a code below 16 fit 16 bits
      __m256i pairs = _mm256_maddubs_epi16(codes.x, inputs.x);
      return {_mm256_add_epi32(sum.x, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
    }
    __m256i even = _mm256_and_si256(codes.x, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes.x, 8);
    __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(inputs.x, 8), 8), high = _mm256_srai_epi16(inputs.x, 8);
    __m256i four = _mm256_add_epi32(_mm256_madd_epi16(even, low), _mm256_madd_epi16(odd, high));
    return {_mm256_add_epi32(sum.x, four)};
  }
  static V to_float(W w) { return {_mm256_cvtepi32_ps(w.x)}; }
  static V fma(V a, V b, V c) { return V::fma(a, b, c); }
};

const Isa ISA = {"AVX2", false, F32<V>::panel, nullptr, "AVX2", Int<W>::panel, activate};

}  // namespace

const Isa* isa_avx2() { return &ISA; }
#else
const Isa* isa_avx2() { return nullptr; }
#endif
