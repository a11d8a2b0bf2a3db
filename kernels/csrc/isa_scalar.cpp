// Plain C++: runs everywhere, and is what the others are compared with.
#define MC_NO_UNROLL
#include "activate.h"
#include "panel_f32.h"
#include "panel_int.h"

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

template <class F>
inline void each(const F& f) {
  for (int i = 0; i < V::LANES; ++i) f(i);
}

struct W {
  static constexpr int LANES = 16, ROWS = 4, CHAINS = 2;
  using V = ::V;
  uint32_t x[LANES];  // unsigned: shifts fill with zeros and sums wrap

  static W zero() { return set(0); }
  static W set(int32_t value) {
    W w;
    each([&](int i) { w.x[i] = uint32_t(value); });
    return w;
  }
  static W load(const void* p) {
    W w;
    std::memcpy(w.x, p, sizeof w.x);
    return w;
  }
  static void store(void* p, W w) { std::memcpy(p, w.x, sizeof w.x); }
  static W load_u8(const uint8_t* p) {
    W w;
    each([&](int i) { w.x[i] = p[i]; });
    return w;
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return set(four);
  }
  template <int N>
  static W right(W w) {
    each([&](int i) { w.x[i] >>= N; });
    return w;
  }
  template <int N>
  static W left(W w) {
    each([&](int i) { w.x[i] <<= N; });
    return w;
  }
  static W mask(W w, uint32_t bits) {
    each([&](int i) { w.x[i] &= bits; });
    return w;
  }
  static W pick(uint32_t bits, W a, W b) {
    each([&](int i) { a.x[i] = (a.x[i] & bits) | (b.x[i] & ~bits); });
    return a;
  }
  static W add(W a, W b) {
    each([&](int i) { a.x[i] += b.x[i]; });
    return a;
  }
  static W sub(W a, W b) {
    each([&](int i) { a.x[i] -= b.x[i]; });
    return a;
  }
  static W mul(W a, W b) {
    each([&](int i) { a.x[i] *= b.x[i]; });
    return a;
  }
  template <int B>
  static W dot(W sum, W codes, W inputs) {
    each([&](int i) {
      int32_t total = 0;
      for (int byte = 0; byte < 32; byte += 8)
        total += int32_t(codes.x[i] >> byte & 0xff) * int8_t(uint8_t(inputs.x[i] >> byte));
      sum.x[i] += uint32_t(total);
    });
    return sum;
  }
  static V to_float(W w) {
    V v;
    each([&](int i) { v.x[i] = float(int32_t(w.x[i])); });
    return v;
  }
  static V fma(V a, V b, V c) {
    each([&](int i) { c.x[i] = std::fma(a.x[i], b.x[i], c.x[i]); });
    return c;
  }
};

const Isa ISA = {"scalar", false, F32<V>::panel, nullptr, "plain C++", Int<W>::panel, activate};

}  // namespace

const Isa* isa_scalar() { return &ISA; }
