// From gate_up's output to down's input, in float32: f(min(gate, limit)) * (clamp(up, +-limit) + shift).
// Comparisons are written so that NaN stays NaN.
#pragma once

#include "cuda_args.cuh"
#include "cuda_layout.cuh"

namespace mc {

MC_DEVICE float apply_function(int function, float alpha, float x) {
  switch (function) {
    case MC_SILU:
      return x / (1.0f + expf(-alpha * x));
    case MC_GELU:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case MC_GELU_TANH:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case MC_RELU:
      return x < 0.0f ? 0.0f : x;
    case MC_RELU2:
      return x < 0.0f ? 0.0f : x * x;
    default:
      return x;
  }
}

MC_DEVICE float activate(const McActivation& a, float gate, float up) {
  gate = gate > a.limit ? a.limit : gate;
  const float left = apply_function(a.function, a.alpha, gate);
  if (!a.gated) return left;
  up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
  return left * (up + a.shift);
}

// Bias of output row `channel`; half 1 = the up row of a gated matrix, whose rows are halves or interleaved.
MC_DEVICE float bias_of(const McMatrix& m, const McActivation& a, int expert, int channel, int half) {
  if (!m.bias) return 0.0f;
  int row = channel;
  if (a.gated) row = a.interleaved ? 2 * channel + half : half * (m.rows / 2) + channel;
  return load_value(m.bias, m.bias_dtype, static_cast<long long>(expert) * m.rows + row);
}

template <class T>
MC_DEVICE void store_value(void* to, long long i, float value) {
  static_cast<unsigned short*>(to)[i] = static_cast<unsigned short>(T::pack2(value, 0.0f));
}

}  // namespace mc
