// cuda_wgmma_ptx.cuh on a CPU, for tests: products of a warp group from their documented operands (PTX ISA 9.0, section
// 9.7.15). The matrix in shared memory is read through its descriptor and swizzle, so a wrong place of a byte is seen.
//
// As strict as the documentation allows a GPU to be. A product takes place when it is waited for, warp by warp; until
// then its sums are NaN, and sums, fragments or shared memory that change under it are errors. So are products without
// a fence of registers, shared memory without a fence of the proxies, groups that are not committed or not waited for,
// copies into memory that a product still reads, and warps of a group that multiply with different descriptors.
#pragma once

#include <list>
#include <map>

namespace mc {
namespace shim {

constexpr int kSharedBase = 1152;  // where a block's shared memory begins: no multiple of a swizzle's pattern
constexpr unsigned kUnfinished = 0x7fc0deadu;  // NaN

struct Tokens {  // the operand in shared memory: 16 terms of each column
  std::vector<Word4> pieces;  // [columns, 2]
  std::vector<float> values;  // [16, columns]
};

struct Sums {  // a warp's part of an accumulator while products work on it
  float* registers[32];
  std::vector<float> values;  // [32, registers of a lane]
  int products = 0;
};

struct Product {
  Sums* sums;
  const unsigned* a[32];
  unsigned fragments[32][4];  // when it was issued
  unsigned long long b;
  std::shared_ptr<const Tokens> tokens;
  float (*to_float)(unsigned short);
};

struct WarpProducts {
  bool fenced[32] = {};
  int commits[32] = {}, closed = 0, issued = 0;
  std::deque<std::vector<Product>> groups = std::deque<std::vector<Product>>(1);  // the last one is open
  std::list<Sums> sums;
};

inline long long& count() {  // of all products so far, a warp's part each: for tests that want to know who multiplied
  static long long value = 0;
  return value;
}

struct Products {
  std::vector<WarpProducts> warps;
  std::vector<std::vector<unsigned long long>> order;  // of each warp group: descriptors as they were issued
  std::map<unsigned long long, std::shared_ptr<const Tokens>> known;

  explicit Products(int count) : warps(count), order((count + 3) / 4) {}
  ~Products() {
    for (size_t w = 0; w < warps.size(); ++w) {
      if (!warps[w].sums.empty()) fail("a kernel ends before its products");
      if (warps[w].issued != static_cast<int>(order[w / 4].size())) fail("a product without all warps of its group");
    }
  }
};

inline Products& products() {
  Block& b = block();
  if (!b.products) b.products = std::make_shared<Products>(static_cast<int>(b.warps.size()));
  return *static_cast<Products*>(b.products.get());
}
inline WarpProducts& warp_products() { return products().warps[block().current / 32]; }

// Pieces of 16 bytes of shared memory that hold columns x 16 terms, K-major, by the matrix descriptor (9.7.15.5.1.2.2).
inline std::vector<int> pieces_of(unsigned long long b, int columns) {
  const unsigned start = (b & 0x3fff) << 4, stride = (b >> 32 & 0x3fff) << 4, mode = static_cast<unsigned>(b >> 62);
  constexpr unsigned long long reserved = 3ull << 14 | 3ull << 30 | 7ull << 46 | 0x3ffull << 52;
  if (b & reserved) fail("reserved bits of a matrix descriptor");
  if (mode != 1) fail("only swizzles of 128 bytes are known here");
  if (b >> 49 & 7 || start & 0x380 || stride & 0x3ff) fail("a swizzle's pattern begins at no multiple of 1024 bytes");
  std::vector<int> pieces;
  for (int column = 0; column < columns; ++column)
    for (int half = 0; half < 2; ++half) {  // rows of 128 bytes, eight to a pattern: bits 4 to 6 are xored with 7 to 9
      const unsigned address = start + column / 8 * stride + column % 8 * 128 + 16 * half;
      const int at = static_cast<int>((address ^ (address >> 7 & 7) << 4)) - kSharedBase;
      if (at < 0 || at + 16 > block().shared_bytes) fail("a product reads past its shared memory");
      pieces.push_back(at / 16);
    }
  return pieces;
}

inline std::vector<Word4> read_pieces(const std::vector<int>& pieces) {
  std::vector<Word4> found(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) std::memcpy(&found[i], block().shared + 16 * pieces[i], 16);
  return found;
}
inline bool same_bytes(const std::vector<Word4>& a, const std::vector<Word4>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 16 * a.size()) == 0;
}

// What a product reads, now; converted once for all warps that read the same.
template <class T>
std::shared_ptr<const Tokens> read_tokens(unsigned long long b, int columns) {
  const std::vector<int> pieces = pieces_of(b, columns);
  for (const int at : pieces) {
    if (block().unfenced[at]) fail("a product reads what was copied without a fence of the proxies");
    ++block().reads[at];
  }
  auto& known = products().known[b];
  std::vector<Word4> found = read_pieces(pieces);
  if (known && same_bytes(found, known->pieces)) return known;
  auto tokens = std::make_shared<Tokens>();
  tokens->values.resize(16 * columns);
  for (int i = 0; i < 16 * columns; ++i) {
    unsigned short bits;
    std::memcpy(&bits, reinterpret_cast<const unsigned char*>(found.data()) + 2 * i, 2);
    tokens->values[i % 16 * columns + i / 16] = T::to_float(bits);
  }
  tokens->pieces = std::move(found);
  return known = tokens;
}

__attribute__((optimize("O3"), noinline)) inline void multiply(float* sums, const float* left, const float* right,
                                                               int columns) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n) sums[row * columns + n] += left[16 * row + k] * right[k * columns + n];
}

// Register i of a lane: row and column of the accumulator's 16 rows of a warp (9.7.15.5.1.1.1, figure of D).
inline int place_of(int lane, int i, int columns) {
  return (lane / 4 + 8 * (i % 4 / 2)) * columns + i / 4 * 8 + 2 * (lane % 4) + i % 2;
}

inline void finish(WarpProducts& warp, const Product& p) {
  const int columns = static_cast<int>(p.tokens->values.size()) / 16, size = columns / 2;
  const std::vector<int> pieces = pieces_of(p.b, columns);
  if (!same_bytes(read_pieces(pieces), p.tokens->pieces)) fail("shared memory changed under a product");
  for (const int at : pieces) --block().reads[at];
  float left[256];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {  // (9.7.15.5.1.1.1, figure of A)
      if (p.a[lane][i / 2] != p.fragments[lane][i / 2]) fail("fragments changed under a product");
      const int row = lane / 4 + 8 * (i / 2 % 2), k = 2 * (lane % 4) + i % 2 + 8 * (i / 4);
      left[16 * row + k] = p.to_float(static_cast<unsigned short>(p.fragments[lane][i / 2] >> 16 * (i % 2)));
    }
  std::vector<float> all(16 * columns);
  for (int i = 0; i < 32 * size; ++i) all[place_of(i / size, i % size, columns)] = p.sums->values[i];
  multiply(all.data(), left, p.tokens->values.data(), columns);
  for (int i = 0; i < 32 * size; ++i) p.sums->values[i] = all[place_of(i / size, i % size, columns)];
  if (--p.sums->products) return;
  for (int i = 0; i < 32 * size; ++i) {
    float& sum = p.sums->registers[i / size][i % size];
    if (float_to_bits(sum) != kUnfinished) fail("sums changed under a product");
    sum = p.sums->values[i];
  }
  warp.sums.remove_if([&](const Sums& one) { return &one == p.sums; });
}

struct Operands {
  float* d;
  const unsigned* a;
  unsigned long long b;
};
inline const Operands& operands(const Warp& warp, int lane) {
  return *static_cast<const Operands*>(warp.brought[lane]);
}

// The accumulator of a product: the one that earlier products still work on, or the registers as they are.
inline Sums& sums_of(WarpProducts& mine, const Warp& warp, int size) {
  for (Sums& one : mine.sums)
    if (one.registers[0] == operands(warp, 0).d) return one;
  mine.sums.emplace_back();
  Sums& made = mine.sums.back();
  made.values.resize(32 * size);
  for (int lane = 0; lane < 32; ++lane) {
    made.registers[lane] = operands(warp, lane).d;
    for (int i = 0; i < size; ++i) {
      made.values[lane * size + i] = made.registers[lane][i];
      made.registers[lane][i] = bits_to_float(kUnfinished);
    }
  }
  return made;
}

// All lanes have called wgmma_commit() equally often.
inline void close_groups(WarpProducts& mine) {
  for (const int commits : mine.commits)
    if (commits != mine.commits[0]) fail("lanes of a warp commit different groups");
  for (; mine.closed < mine.commits[0]; ++mine.closed) mine.groups.emplace_back();
}

template <class T>
void issue(const Warp& warp, int columns) {
  WarpProducts& mine = warp_products();
  close_groups(mine);
  for (const bool fenced : mine.fenced)
    if (!fenced) fail("a product without a fence of its registers");
  const unsigned long long b = operands(warp, 0).b;
  auto& order = products().order[block().current / 128];
  if (mine.issued == static_cast<int>(order.size())) order.push_back(b);
  if (order[mine.issued++] != b) fail("warps of a group multiply with different descriptors");
  Product p;
  p.sums = &sums_of(mine, warp, columns / 2);
  ++p.sums->products;
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& one = operands(warp, lane);
    if (one.b != b || one.d != p.sums->registers[lane]) fail("lanes of a warp have different operands");
    p.a[lane] = one.a;
    std::memcpy(p.fragments[lane], one.a, 16);
  }
  p.b = b;
  p.tokens = read_tokens<T>(b, columns);
  p.to_float = T::to_float;
  mine.groups.back().push_back(std::move(p));
  ++count();
}

}  // namespace shim

inline unsigned shared_address(const void* p) {
  return shim::kSharedBase + static_cast<unsigned>(static_cast<const unsigned char*>(p) - shim::block().shared);
}

template <class T, int kGroups>
void wgmma(T, float (&d)[kGroups][4], const unsigned* a, unsigned long long b) {
  const shim::Operands mine{&d[0][0], a, b};
  shim::meet(&mine, [](shim::Warp& warp) { shim::issue<T>(warp, 8 * kGroups); });
}

inline void wgmma_fence() { shim::warp_products().fenced[shim::block().current % 32] = true; }
inline void wgmma_commit() { ++shim::warp_products().commits[shim::block().current % 32]; }
template <int kPending>
void wgmma_wait() {
  shim::meet(nullptr, [](shim::Warp&) {
    shim::WarpProducts& mine = shim::warp_products();
    shim::close_groups(mine);
    if (!mine.groups.back().empty()) shim::fail("a wait for products that were not committed");
    while (static_cast<int>(mine.groups.size()) - 1 > kPending) {
      for (const shim::Product& p : mine.groups.front()) shim::finish(mine, p);
      mine.groups.pop_front();
    }
    for (bool& fenced : mine.fenced) fenced = false;  // threads may touch registers again
  });
}
inline void wgmma_result(float&) {}

inline void async_proxy_fence() {
  for (const int at : shim::fiber().landed) --shim::block().unfenced[at];
  shim::fiber().landed.clear();
}

}  // namespace mc
