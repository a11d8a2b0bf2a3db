// The AMX tile instructions that isa_amx.cpp uses, on arrays: compiled in their place where MC_AMX_EMULATED is defined.
// From the processor manual's pseudocode; a shape or a palette that a processor would refuse ends the process.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void require(bool holds) {
  if (!holds) std::abort();
}

inline void loadconfig(const void* at) {
  uint8_t raw[64];
  std::memcpy(raw, at, 64);
  require(raw[0] == 1 && raw[1] == 0);
  for (int i = 2; i < 16; ++i) require(raw[i] == 0);
  for (int t = 0; t < 16; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, raw + 16 + 2 * t, 2);
    int rows = raw[48 + t];
    require(t < 8 ? rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) : rows == 0 && bytes == 0);
    if (t < 8) {
      std::memset(tiles[t].data, 0, sizeof tiles[t].data);
      tiles[t].rows = rows, tiles[t].bytes = bytes;
    }
  }
  configured = true;
}

inline void release() { configured = false; }

inline void loadd(int t, const void* base, int64_t stride) {
  require(configured && tiles[t].rows > 0);
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(tiles[t].data[r], static_cast<const uint8_t*>(base) + r * stride, tiles[t].bytes);
}

inline void stored(int t, void* base, int64_t stride) {
  require(configured && tiles[t].rows > 0);
  for (int r = 0; r < tiles[t].rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles[t].data[r], tiles[t].bytes);
}

// sum[m][n] += signed a[m][4k + i] * unsigned b[k][4n + i]
inline void dpbsud(int sum, int a, int b) {
  Tile &c = tiles[sum], &left = tiles[a], &right = tiles[b];
  require(configured && sum != a && sum != b && a != b);
  require(c.rows == left.rows && c.bytes == right.bytes && left.bytes == 4 * right.rows && c.bytes % 4 == 0);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      int32_t total;
      std::memcpy(&total, c.data[m] + 4 * n, 4);
      for (int k = 0; k < right.rows; ++k)
        for (int i = 0; i < 4; ++i)
          total = int32_t(uint32_t(total) + uint32_t(int32_t(int8_t(left.data[m][4 * k + i])) * int32_t(right.data[k][4 * n + i])));
      std::memcpy(c.data[m] + 4 * n, &total, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated::loadconfig
#define _tile_release emulated::release
#define _tile_loadd emulated::loadd
#define _tile_stored emulated::stored
#define _tile_dpbsud emulated::dpbsud
