// Codes to packed pairs of 16-bit floats: a masked code is or-ed into the mantissa of a power of two, and one fused
// multiply-add brings it to u - 2^(bits-1), exactly. Shifts are needed only where the mantissa ends (7 or 10 bits).
#pragma once

#include "cuda_layout.cuh"

namespace mc {

// Bits of a whole number as a 16-bit float; it must fit the mantissa.
template <class T>
MC_BOTH constexpr unsigned short float_bits(int value) {
  const int size = value < 0 ? -value : value;
  if (size == 0) return 0;
  int exponent = 0;
  while (size >> (exponent + 1)) ++exponent;
  const int below = size - (1 << exponent);
  const int mantissa = exponent <= T::kMantissa ? below << (T::kMantissa - exponent) : below >> (exponent - T::kMantissa);
  return static_cast<unsigned short>((value < 0 ? 0x8000 : 0) | (exponent + T::kBias) << T::kMantissa | mantissa);
}

MC_BOTH constexpr unsigned twice(unsigned half) { return half << 16 | half; }

template <class T>
MC_BOTH constexpr unsigned power2(int exponent) {  // 2^exponent in both halves
  return twice(static_cast<unsigned>((exponent + T::kBias) << T::kMantissa));
}

// How far to shift a word so that the code at bit `at` lies inside the mantissa: as few different shifts as possible.
template <class T, int kBits>
MC_BOTH constexpr int shift_for(int at) {
  int base = 0;
  for (int bit = 0; bit <= at; bit += kBits)
    if (bit + kBits - base > T::kMantissa) base = bit;
  return base;
}

template <int kBits>
struct Width {
  static constexpr int value = kBits;
};

// Calls `work` with the Width of a matrix: a loop is compiled for each of them.
template <class Work>
MC_DEVICE void for_width(int bits, const Work& work) {
  switch (bits) {
    case 1:
      return work(Width<1>{});
    case 2:
      return work(Width<2>{});
    case 3:
      return work(Width<3>{});
    case 4:
      return work(Width<4>{});
    default:
      return work(Width<8>{});
  }
}

// Pair kPair, 0 to 15, of half a tile, which is kBits words of a lane: two values u - 2^(kBits-1).
template <class T, int kBits, int kPair>
MC_DEVICE unsigned dequant(const unsigned* words) {
  constexpr unsigned magic = twice(float_bits<T>(1 << T::kMantissa));
  constexpr int centre = 1 << (kBits - 1);
  if constexpr (kBits == 8 && T::kMantissa < 8) {  // 128 + high and 128 + low nibble; 16 * high + low - 128 is exact
    const unsigned word = words[kPair / 2] >> (kPair % 2 * 8);
    const unsigned high = (word >> 4 & 0x000f000fu) | magic, low = (word & 0x000f000fu) | magic;
    constexpr unsigned sixteen = twice(float_bits<T>(16)), less = twice(float_bits<T>(-16 * 128 - 128 - 128));
    const unsigned top = T::fma2(high, sixteen, less);
    return T::fma2(low, twice(float_bits<T>(1)), top);
  } else if constexpr (kBits == 3 && kPair == 15) {  // the pair in the spare bits
    const unsigned code =
        (words[0] >> 12 & 0x00080008u) | (words[1] >> 11 & 0x00100010u) | (words[2] >> 10 & 0x00200020u);
    constexpr unsigned eighth = power2<T>(-3), less = twice(float_bits<T>(-((1 << T::kMantissa) / 8 + centre)));
    return T::fma2(code | magic, eighth, less);
  } else {
    constexpr int per = kBits == 3 ? 5 : 16 / kBits;
    constexpr int at = kPair % per * kBits, shift = shift_for<T, kBits>(at), left = at - shift;
    constexpr unsigned mask = twice(((1u << kBits) - 1) << left);
    constexpr unsigned unit = power2<T>(-left), less = twice(float_bits<T>(-((1 << T::kMantissa) / (1 << left) + centre)));
    const unsigned code = (words[kPair / per] >> shift & mask) | magic;
    return T::fma2(code, unit, less);
  }
}

// The A fragments of block kBlock, 0 or 1, of half a tile (32 columns: two steps of the mma).
template <class T, int kBits, int kBlock>
MC_DEVICE void fragments(const unsigned* words, unsigned (&a)[8]) {
  a[0] = dequant<T, kBits, 8 * kBlock>(words);
  a[1] = dequant<T, kBits, 8 * kBlock + 1>(words);
  a[2] = dequant<T, kBits, 8 * kBlock + 2>(words);
  a[3] = dequant<T, kBits, 8 * kBlock + 3>(words);
  a[4] = dequant<T, kBits, 8 * kBlock + 4>(words);
  a[5] = dequant<T, kBits, 8 * kBlock + 5>(words);
  a[6] = dequant<T, kBits, 8 * kBlock + 6>(words);
  a[7] = dequant<T, kBits, 8 * kBlock + 7>(words);
}

// A lane's words of half a tile, from shared memory.
template <int kBits>
MC_DEVICE void load_words(const unsigned char* tile, int lane, int half, unsigned* words) {
  if constexpr (kBits % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      const Word4 four = load_shared(tile + 512 * (kBits / 4 * half + i) + 16 * lane);
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i)
      words[i] = *reinterpret_cast<const unsigned*>(tile + word_offset(kBits, lane, half * kBits + i));
  }
}

struct Pair {
  float first, second;  // of rows lane / 4 and lane / 4 + 8
};

MC_DEVICE Pair load_pair(const unsigned char* values, int kind, int lane, int group, int groups) {
  const int index = scale_index(lane / 4, group, groups) / 2;
  if (kind == kF32) {
    const float* both = reinterpret_cast<const float*>(values) + 2 * index;
    return {both[0], both[1]};
  }
  if (kind == kU8) return {static_cast<float>(values[2 * index]), static_cast<float>(values[2 * index + 1])};
  const unsigned both = reinterpret_cast<const unsigned*>(values)[index];
  if (kind == kBf16) return {bits_to_float(both << 16), bits_to_float(both & 0xffff0000u)};
  return {fp16_to_float(static_cast<unsigned short>(both)), fp16_to_float(static_cast<unsigned short>(both >> 16))};
}

// z - 2^(bits-1) of a lane's two rows.
MC_DEVICE Pair load_offset(const unsigned char* tile, const Descriptor& d, int lane, int group) {
  if (d.zero == kNone) return {d.centre, d.centre};
  const float middle = static_cast<float>(1 << (d.bits - 1));
  const Pair zero = load_pair(tile + code_bytes(d.bits) + scale_bytes(d), d.zero, lane, group, d.groups);
  return {zero.first - middle, zero.second - middle};
}

MC_DEVICE Pair load_scale(const unsigned char* tile, const Descriptor& d, int lane, int group) {
  return load_pair(tile + code_bytes(d.bits), d.scale, lane, group, d.groups);
}

MC_DEVICE bool has_offset(const Descriptor& d) { return d.zero != kNone || d.centre != 0.0f; }

}  // namespace mc
