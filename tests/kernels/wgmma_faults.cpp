// Run by test_cuda_wgmma.py: one product of a warp group under the shim, right or with one fault. `wgmma_faults FAULT` exits
// with 0 when the product is right and with 1 when it is wrong; what the shim itself sees aborts with a message.
#include "cuda_platform.cuh"
#include "cuda_wgmma_shim.cuh"

#include <string>

using namespace mc;

constexpr int kTerms = 32, kColumns = 64;  // two products of 16 terms

struct Params {
  const char* fault;
  const unsigned short* a;  // [64, kTerms]
  const unsigned short* b;  // [kColumns, kTerms]
  float* out;               // [64, kColumns]
};

static bool is(const Params& p, const char* fault) { return std::string(p.fault) == fault; }

static unsigned long long descriptor(const Params& p, const unsigned char* tokens, int warp) {
  unsigned long long start = shared_address(tokens) >> 4, stride = 1024, swizzle = 1, base = 0;
  if (is(p, "stride")) stride = 2048;
  if (is(p, "end")) stride = 4096;
  if (is(p, "swizzle of 64 bytes")) swizzle = 2;
  if (is(p, "base offset")) base = 1;
  if (is(p, "pattern")) start += 8;
  if (is(p, "start")) start += 1;
  if (is(p, "descriptors") && warp == 3) start += 2;
  return start | 1ull << 16 | stride >> 4 << 32 | base << 49 | swizzle << 62;
}

static void load_tokens(const Params& p, unsigned char* tokens) {
  for (int i = threadIdx.x; i < kColumns * kTerms / 8; i += 128) {
    const int column = i / 4, piece = i % 4, swizzled = is(p, "layout") ? piece : piece ^ column % 8;
    copy_async(tokens + column * 128 + 16 * swizzled, p.b + column * kTerms + 8 * piece);
  }
  copy_commit();
  if (!is(p, "copies in flight")) copy_wait<0>();
  if (!is(p, "proxy fence")) async_proxy_fence();
  block_sync();
}

static void product(Params p) {
  MC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned char* tokens = shared + (0u - shared_address(shared)) % 1024;
  load_tokens(p, tokens);
  unsigned a[2][4];
  float d[8][4] = {};
  for (int step = 0; step < 2; ++step)
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i % 2), k = 16 * step + 2 * (lane % 4) + 8 * (i / 2);
      std::memcpy(&a[step][i], p.a + row * kTerms + k, 4);
    }
  if (!is(p, "register fence")) wgmma_fence();
  const unsigned long long b = descriptor(p, tokens, warp);
  wgmma(Bf16{}, d, a[0], b);
  if (!is(p, "one warp") || warp != 2) wgmma(Bf16{}, d, a[1], b + 2);
  if (!is(p, "commit")) wgmma_commit();
  if (is(p, "fragments")) a[1][0] ^= 1;
  if (is(p, "sums")) d[3][1] = 1.0f;
  if (is(p, "shared memory")) tokens[17] ^= 1;
  if (is(p, "copy")) copy_async(tokens, p.b);
  if (is(p, "two groups")) {
    wgmma_wait<1>();
  } else if (!is(p, "wait") && !is(p, "early")) {
    wgmma_wait<0>();
  }
  for (int i = 0; i < 32; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    p.out[row * kColumns + column] = d[i / 4][i % 4];
  }
  if (is(p, "two groups") || is(p, "early")) wgmma_wait<0>();
}

int main(int, char** words) {
  std::vector<unsigned short> a(64 * kTerms), b(kColumns * kTerms);
  for (size_t i = 0; i < a.size(); ++i) a[i] = Bf16::round(static_cast<int>(i * 37 % 101) - 50);
  for (size_t i = 0; i < b.size(); ++i) b[i] = Bf16::round(static_cast<int>(i * 53 % 103) - 50);
  std::vector<float> out(64 * kColumns);
  launch(product, Launch{1, 1, 1, 128, 16 * 1024, false}, nullptr, Params{words[1], a.data(), b.data(), out.data()});
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0;
      for (int k = 0; k < kTerms; ++k)
        sum += static_cast<double>(bf16_to_float(a[row * kTerms + k])) * bf16_to_float(b[column * kTerms + k]);
      if (!(sum == out[row * kColumns + column])) return 1;
    }
  return 0;
}
