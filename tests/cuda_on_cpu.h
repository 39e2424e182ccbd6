// Runs a CUDA kernel of independent warps on a CPU, one warp after another, its lanes as fibres that meet at every
// __syncwarp and shuffle. Enough of CUDA for src/zerofit/kernels/selective_scan.cu; slow, and exact where PTX approximates.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

#define ON_A_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH__ 900

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }

constexpr int STACK = 1 << 18;
static ucontext_t home, lanes[32];
static char stacks[32][STACK];
static bool over[32];
static int lane;
static float passed[32];

inline void __syncwarp() { swapcontext(&lanes[lane], &home); }
inline float shuffle(float v, int mask) {
  passed[lane] = v;
  __syncwarp();
  float r = passed[lane ^ mask];
  __syncwarp();
  return r;
}
inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
inline float rcp(float x) { return 1.f / x; }
inline unsigned bf16_bits(float f) {
  unsigned u = __float_as_uint(f);
  return f != f ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
inline unsigned ptx_bf16x2(float a, float b) { return bf16_bits(a) | bf16_bits(b) << 16; }
inline unsigned f16_bits(float f) { _Float16 h = (_Float16)f; uint16_t u; std::memcpy(&u, &h, 2); return u; }
inline unsigned ptx_f16x2(float a, float b) { return f16_bits(a) | f16_bits(b) << 16; }
inline float ptx_from_f16(uint16_t v) { _Float16 h; std::memcpy(&h, &v, 2); return (float)h; }
template <int E> inline void add_floats(float *p, const float *v) { for (int i = 0; i < E; i++) p[i] += v[i]; }

template <class P> struct Job { static void (*kernel)(const P); static const P *parameters; static void enter() {
  kernel(*parameters);
  over[lane] = true;
} };
template <class P> void (*Job<P>::kernel)(const P);
template <class P> const P *Job<P>::parameters;

template <class P> void launch(void (*kernel)(const P), const P &p, unsigned gx, unsigned gy, unsigned threads) {
  Job<P>::kernel = kernel;
  Job<P>::parameters = &p;
  blockDim = {threads, 1, 1};
  for (unsigned y = 0; y < gy; y++) for (unsigned x = 0; x < gx; x++) for (unsigned t = 0; t < threads; t += 32) {
    blockIdx = {x, y, 0};
    for (lane = 0; lane < 32; lane++) {
      over[lane] = false;
      getcontext(&lanes[lane]);
      lanes[lane].uc_stack.ss_sp = stacks[lane];
      lanes[lane].uc_stack.ss_size = STACK;
      lanes[lane].uc_link = &home;
      makecontext(&lanes[lane], (void (*)())Job<P>::enter, 0);
    }
    for (bool more = true; more;) {
      more = false;
      for (lane = 0; lane < 32; lane++) if (!over[lane]) {
        threadIdx = {t + lane, 0, 0};
        swapcontext(&home, &lanes[lane]);
        more |= !over[lane];
      }
    }
  }
}
