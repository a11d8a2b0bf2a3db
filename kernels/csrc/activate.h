// Activations in float32, written so that the compiler vectorises them for the instruction set of the including source.
#pragma once
#include <cmath>

#include "mc_cpu.h"
#include "numbers.h"

namespace {

// e^x for finite x, relative error below 2e-7; 0 and infinity beyond the range of float32. NaN stays NaN.
inline float exp_f32(float x) {
  float held = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
  float n = std::nearbyint(held * 1.44269504088896341f);
  float r = held - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t half = int32_t(n) / 2, rest = int32_t(n) - half;  // 2^128 is no float: two steps
  float result = p * float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(rest + 127) << 23);
  result = x < -103.0f ? 0.0f : x > 88.73f ? HUGE_VALF : result;
  return x == x ? result : x;
}

inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

inline float tanh_f32(float x) { return 1.0f - 2.0f / (exp_f32(2.0f * x) + 1.0f); }

template <int64_t F>
inline float function_of(float x, float alpha) {
  if (F == MC_SILU) return x * sigmoid_f32(alpha * x);
  if (F == MC_GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  if (F == MC_GELU_TANH) return 0.5f * x * (1.0f + tanh_f32(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  float positive = x < 0.0f ? 0.0f : x;  // NaN stays NaN
  return F == MC_RELU2 ? positive * positive : positive;
}

// Comparisons are written so that NaN passes through, as torch.clamp lets it.
template <int64_t F>
void activate_with(const ActivationCall& call) {
  float alpha = float(call.layer->alpha), limit = float(call.layer->limit), shift = float(call.layer->shift);
  int width = call.layer->gated ? BLOCK : PANEL;
  float done[PANEL];
  for (int64_t i = 0; i < call.n; ++i) {
    const float* row = call.panel + i * PANEL;
    if (call.layer->gated) {
      for (int r = 0; r < BLOCK; ++r) {
        float gate = row[r] > limit ? limit : row[r], up = row[BLOCK + r];
        up = up > limit ? limit : up < -limit ? -limit : up;
        done[r] = function_of<F>(gate, alpha) * (up + shift);
      }
    } else {
      for (int r = 0; r < PANEL; ++r) done[r] = function_of<F>(row[r] > limit ? limit : row[r], alpha);
    }
    int64_t keep = call.keep < width ? call.keep : width;
    for (int64_t r = 0; r < keep; ++r) call.dst[i][r] = done[r];
  }
}

void activate(const ActivationCall& call) {
  switch (call.layer->function) {
    case MC_SILU: return activate_with<MC_SILU>(call);
    case MC_GELU: return activate_with<MC_GELU>(call);
    case MC_GELU_TANH: return activate_with<MC_GELU_TANH>(call);
    case MC_RELU: return activate_with<MC_RELU>(call);
    default: return activate_with<MC_RELU2>(call);
  }
}

}  // namespace
