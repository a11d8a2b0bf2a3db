// AVX2 with FMA: float32 activations, 8 lanes.
#include "mc_cpu.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "activate.h"
#include "panel_f32.h"

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

const Isa ISA = {"AVX2", false, false, F32<V>::panel, activate};

}  // namespace

const Isa* isa_avx2() { return &ISA; }
#else
const Isa* isa_avx2() { return nullptr; }
#endif
