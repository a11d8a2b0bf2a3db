// Input rows in the forms that panels multiply: padded for a group size, as bf16, float32 or int8, maybe rounded to codes.
#pragma once
#include <cmath>

#include "mc_cpu.h"
#include "numbers.h"

namespace {

struct Rows {             // n rows of one form
  int64_t type = MC_F32;  // of the elements
  int64_t bytes = 0;      // per row
  const uint8_t* at = nullptr;
  const float* sums = nullptr;   // [n][groups], or null
  const float* offsets = nullptr;  // [n][groups] of offset_sums, or null
  const float* steps = nullptr;  // [n]: what the codes of a rounded row count, or null
  int64_t groups = 0;

  const void* row(int64_t i) const { return at + i * bytes; }
  const float* sum(int64_t i) const { return sums ? sums + i * groups : nullptr; }
  const float* offset(int64_t i) const { return offsets ? offsets + i * groups : nullptr; }
};

inline float load_as(const void* row, int64_t type, int64_t i) {
  if (type == MC_F32) return static_cast<const float*>(row)[i];
  uint16_t half = static_cast<const uint16_t*>(row)[i];
  return type == MC_BF16 ? from_bf16(half) : from_f16(half);
}

inline void to_floats(const void* row, int64_t type, int64_t n, float* out) {
  if (type == MC_F32) std::memcpy(out, row, n * 4);
  else if (type == MC_BF16) for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(static_cast<const uint16_t*>(row)[i]);
  else for (int64_t i = 0; i < n; ++i) out[i] = from_f16(static_cast<const uint16_t*>(row)[i]);
}

inline void from_floats(const float* row, int64_t type, int64_t n, void* out) {
  if (type == MC_F32) std::memcpy(out, row, n * 4);
  else if (type == MC_BF16) for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(out)[i] = to_bf16(row[i]);
  else for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(out)[i] = to_f16(row[i]);
}

inline float narrowed(float x, int64_t type) {
  return type == MC_F32 ? x : type == MC_BF16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x));
}

// Codes of one row, in place, and the step they count. A row with NaN or Inf gets step NaN, so its results are NaN.
inline float round_row(float* row, int64_t n, const McInput& form) {
  int32_t most = 0;  // sizes of floats are in the order of their bits, and integers have vector instructions everywhere
  for (int64_t i = 0; i < n; ++i) {
    int32_t size = int32_t(bits_of(row[i]) & 0x7fffffffu);
    most = size > most ? size : most;
  }
  if (most >= 0x7f800000) {
    for (int64_t i = 0; i < n; ++i) row[i] = 0.0f;
    return NAN;
  }
  float top = float((1 << (form.rounding - 1)) - 1), step = float_of(uint32_t(most)) * float(form.factor);
  step = step > 0.0f ? step : 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    float code = row[i] / step;
    code = code > top ? top : code < -top - 1.0f ? -top - 1.0f : code;
    row[i] = (code + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers, ties to even
  }
  return step;
}

// values: [groups * group] float32, changed. out: the padded row; sums [groups] and step where the form has them.
inline void form_row(float* values, const McInput& form, int64_t type, uint8_t* out, float* sums, float* step) {
  int64_t n = form.groups * form.group;
  int place[TILE];
  for (int c = 0; form.order && c < TILE; ++c) place[c] = quad_place(int(form.order), c);
  if (form.rounding) *step = round_row(values, n, form);
  for (int64_t g = 0; g < form.groups; ++g) {
    const float* from = values + g * form.group;
    if (type == MC_F32) {
      float* to = reinterpret_cast<float*>(out) + g * form.padded;
      std::memcpy(to, from, form.group * 4);
      std::memset(to + form.group, 0, (form.padded - form.group) * 4);
    } else if (type == MC_I8) {
      int8_t* to = reinterpret_cast<int8_t*>(out) + g * form.padded;
      std::memset(to, 0, form.padded);
      for (int64_t i = 0; i < form.group; ++i) to[i / TILE * TILE + place[i % TILE]] = int8_t(from[i]);
    } else {
      uint16_t* to = reinterpret_cast<uint16_t*>(out) + g * form.padded;
      for (int64_t i = 0; i < form.group; ++i) to[i] = to_bf16(from[i]);
      std::memset(to + form.group, 0, (form.padded - form.group) * 2);
    }
    if (form.sums) {
      float parts[8] = {};
      int64_t i = 0;
      for (; i + 8 <= form.group; i += 8)
        for (int k = 0; k < 8; ++k) parts[k] += from[i + k];
      for (; i < form.group; ++i) parts[0] += from[i];
      sums[g] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    }
  }
}

// Codes are multiplied as integers, unless by a matrix without codes. bf16 products need a bf16 matrix path, and values
// that are bf16 already or codes, which bf16 holds exactly.
inline int64_t row_type(const McInput& form, const Isa& isa, int64_t dtype) {
  if (form.order) return MC_I8;
  return isa.bf16 && form.dtype == MC_BF16 && (form.rounding || dtype == MC_BF16) ? MC_BF16 : MC_F32;
}

// Rows that many bytes apart fall into different sets of the first cache. A power of two would put them all into one.
constexpr int64_t FEW = 2;  // rows: these are read beside each other without harm
inline bool spread(int64_t bytes) { return bytes / 64 % 2 == 1; }
inline int64_t apart(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

inline bool used_as_is(const McInput& form, int64_t type, int64_t dtype) {
  return type == dtype && !form.rounding && !form.sums && form.padded == form.group;
}

}  // namespace
