// What the kernels need from a machine, twice: PTX on a GPU, plain C++ on a CPU (cuda_shim.cuh, for tests).
// No CUDA header is used in device code; number formats are handled as bits.
#pragma once

#ifdef MC_SHIM
#include "cuda_shim.cuh"
#else
#include <cuda_runtime.h>
#include "cuda_ptx.cuh"
#endif
