// Selective scan, forward and backward, channel-last. Compiled at run time by NVRTC; includes no header.
//
// Shapes: u, delta, z, out (batch, length, width), B, C (batch, length, STATES_PADDED) of type X; A (width, STATES_PADDED),
// D, bias (width) fp32, the last three padded with zeros to whole warps; see selective_scan.py for the formulas.
//
// One warp owns WIDTH = 32 / GROUPS * CH neighbouring channels and walks its chunk of time alone; there is no block-wide
// barrier. A lane holds CH channels x S states; GROUPS = STATES_PADDED / S lanes share a channel:
//     lane = group * LANES + slot,   channels slot*CH .. slot*CH+CH-1,   states group*S .. group*S+S-1
// Time is taken in tiles of T steps. At the start of a tile each lane loads EP neighbouring channels of one step (a 16
// byte load where it can), computes softplus and gate once for each (step, channel), and leaves dt and dt*u in shared
// memory. The loop over steps then reads shared memory only; the next tile's loads are under way meanwhile.
// Sums over states (y, d(dt u), d(dt A)) and over channels (dB, dC) are transposing reductions: with every shuffle a
// lane gives away half of its values, so that V values over V lanes take V-1 shuffles and each lane ends with one.
//
// The forward pass keeps the state before every INTERVAL-th step. The backward pass takes the intervals from last to
// first: it runs the recurrence through the interval once, leaving the state before every R-th step in shared memory,
// then goes back through it, R steps at a time held in registers.
//
// Macros given by the compiler's options: X_TYPE 0 fp32, 1 bf16, 2 fp16; STATES; STATES_PADDED; LANE_CHANNELS,
// LANE_STATES, TILE, SPAN (CH, S, T and R below); INTERVAL;
// VEC 1 where rows of u, delta, z, grad are aligned for vector loads and width is a multiple of EP; HAS_Z;
// DETERMINISTIC; MIN_BLOCKS; FORWARD_UNROLL; PREFIX_UNROLL; PACK; BACKWARD 0 or 1 (which pass this module holds); PARAMS_BYTES.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

constexpr int CH = LANE_CHANNELS, S = LANE_STATES, T = TILE, R = SPAN;
constexpr int GROUPS = STATES_PADDED / S;
constexpr int LANES = 32 / GROUPS;
constexpr int WIDTH = LANES * CH;
constexpr int EP = WIDTH * T / 32;    // elements a lane loads of each tensor and tile
constexpr int PER_ROW = WIDTH / EP;   // lanes a row of a tile
constexpr int ROW2 = WIDTH + 2;       // padded row of float2 in shared memory: no bank conflicts when tiles are staged
constexpr int ROW1 = WIDTH + 4;
constexpr int BC_TILE = T * STATES_PADDED / 32;
constexpr int BC_VEC = BC_TILE < 8 ? BC_TILE : 8;
constexpr int BC_LOADS = BC_TILE / BC_VEC;
static_assert(GROUPS >= 1 && GROUPS <= 32 && STATES_PADDED % S == 0, "states");
static_assert(T <= 32 && INTERVAL % T == 0 && T % R == 0 && R % 4 == 0 && EP >= 1 && BC_TILE >= 1, "tile");

struct Params {
  const void *u, *delta, *z, *B, *C, *grad;
  const float *A, *D, *bias;
  void *out, *du, *ddelta, *dz;
  float *states;        // (batch, ceil(length / INTERVAL), width, STATES)
  float *dA, *dBC;      // (batch, chunks, padded width, STATES_PADDED); (batch, length, 2 STATES_PADDED), or one for each warp
  float *dD, *dbias;    // (batch, chunks, padded width)
  float *carry;         // (batch, chunks, padded width, STATES_PADDED): state or gradient that enters a chunk
  float *decay;         // (batch, chunks, padded width): sum of dt over a chunk
  i64 u_batch, delta_batch, z_batch, B_batch, C_batch, grad_batch;  // strides in bytes
  int u_row, delta_row, z_row, B_row, C_row, grad_row;
  int length, width, padded, intervals, chunk, chunks, batch, columns;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher fills this structure");

// --- what is the GPU's own: tests/cuda_on_cpu.h has its counterpart ---------------------------------------------------

#ifndef ON_A_CPU
__device__ __forceinline__ float ex2(float x) { float r; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float lg2(float x) { float r; asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float rcp(float x) { float r; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float shuffle(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
__device__ __forceinline__ u32 ptx_bf16x2(float a, float b) {
  u32 r; asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(b), "f"(a)); return r;
}
__device__ __forceinline__ u32 ptx_f16x2(float a, float b) {
  u32 r; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(b), "f"(a)); return r;
}
__device__ __forceinline__ float ptx_from_f16(u16 v) { float f; asm("cvt.f32.f16 %0,%1;" : "=f"(f) : "h"(v)); return f; }
// Atomic additions to E neighbouring addresses. The assembly has no memory clobber on purpose: nothing in the kernel
// reads these addresses, and a clobber would hold back the loads that follow.
template <int E> __device__ __forceinline__ void add_floats(float *p, const float *v) {
  #if __CUDA_ARCH__ >= 900
  if constexpr (E == 4) {
    asm volatile("red.global.add.v4.f32 [%0],{%1,%2,%3,%4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
    return;
  } else if constexpr (E == 2) {
    asm volatile("red.global.add.v2.f32 [%0],{%1,%2};" ::"l"(p), "f"(v[0]), "f"(v[1]));
    return;
  }
  #endif
  #pragma unroll
  for (int i = 0; i < E; i++) asm volatile("red.global.add.f32 [%0],%1;" ::"l"(p + i), "f"(v[i]));
}
#endif

__device__ __forceinline__ float sigmoid(float x) { return rcp(1.f + ex2(-x * LOG2E)); }
// log(1 + e^x); the series where 1 + e would round e away.
__device__ __forceinline__ float softplus(float x) {
  float e = ex2(x * LOG2E);
  float series = e * (1.f + e * (-0.5f + e * (0.33333334f + e * (-0.25f + e * (0.2f - e * 0.16666667f)))));
  float y = e < 0.125f ? series : LN2 * lg2(1.f + e);
  return x > 20.f ? x : y;
}

// --- element types ---------------------------------------------------------------------------------------------------

#if X_TYPE == 0
typedef float X;
__device__ __forceinline__ float widen(const u32 *w, int i) { return __uint_as_float(w[i]); }
__device__ __forceinline__ float widen1(X x) { return x; }
__device__ __forceinline__ X narrow1(float f) { return f; }
#elif X_TYPE == 1
struct X { u16 v; };
__device__ __forceinline__ float widen(const u32 *w, int i) {
  return __uint_as_float((i & 1) ? (w[i >> 1] & 0xffff0000u) : (w[i >> 1] << 16));
}
__device__ __forceinline__ float widen1(X x) { return __uint_as_float((u32)x.v << 16); }
__device__ __forceinline__ u32 narrow2(float a, float b) { return ptx_bf16x2(a, b); }
__device__ __forceinline__ X narrow1(float f) { X x; x.v = (u16)ptx_bf16x2(f, 0.f); return x; }
#else
struct X { u16 v; };
__device__ __forceinline__ float widen1(X x) { return ptx_from_f16(x.v); }
__device__ __forceinline__ float widen(const u32 *w, int i) { X x; x.v = (u16)(w[i >> 1] >> (16 * (i & 1))); return widen1(x); }
__device__ __forceinline__ u32 narrow2(float a, float b) { return ptx_f16x2(a, b); }
__device__ __forceinline__ X narrow1(float f) { X x; x.v = (u16)ptx_f16x2(f, 0.f); return x; }
#endif

// E neighbouring elements as they lie in memory, in 32-bit words.
template <int E> struct Raw {
  static constexpr int BYTES = E * sizeof(X), WORDS = (BYTES + 3) / 4;
  u32 w[WORDS];
  __device__ __forceinline__ void zero() {
    #pragma unroll
    for (int i = 0; i < WORDS; i++) w[i] = 0;
  }
  __device__ __forceinline__ float get(int i) const { return widen(w, i); }
  __device__ __forceinline__ void load(const X *p) {  // aligned to min(BYTES, 16)
    if constexpr (BYTES >= 16) {
      #pragma unroll
      for (int i = 0; i < WORDS / 4; i++) {
        uint4 q = ((const uint4 *)p)[i];
        w[4 * i] = q.x; w[4 * i + 1] = q.y; w[4 * i + 2] = q.z; w[4 * i + 3] = q.w;
      }
    } else if constexpr (BYTES == 8) { uint2 q = *(const uint2 *)p; w[0] = q.x; w[1] = q.y;
    } else if constexpr (BYTES == 4) { w[0] = *(const u32 *)p;
    } else { w[0] = *(const u16 *)p; }
  }
  __device__ __forceinline__ void load_masked(const X *p, int valid) {
    zero();
    #pragma unroll
    for (int i = 0; i < E; i++)
      if (i < valid) {
        if constexpr (sizeof(X) == 4) w[i] = ((const u32 *)p)[i];
        else w[i >> 1] |= (u32)((const u16 *)p)[i] << (16 * (i & 1));
      }
  }
  static __device__ __forceinline__ void store(X *p, const float *f) {
    u32 w[WORDS];
    #pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if constexpr (sizeof(X) == 4) w[i] = __float_as_uint(f[i]);
      #if X_TYPE != 0
      else w[i] = E == 1 ? narrow1(f[0]).v : narrow2(f[2 * i], f[(2 * i + 1) % E]);
      #endif
    }
    copy_words(p, w);
  }
  __device__ __forceinline__ void copy(X *p) const { copy_words(p, w); }
  static __device__ __forceinline__ void copy_words(X *p, const u32 *w) {
    if constexpr (BYTES >= 16) {
      #pragma unroll
      for (int i = 0; i < WORDS / 4; i++) ((uint4 *)p)[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    } else if constexpr (BYTES == 8) { *(uint2 *)p = make_uint2(w[0], w[1]);
    } else if constexpr (BYTES == 4) { *(u32 *)p = w[0];
    } else { *(u16 *)p = (u16)w[0]; }
  }
};
typedef Raw<EP> Piece;

// The lane's elements of row t. Rows behind the end and columns behind the width are read from inside the tensor: what is
// computed from them is multiplied by zero (`stage_inputs`) and never stored.
__device__ __forceinline__ const char *at(const void *p, i64 batch_stride, int batch) {
  return (const char *)p + batch * batch_stride;
}
__device__ __forceinline__ void load_piece(Piece &r, const char *p, int row_stride, int t, int end, int column, int width) {
  const X *row = (const X *)(p + (i64)(t < end ? t : end - 1) * row_stride);
#if VEC
  r.load(row + (column < width ? column : width - EP));
#else
  r.load_masked(row + column, width - column);
#endif
}
__device__ __forceinline__ void store_piece(X *row, int column, int width, const float *f) {
#if VEC
  if (column < width) Piece::store(row + column, f);
#else
  #pragma unroll
  for (int i = 0; i < EP; i++) if (column + i < width) row[column + i] = narrow1(f[i]);
#endif
}

template <int E> __device__ __forceinline__ void load_floats(float *d, const float *s) {
  if constexpr (E % 4 == 0) {
    #pragma unroll
    for (int i = 0; i < E; i += 4) { float4 q = *(const float4 *)(s + i); d[i] = q.x; d[i + 1] = q.y; d[i + 2] = q.z; d[i + 3] = q.w; }
  } else if constexpr (E % 2 == 0) {
    #pragma unroll
    for (int i = 0; i < E; i += 2) { float2 q = *(const float2 *)(s + i); d[i] = q.x; d[i + 1] = q.y; }
  } else {
    #pragma unroll
    for (int i = 0; i < E; i++) d[i] = s[i];
  }
}
template <int E> __device__ __forceinline__ void store_floats(float *d, const float *s) {
  if constexpr (E % 4 == 0) {
    #pragma unroll
    for (int i = 0; i < E; i += 4) *(float4 *)(d + i) = make_float4(s[i], s[i + 1], s[i + 2], s[i + 3]);
  } else if constexpr (E % 2 == 0) {
    #pragma unroll
    for (int i = 0; i < E; i += 2) *(float2 *)(d + i) = make_float2(s[i], s[i + 1]);
  } else {
    #pragma unroll
    for (int i = 0; i < E; i++) d[i] = s[i];
  }
}

// Sums V values over N lanes that lie STRIDE apart; q is this lane's place among them. Lane q ends with the values
// q*V/N .. of V >= N, with value q/(N/V) of V < N (then N/V lanes hold the same).
template <int V, int N, int STRIDE> __device__ __forceinline__ void reduce(float *v, int q) {
  if constexpr (N > 1 && V > 1) {
    bool high = q & (N / 2);
    #pragma unroll
    for (int i = 0; i < V / 2; i++) {
      float keep = high ? v[i + V / 2] : v[i], give = high ? v[i] : v[i + V / 2];
      v[i] = keep + shuffle(give, N / 2 * STRIDE);
    }
    reduce<V / 2, N / 2, STRIDE>(v, q);
  } else if constexpr (N > 1) {
    v[0] += shuffle(v[0], N / 2 * STRIDE);
    reduce<1, N / 2, STRIDE>(v, q);
  }
}

// --- what both passes share ------------------------------------------------------------------------------------------

// Where this warp works. A unit is one warp's channels in one sample; a block is one warp.
struct Place {
  int lane, group, slot, row, column, first;  // column: of the lane's piece; first: its first channel
  int warp_column, batch, chunk, begin, end;
  bool live;  // whether the lane's piece lies inside the width
  __device__ __forceinline__ Place(const Params &p, int skipped = 0) {
    lane = threadIdx.x; group = lane / LANES; slot = lane % LANES; row = lane / PER_ROW;
    const int units = p.batch * p.columns, unit = blockIdx.x % units;
    chunk = blockIdx.x / units + skipped; begin = chunk * p.chunk;
    end = begin + p.chunk < p.length ? begin + p.chunk : p.length;
    batch = unit / p.columns; warp_column = unit % p.columns;
    first = warp_column * WIDTH + slot * CH; column = warp_column * WIDTH + lane % PER_ROW * EP;
    live = column < p.width;
  }
};

typedef Raw<BC_VEC> BCPiece;
struct BCTile { BCPiece v[BC_LOADS]; };
__device__ __forceinline__ void load_bc(BCTile &r, const char *p, int row_stride, int t0, int end, int lane) {
  #pragma unroll
  for (int k = 0; k < BC_LOADS; k++) {
    const int e = (k * 32 + lane) * BC_VEC, t = t0 + e / STATES_PADDED;
    r.v[k].load((const X *)(p + (i64)(t < end ? t : end - 1) * row_stride) + e % STATES_PADDED);
  }
}
// B and C in shared memory: as fp32, or (PACK) in the 16-bit type they came in, which halves what the loop reads of them
// and costs the widening.
#if PACK
typedef X Staged;
__device__ __forceinline__ void stage_bc(Staged *shared, const BCTile &r, int lane) {
  #pragma unroll
  for (int k = 0; k < BC_LOADS; k++) r.v[k].copy(shared + (k * 32 + lane) * BC_VEC);
}
template <int E> __device__ __forceinline__ void load_staged(float *d, const Staged *s) {
  Raw<E> r;
  r.load(s);
  #pragma unroll
  for (int i = 0; i < E; i++) d[i] = r.get(i);
}
#else
typedef float Staged;
__device__ __forceinline__ void stage_bc(Staged *shared, const BCTile &r, int lane) {
  #pragma unroll
  for (int k = 0; k < BC_LOADS; k++) {
    float f[BC_VEC];
    #pragma unroll
    for (int i = 0; i < BC_VEC; i++) f[i] = r.v[k].get(i);
    store_floats<BC_VEC>(shared + (k * 32 + lane) * BC_VEC, f);
  }
}
template <int E> __device__ __forceinline__ void load_staged(float *d, const Staged *s) { load_floats<E>(d, s); }
#endif
// dt and dt*u of the lane's piece into shared memory.
__device__ __forceinline__ void stage_inputs(float2 *shared, const Piece &u, const Piece &delta, const float *bias, float inside) {  // inside: 1 or 0
  float f[2 * EP];
  #pragma unroll
  for (int i = 0; i < EP; i++) { f[2 * i] = softplus(delta.get(i) + bias[i]) * inside; f[2 * i + 1] = f[2 * i] * u.get(i); }
  store_floats<2 * EP>((float *)shared, f);
}
__device__ __forceinline__ void load_states(float (&h)[CH][S], const float *p, int first, int width, int group) {
  #pragma unroll
  for (int c = 0; c < CH; c++) {
    #pragma unroll
    for (int k = 0; k < S; k++) h[c][k] = 0.f;
    if (first + c < width) {
      const float *q = p + (i64)(first + c) * STATES + group * S;
      if constexpr (STATES == STATES_PADDED) load_floats<S>(h[c], q);
      else
        #pragma unroll
        for (int k = 0; k < S; k++) if (group * S + k < STATES) h[c][k] = q[k];
    }
  }
}
__device__ __forceinline__ void store_states(float *p, const float (&h)[CH][S], int first, int width, int group) {
  #pragma unroll
  for (int c = 0; c < CH; c++)
    if (first + c < width) {
      float *q = p + (i64)(first + c) * STATES + group * S;
      if constexpr (STATES == STATES_PADDED) store_floats<S>(q, h[c]);
      else
        #pragma unroll
        for (int k = 0; k < S; k++) if (group * S + k < STATES) q[k] = h[c][k];
    }
}
// The same for buffers that are padded to whole warps: (.., padded width, STATES_PADDED).
__device__ __forceinline__ i64 padded_at(const Params &p, const Place &w) {
  return (((i64)w.batch * p.chunks + w.chunk) * p.padded + w.first) * STATES_PADDED + w.group * S;
}
// One step of the recurrence for the lane's channels and states; e: dt, dt*u of each channel.
__device__ __forceinline__ void step(float (&h)[CH][S], const float (&A2)[CH][S], const float *e, const float *b) {
  #pragma unroll
  for (int c = 0; c < CH; c++)
    #pragma unroll
    for (int k = 0; k < S; k++) h[c][k] = ex2(e[2 * c] * A2[c][k]) * h[c][k] + e[2 * c + 1] * b[k];
}
// Sums V = 4 steps over the lanes of a channel and leaves them in shared[t][channel]; at: the address for step 0.
__device__ __forceinline__ void reduce_steps(float *shared, float (&y)[CH][4], int group) {
  constexpr int HELD = GROUPS >= 4 ? 1 : 4 / GROUPS;
  #pragma unroll
  for (int c = 0; c < CH; c++) reduce<4, GROUPS, LANES>(y[c], group);
  int t = GROUPS >= 4 ? group / (GROUPS / 4 ? GROUPS / 4 : 1) : group * HELD;
  #pragma unroll
  for (int m = 0; m < HELD; m++) {
    float f[CH];
    #pragma unroll
    for (int c = 0; c < CH; c++) f[c] = y[c][m];
    store_floats<CH>(shared + (t + m) * ROW1, f);
  }
}

#if BACKWARD == 0

// --- forward ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(32, MIN_BLOCKS) scan_forward(const __grid_constant__ Params p) {
  __shared__ __align__(16) float2 sE[T * ROW2];
  __shared__ __align__(16) Staged sB[T * STATES_PADDED], sC[T * STATES_PADDED];
  __shared__ __align__(16) float sY[T * ROW1];
  const Place w(p);
  const char *u = at(p.u, p.u_batch, w.batch), *delta = at(p.delta, p.delta_batch, w.batch);
  const char *z = at(p.z, p.z_batch, w.batch), *B = at(p.B, p.B_batch, w.batch), *C = at(p.C, p.C_batch, w.batch);
  float A2[CH][S], h[CH][S], bias[EP], skip[EP];
  #pragma unroll
  for (int c = 0; c < CH; c++) {
    load_floats<S>(A2[c], p.A + (i64)(w.first + c) * STATES_PADDED + w.group * S);
    #pragma unroll
    for (int k = 0; k < S; k++) { A2[c][k] *= LOG2E; h[c][k] = 0.f; }
    if (p.chunks > 1) load_floats<S>(h[c], p.carry + padded_at(p, w) + c * STATES_PADDED);
  }
  load_floats<EP>(bias, p.bias + w.column);
  load_floats<EP>(skip, p.D + w.column);
  Piece nu, nd, nz; BCTile nb, nc;
  auto fetch = [&](int t0) {
    const int t = t0 + w.row;
    load_piece(nu, u, p.u_row, t, w.end, w.column, p.width);
    load_piece(nd, delta, p.delta_row, t, w.end, w.column, p.width);
    if (HAS_Z) load_piece(nz, z, p.z_row, t, w.end, w.column, p.width);
    load_bc(nb, B, p.B_row, t0, w.end, w.lane);
    load_bc(nc, C, p.C_row, t0, w.end, w.lane);
  };
  fetch(w.begin);
  #pragma unroll 1
  for (int t0 = w.begin; t0 < w.end; t0 += T) {
    const Piece cu = nu, cz = nz; const bool inside = w.live && t0 + w.row < w.end;
    stage_inputs(sE + w.row * ROW2 + w.lane % PER_ROW * EP, nu, nd, bias, inside ? 1.f : 0.f);
    stage_bc(sB, nb, w.lane);
    stage_bc(sC, nc, w.lane);
    __syncwarp();
    if (t0 + T < w.end) fetch(t0 + T);
    if (t0 % INTERVAL == 0)
      store_states(p.states + ((i64)w.batch * p.intervals + t0 / INTERVAL) * p.width * STATES, h, w.first, p.width, w.group);
    #pragma unroll FORWARD_UNROLL
    for (int i = 0; i < T; i += 4) {
      float y[CH][4];
      #pragma unroll
      for (int j = 0; j < 4; j++) {
        float e[2 * CH], b[S], c[S];
        load_floats<2 * CH>(e, (const float *)(sE + (i + j) * ROW2 + w.slot * CH));
        load_staged<S>(b, sB + (i + j) * STATES_PADDED + w.group * S);
        load_staged<S>(c, sC + (i + j) * STATES_PADDED + w.group * S);
        step(h, A2, e, b);
        #pragma unroll
        for (int m = 0; m < CH; m++) {
          y[m][j] = h[m][0] * c[0];
          #pragma unroll
          for (int k = 1; k < S; k++) y[m][j] += h[m][k] * c[k];
        }
      }
      reduce_steps(sY + i * ROW1 + w.slot * CH, y, w.group);
    }
    __syncwarp();
    if (inside) {
      float o[EP], y[EP];
      load_floats<EP>(y, sY + w.row * ROW1 + w.lane % PER_ROW * EP);
      #pragma unroll
      for (int i = 0; i < EP; i++) {
        o[i] = y[i] + skip[i] * cu.get(i);
        if (HAS_Z) { float g = cz.get(i); o[i] *= g * sigmoid(g); }
      }
      store_piece((X *)p.out + ((i64)w.batch * p.length + t0 + w.row) * p.width, w.column, p.width, o);
    }
    __syncwarp();
  }
}

#endif

// --- chunks of time, for few channels --------------------------------------------------------------------------------

// What a chunk adds by itself: carry <- its last state from zeros (or, REVERSE, the gradient it hands to the chunk
// before it), decay <- its sum of dt. Then `scan_chain` makes of these what enters each chunk.
template <bool REVERSE> __device__ __forceinline__ void chunk_body(const Params &p) {
  __shared__ __align__(16) float2 sE[T * ROW2];
  __shared__ __align__(16) Staged sB[T * STATES_PADDED];
  const Place w(p, REVERSE);  // what the last chunk on the way leaves behind is not needed
  const char *u = REVERSE ? at(p.grad, p.grad_batch, w.batch) : at(p.u, p.u_batch, w.batch);
  const char *B = REVERSE ? at(p.C, p.C_batch, w.batch) : at(p.B, p.B_batch, w.batch);
  const int u_row = REVERSE ? p.grad_row : p.u_row, B_row = REVERSE ? p.C_row : p.B_row;
  const char *delta = at(p.delta, p.delta_batch, w.batch), *z = at(p.z, p.z_batch, w.batch);
  float A2[CH][S], h[CH][S], bias[EP], total[CH];
  #pragma unroll
  for (int c = 0; c < CH; c++) {
    total[c] = 0.f;
    load_floats<S>(A2[c], p.A + (i64)(w.first + c) * STATES_PADDED + w.group * S);
    #pragma unroll
    for (int k = 0; k < S; k++) { A2[c][k] *= LOG2E; h[c][k] = 0.f; }
  }
  load_floats<EP>(bias, p.bias + w.column);
  const int last = w.begin + (w.end - w.begin - 1) / T * T;
  Piece nu, nd, nz; BCTile nb;
  auto fetch = [&](int t0) {
    const int t = t0 + w.row;
    load_piece(nu, u, u_row, t, w.end, w.column, p.width);
    load_piece(nd, delta, p.delta_row, t, w.end, w.column, p.width);
    if (REVERSE && HAS_Z) load_piece(nz, z, p.z_row, t, w.end, w.column, p.width);
    load_bc(nb, B, B_row, t0, w.end, w.lane);
  };
  fetch(REVERSE ? last : w.begin);
  #pragma unroll 1
  for (int done = w.begin; done <= last; done += T) {
    const int t0 = REVERSE ? w.begin + last - done : done; const float inside = w.live && t0 + w.row < w.end ? 1.f : 0.f;
    float f[2 * EP];
    #pragma unroll
    for (int i = 0; i < EP; i++) {
      f[2 * i] = softplus(nd.get(i) + bias[i]) * inside;
      f[2 * i + 1] = nu.get(i) * (REVERSE ? inside : f[2 * i]);
      if (REVERSE && HAS_Z) { float g = nz.get(i); f[2 * i + 1] *= g * sigmoid(g); }
    }
    store_floats<2 * EP>((float *)(sE + w.row * ROW2 + w.lane % PER_ROW * EP), f);
    stage_bc(sB, nb, w.lane);
    __syncwarp();
    if (done < last) fetch(REVERSE ? t0 - T : t0 + T);
    #pragma unroll 4
    for (int i = 0; i < T; i++) {
      const int j = REVERSE ? T - 1 - i : i;
      float e[2 * CH], b[S];
      load_floats<2 * CH>(e, (const float *)(sE + j * ROW2 + w.slot * CH));
      load_staged<S>(b, sB + j * STATES_PADDED + w.group * S);
      #pragma unroll
      for (int c = 0; c < CH; c++) {
        total[c] += e[2 * c];
        #pragma unroll
        for (int k = 0; k < S; k++) {
          float a = ex2(e[2 * c] * A2[c][k]);
          h[c][k] = REVERSE ? a * (e[2 * c + 1] * b[k] + h[c][k]) : a * h[c][k] + e[2 * c + 1] * b[k];
        }
      }
    }
    __syncwarp();
  }
  #pragma unroll
  for (int c = 0; c < CH; c++) {
    store_floats<S>(p.carry + padded_at(p, w) + c * STATES_PADDED, h[c]);
    if (w.group == 0) p.decay[((i64)w.batch * p.chunks + w.chunk) * p.padded + w.first + c] = total[c];
  }
}
#if BACKWARD
#define WAY(name) name##_backward
#else
#define WAY(name) name##_forward
#endif
extern "C" __global__ void __launch_bounds__(32) WAY(scan_chunk)(const __grid_constant__ Params p) { chunk_body<BACKWARD>(p); }

// One thread for each (batch, channel, state): carry becomes what enters each chunk.
template <bool REVERSE> __device__ __forceinline__ void chain_body(const Params &p) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x, batch = blockIdx.y;
  if (e >= p.padded * STATES_PADDED) return;
  const float A2 = p.A[e] * LOG2E; float enters = 0.f;
  for (int i = 0; i < p.chunks; i++) {
    const i64 chunk = (i64)batch * p.chunks + (REVERSE ? p.chunks - 1 - i : i);
    float *c = p.carry + chunk * p.padded * STATES_PADDED + e, own = *c;
    *c = enters;
    if (i == p.chunks - 1) break;  // what it would leave behind was not computed
    enters = own + ex2(p.decay[chunk * p.padded + e / STATES_PADDED] * A2) * enters;
  }
}
extern "C" __global__ void WAY(scan_chain)(const __grid_constant__ Params p) { chain_body<BACKWARD>(p); }

#if BACKWARD

// --- backward --------------------------------------------------------------------------------------------------------

// Adds E neighbouring values of dB or dC (or writes them, where each warp has a buffer of its own).
template <int E> __device__ __forceinline__ void give(float *p, const float *v) {
#if DETERMINISTIC
  store_floats<E>(p, v);
#else
  add_floats<E>(p, v);
#endif
}

extern "C" __global__ void __launch_bounds__(32, MIN_BLOCKS) scan_backward(const __grid_constant__ Params p) {
  constexpr int KEPT = INTERVAL / R;
  __shared__ __align__(16) float4 sH[KEPT][CH * S / 4 ? CH * S / 4 : 1][32];
  __shared__ __align__(16) float2 sE[T * ROW2];
  __shared__ __align__(16) Staged sB[T * STATES_PADDED], sC[T * STATES_PADDED];
  __shared__ __align__(16) float sG[T * ROW1], sY[T * ROW1], sU[T * ROW1], sD[T * ROW1];  // dy; y, d(dt u), d(dt A) / dt
  static_assert(CH * S % 4 == 0, "a lane holds a multiple of four states");
  const Place w(p);
  const char *u = at(p.u, p.u_batch, w.batch), *delta = at(p.delta, p.delta_batch, w.batch);
  const char *z = at(p.z, p.z_batch, w.batch), *grad = at(p.grad, p.grad_batch, w.batch);
  const char *B = at(p.B, p.B_batch, w.batch), *C = at(p.C, p.C_batch, w.batch);
  float A2[CH][S], carry[CH][S], dA[CH][S], dD[EP], dbias[EP];
  #pragma unroll
  for (int c = 0; c < CH; c++) {
    load_floats<S>(A2[c], p.A + (i64)(w.first + c) * STATES_PADDED + w.group * S);
    #pragma unroll
    for (int k = 0; k < S; k++) { A2[c][k] *= LOG2E; carry[c][k] = dA[c][k] = 0.f; }
    if (p.chunks > 1) load_floats<S>(carry[c], p.carry + padded_at(p, w) + c * STATES_PADDED);
  }
  #pragma unroll
  for (int i = 0; i < EP; i++) dD[i] = dbias[i] = 0.f;
  const int piece = w.lane % PER_ROW * EP;
  const i64 rows = (i64)w.batch * p.length;
#if DETERMINISTIC
  float *dBC = p.dBC + ((i64)w.warp_column * p.batch * p.length + rows) * (2 * STATES_PADDED);
#else
  float *dBC = p.dBC + rows * (2 * STATES_PADDED);
#endif
  Piece nu, nd, nz, ng; BCTile nb, nc; float h[CH][S];
  auto fetch = [&](int t0, bool back) {
    const int t = t0 + w.row;
    load_piece(nu, u, p.u_row, t, w.end, w.column, p.width);
    load_piece(nd, delta, p.delta_row, t, w.end, w.column, p.width);
    load_bc(nb, B, p.B_row, t0, w.end, w.lane);
    if (back) {
      if (HAS_Z) load_piece(nz, z, p.z_row, t, w.end, w.column, p.width);
      load_piece(ng, grad, p.grad_row, t, w.end, w.column, p.width);
      load_bc(nc, C, p.C_row, t0, w.end, w.lane);
    }
  };
  auto fetch_states = [&](int t0) {
    load_states(h, p.states + ((i64)w.batch * p.intervals + t0 / INTERVAL) * p.width * STATES, w.first, p.width, w.group);
  };
  int start = w.begin + (w.end - w.begin - 1) / INTERVAL * INTERVAL;
  fetch(start, false);
  fetch_states(start);
  #pragma unroll 1
  for (; start >= w.begin; start -= INTERVAL) {
    const int stop = start + INTERVAL < w.end ? start + INTERVAL : w.end, last = start + (stop - start - 1) / T * T;
    #pragma unroll 1
    for (int t0 = start; t0 <= last; t0 += T) {  // forwards: the states before every R-th step
      float bias[EP];
      load_floats<EP>(bias, p.bias + w.column);
      stage_inputs(sE + w.row * ROW2 + piece, nu, nd, bias, w.live && t0 + w.row < w.end ? 1.f : 0.f);
      stage_bc(sB, nb, w.lane);
      __syncwarp();
      if (t0 < last) fetch(t0 + T, false); else fetch(t0, true);
      #pragma unroll PREFIX_UNROLL
      for (int i = 0; i < T; i += R) {
        #pragma unroll
        for (int k = 0; k < CH * S / 4; k++) store_floats<4>((float *)&sH[(t0 - start + i) / R][k][w.lane], &h[0][0] + 4 * k);
        if (t0 + i + R < stop) {
          #pragma unroll
          for (int j = 0; j < R; j++) {
            float e[2 * CH], b[S];
            load_floats<2 * CH>(e, (const float *)(sE + (i + j) * ROW2 + w.slot * CH));
            load_staged<S>(b, sB + (i + j) * STATES_PADDED + w.group * S);
            step(h, A2, e, b);
          }
        }
      }
      __syncwarp();
    }
    #pragma unroll 1
    for (int t0 = last; t0 >= start; t0 -= T) {  // backwards
      const Piece cu = nu, cd = nd, cz = nz, cg = ng; const bool inside = w.live && t0 + w.row < w.end;
      {
        float bias[EP], dy[EP];
        load_floats<EP>(bias, p.bias + w.column);
        stage_inputs(sE + w.row * ROW2 + piece, nu, nd, bias, inside ? 1.f : 0.f);
        #pragma unroll
        for (int i = 0; i < EP; i++) {
          dy[i] = cg.get(i) * (inside ? 1.f : 0.f);
          if (HAS_Z) { float g = cz.get(i); dy[i] *= g * sigmoid(g); }
        }
        store_floats<EP>(sG + w.row * ROW1 + piece, dy);
      }
      stage_bc(sB, nb, w.lane);
      stage_bc(sC, nc, w.lane);
      __syncwarp();
      if (t0 > start) fetch(t0 - T, true);
      else if (start > w.begin) { fetch(start - INTERVAL, false); fetch_states(start - INTERVAL); }
      #pragma unroll 1
      for (int i = T - R; i >= 0; i -= R) {
        float hh[R + 1][CH][S], a[R][CH][S];
        #pragma unroll
        for (int k = 0; k < CH * S / 4; k++) load_floats<4>(&hh[0][0][0] + 4 * k, (const float *)&sH[(t0 - start + i) / R][k][w.lane]);
        #pragma unroll
        for (int j = 0; j < R; j++) {
          float e[2 * CH], b[S];
          load_floats<2 * CH>(e, (const float *)(sE + (i + j) * ROW2 + w.slot * CH));
          load_staged<S>(b, sB + (i + j) * STATES_PADDED + w.group * S);
          #pragma unroll
          for (int c = 0; c < CH; c++)
            #pragma unroll
            for (int k = 0; k < S; k++) {
              a[j][c][k] = ex2(e[2 * c] * A2[c][k]);
              hh[j + 1][c][k] = a[j][c][k] * hh[j][c][k] + e[2 * c + 1] * b[k];
            }
        }
        #pragma unroll
        for (int i4 = R - 4; i4 >= 0; i4 -= 4) {
          float ry[CH][4], ru[CH][4], rd[CH][4], v[4][2 * S];
          #pragma unroll
          for (int j4 = 3; j4 >= 0; j4--) {
            const int j = i4 + j4, t = i + j;
            float e[2 * CH], b[S], c[S], g[CH];
            load_floats<2 * CH>(e, (const float *)(sE + t * ROW2 + w.slot * CH));
            load_staged<S>(b, sB + t * STATES_PADDED + w.group * S);
            load_staged<S>(c, sC + t * STATES_PADDED + w.group * S);
            load_floats<CH>(g, sG + t * ROW1 + w.slot * CH);
            #pragma unroll
            for (int m = 0; m < CH; m++)
              #pragma unroll
              for (int k = 0; k < S; k++) {
                const float H = hh[j + 1][m][k], dh = c[k] * g[m] + carry[m][k];  // dh: gradient of the state
                const float out = a[j][m][k] * dh, q = out * hh[j][m][k];
                carry[m][k] = out;
                ry[m][j4] = k ? ry[m][j4] + H * c[k] : H * c[k];
                ru[m][j4] = k ? ru[m][j4] + dh * b[k] : dh * b[k];
                rd[m][j4] = k ? rd[m][j4] + q * A2[m][k] : q * A2[m][k];
                dA[m][k] += q * e[2 * m];
                v[j4][k] = m ? v[j4][k] + dh * e[2 * m + 1] : dh * e[2 * m + 1];
                v[j4][S + k] = m ? v[j4][S + k] + H * g[m] : H * g[m];
              }
          }
          // [step][dB or dC][state]: a lane ends with HELD neighbouring values
          reduce<8 * S, LANES, 1>(&v[0][0], w.slot);
          constexpr int HELD = 8 * S / LANES, E = HELD < S ? HELD : S;
          #pragma unroll
          for (int m = 0; m < HELD; m += E) {
            const int value = w.slot * HELD + m, t = i + i4 + value / (2 * S);
            if (t0 + t < w.end)
              give<E>(dBC + (i64)(t0 + t) * (2 * STATES_PADDED) + value / S % 2 * STATES_PADDED + w.group * S + value % S, &v[0][0] + m);
          }
          const int to = (i + i4) * ROW1 + w.slot * CH;
          reduce_steps(sY + to, ry, w.group);
          reduce_steps(sU + to, ru, w.group);
          reduce_steps(sD + to, rd, w.group);
        }
      }
      __syncwarp();
      if (inside) {
        float y[EP], xu[EP], xd[EP], o[EP], skip[EP], bias[EP];
        const int from = w.row * ROW1 + piece;
        load_floats<EP>(bias, p.bias + w.column);
        load_floats<EP>(skip, p.D + w.column);
        load_floats<EP>(y, sY + from); load_floats<EP>(xu, sU + from); load_floats<EP>(xd, sD + from);
        const i64 out = (rows + t0 + w.row) * p.width;
        if (HAS_Z) {
          #pragma unroll
          for (int i = 0; i < EP; i++) {
            const float g = cz.get(i), s = sigmoid(g);
            o[i] = cg.get(i) * (y[i] + skip[i] * cu.get(i)) * s * (1.f + g * (1.f - s));
          }
          store_piece((X *)p.dz + out, w.column, p.width, o);
        }
        float dy[EP], e[2 * EP];
        load_floats<EP>(dy, sG + from);
        load_floats<2 * EP>(e, (const float *)(sE + w.row * ROW2 + piece));
        #pragma unroll
        for (int i = 0; i < EP; i++) {
          const float x = cu.get(i), raw = cd.get(i) + bias[i];
          o[i] = xu[i] * e[2 * i] + skip[i] * dy[i];
          xd[i] = (LN2 * xd[i] + xu[i] * x) * sigmoid(raw);
          dD[i] += dy[i] * x;
          dbias[i] += xd[i];
        }
        store_piece((X *)p.du + out, w.column, p.width, o);
        store_piece((X *)p.ddelta + out, w.column, p.width, xd);
      }
      __syncwarp();
    }
  }
  #pragma unroll
  for (int c = 0; c < CH; c++) store_floats<S>(p.dA + padded_at(p, w) + c * STATES_PADDED, dA[c]);
  #pragma unroll
  for (int i = 0; i < EP; i++) {
    #pragma unroll
    for (int m = PER_ROW; m < 32; m *= 2) { dD[i] += shuffle(dD[i], m); dbias[i] += shuffle(dbias[i], m); }
  }
  if (w.row == 0) {
    const i64 to = ((i64)w.batch * p.chunks + w.chunk) * p.padded + w.column;
    store_floats<EP>(p.dD + to, dD);
    store_floats<EP>(p.dbias + to, dbias);
  }
}
#endif
