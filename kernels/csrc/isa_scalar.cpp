// Plain C++: runs everywhere, and is what the others are compared with.
#define MC_NO_UNROLL
#include "activate.h"
#include "panel_f32.h"

namespace {

struct V {
  static constexpr int LANES = 16, ROWS = 2;
  float x[LANES];

  static V set(float value) {
    V v;
    for (float& lane : v.x) lane = value;
    return v;
  }
  static V zero() { return set(0.0f); }
  static V load(const float* p) {
    V v;
    std::memcpy(v.x, p, sizeof v.x);
    return v;
  }
  static V load_bf16(const uint16_t* p) {
    V v;
    for (int i = 0; i < LANES; ++i) v.x[i] = from_bf16(p[i]);
    return v;
  }
  static V load_u8(const uint8_t* p) {
    V v;
    for (int i = 0; i < LANES; ++i) v.x[i] = p[i];
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, v.x, sizeof v.x); }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < LANES; ++i) c.x[i] += a.x[i] * b.x[i];
    return c;
  }
  static V add(V a, V b) {
    for (int i = 0; i < LANES; ++i) a.x[i] += b.x[i];
    return a;
  }
  static V sub(V a, V b) {
    for (int i = 0; i < LANES; ++i) a.x[i] -= b.x[i];
    return a;
  }

  template <int B>
  struct Codes {
    float step, centre;
    explicit Codes(bool binary) : step(binary ? 2.0f : 1.0f), centre(binary ? 1.0f : float(1u << (B - 1))) {}
    V decode(const uint8_t* lines, int c, int) const {
      V v;
      for (int r = 0; r < LANES; ++r) {
        uint32_t code;
        if (B == 3 && c >= 30) {
          code = 0;
          for (int i = 0; i < 3; ++i) code |= (lane(lines, i, r) >> (15 + 16 * (c & 1)) & 1) << i;
        } else {
          code = lane(lines, line_of(B, c), r) >> shift_of(B, c) & ((1u << B) - 1);
        }
        v.x[r] = step * float(int(code)) - centre;
      }
      return v;
    }
    static uint32_t lane(const uint8_t* lines, int line, int r) {
      uint32_t word;
      std::memcpy(&word, lines + line * LINE + r * 4, 4);
      return word;
    }
  };
};

template <>
struct V::Codes<16> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int) const {
    V v;
    for (int r = 0; r < LANES; ++r) {
      uint16_t half;
      std::memcpy(&half, lines + c / 2 * LINE + r * 4 + c % 2 * 2, 2);
      v.x[r] = from_bf16(half);
    }
    return v;
  }
};

template <>
struct V::Codes<32> {
  explicit Codes(bool) {}
  V decode(const uint8_t* lines, int c, int) const { return load(reinterpret_cast<const float*>(lines + c * LINE)); }
};

const Isa ISA = {"scalar", false, false, F32<V>::panel, activate};

}  // namespace

const Isa* isa_scalar() { return &ISA; }
