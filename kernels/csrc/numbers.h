// Conversions between float types, round to nearest even. In an anonymous namespace: every source compiles its own copy
// for its own instruction set, and the linker must never mix them.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t to_bf16(float x) {
  uint32_t u = bits_of(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40) : rounded);  // NaN stays NaN
}

inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  float magnitude = float_of(rest << 13) * float_of(0x77800000u);  // 2^112 rebiases, also subnormals
  return float_of(bits_of(magnitude) | sign);
}

inline uint16_t to_f16(float x) {
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (rest < 0x38800000u) {  // below the smallest normal: let float addition do the rounding
    float shifted = float_of(rest) + float_of(0x3f000000u);
    return uint16_t(sign | (bits_of(shifted) - 0x3f000000u));
  }
  uint32_t odd = (rest >> 13) & 1;
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace
