// A pass over packed texts on CPUs: products, and one kernel each for what lies between them.
//
// Activations come and go as float32 or bfloat16 (the type "A"), or as bytes with a scale a row; the residual stream,
// norms, softmax and everything that is added up are float32. Built for the processor it runs on, see cpu_kernels.py.
//
// Shapes: t tokens of all texts, h hidden, q query heads, k key-value heads, d channels a head.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 sums in 32 registers
#else
constexpr int W = 8, TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 in 16
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAS_BYTES 1
#else
#define HAS_BYTES 0
#endif
#if defined(__AVX512BF16__)
#define HAS_BFLOAT 1
#else
#define HAS_BFLOAT 0
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));
using bf16 = uint16_t;

inline vf load(const float *from) {
  vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline vf load(const bf16 *from) {
  vh half;
  std::memcpy(&half, from, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store(float *to, vf v) { std::memcpy(to, &v, sizeof v); }

inline void store(bf16 *to, vf v) {
#if HAS_BFLOAT
  __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  vu bits = (vu)v;
  vh half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
#endif
  std::memcpy(to, &half, sizeof half);
}

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// To the nearest, ties to even; no NaN comes here that matters.
inline bf16 narrow(float x) {
  uint32_t bits = bits_of(x);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void write(float *to, float x) { *to = x; }
inline void write(bf16 *to, float x) { *to = narrow(x); }

// 2^x to 2e-7, or to 4e-5 where no more than bfloat16 or bytes are kept of it; x from -126 to 127.
template <bool ROUGH> inline vf power_of_two(vf x) {
  vf shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  vi whole = (vi)shifted - 0x4b400000;
  vf f = x - (shifted - 12582912.0f);
  vf p = ROUGH ? vf{} + 9.6181291e-3f : (f * 1.5403530e-4f + 1.3333558e-3f) * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return (vf)((vi)p + (whole << 23));
}

// For x <= 0, never less than 2^-126.
template <bool ROUGH> inline vf exp2_of(vf x) { return power_of_two<ROUGH>(x > -126.0f ? x : vf{} - 126.0f); }

template <bool ROUGH> inline vf exp_of(vf x) {
  x *= 1.44269504f;
  x = x > -126.0f ? x : vf{} - 126.0f;
  return power_of_two<ROUGH>(x < 126.0f ? x : vf{} + 126.0f);
}

template <bool ROUGH> inline vf inverse(vf x) {
#if defined(__AVX512F__)
  if (ROUGH) return (vf)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.0f / x;
}

enum Activation { NONE = -1, GELU = 0, GELU_TANH = 1, SILU = 2, RELU = 3 };

template <int KIND, bool ROUGH> inline vf activate(vf x) {
  if (KIND == NONE) return x;
  if (KIND == RELU) return x < 0.0f ? vf{} : x;  // a NaN stays one
  if (KIND == SILU) return x * inverse<ROUGH>(1.0f + exp_of<ROUGH>(-x));
  if (KIND == GELU_TANH) return x * inverse<ROUGH>(1.0f + exp_of<ROUGH>(-1.5957691f * (x + 0.044715f * x * x * x)));
  if (ROUGH) {  // the normal distribution as a logistic one of a polynomial, fitted to 3e-5 of x Phi(x)
    vf square = x * x;
    square = square < 49.0f ? square : vf{} + 49.0f;
    vf logit = x * ((-7.03033709e-4f * square + 7.40112929e-2f) * square + 1.59501577f);
    return x * inverse<true>(1.0f + exp_of<true>(-logit));
  }
  // erf after Abramowitz and Stegun, 7.1.26: to 1.5e-7.
  vf z = (x > 0.0f ? x : -x) * 0.70710678f, u = 1.0f / (1.0f + 0.3275911f * z);
  vf p = ((((1.061405429f * u - 1.453152027f) * u + 1.421413741f) * u - 0.284496736f) * u + 0.254829592f) * u;
  vf tail = 0.5f * p * exp_of<false>(-z * z);  // of the normal distribution, beyond |x|
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

// The sum, or the largest, of a vector: halves upon halves instead of one after the other.
template <class Fold> inline float fold(vf v, Fold with) {
  float x[W];
  std::memcpy(x, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = W / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) x[i] = with(x[i], x[i + half]);
  return x[0];
}

inline float sum_of(vf v) {
  return fold(v, [](float a, float b) { return a + b; });
}

inline float largest_of(vf v) {
  return fold(v, [](float a, float b) { return a > b ? a : b; });
}

// --- products ---
//
// All multiply elements of 4 bytes: one float, two bfloat16, or four bytes, whose products are added up in one go.

struct Float {
  using Value = float;
  using Sum = vf;
  static constexpr int PACK = 1;
  static vf multiply_add(vf sum, uint32_t a, vu b) {
    float x;
    std::memcpy(&x, &a, 4);
    return sum + x * (vf)b;
  }
  static void narrow_row(const float *from, int n, float *to) { std::memcpy(to, from, size_t(n) * 4); }
  static void pair(const float *first, const float *, int n, uint32_t *to) { std::memcpy(to, first, size_t(n) * 4); }
  static void weigh(vf e, uint32_t *to) { std::memcpy(to, &e, sizeof e); }
};

#if HAS_BFLOAT
struct BFloat {
  using Value = bf16;
  using Sum = vf;
  static constexpr int PACK = 2;
  static vf multiply_add(vf sum, uint32_t a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
  static void narrow_row(const float *from, int n, bf16 *to) {
#pragma omp simd
    for (int c = 0; c < n; c++) to[c] = narrow(from[c]);
  }
  static void pair(const bf16 *first, const bf16 *second, int n, uint32_t *to) {
#pragma omp simd
    for (int c = 0; c < n; c++) to[c] = first[c] | uint32_t(second[c]) << 16;
  }
  static void weigh(vf e, uint32_t *to) { store(reinterpret_cast<bf16 *>(to), e); }
};
#endif

#if HAS_BYTES
struct Byte {  // unsigned on the left, signed on the right
  using Sum = vi;
  static vi multiply_add(vi sum, uint32_t a, vu b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(int(a)), (__m512i)b);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(int(a)), (__m256i)b);
#endif
  }
};
#endif

// sum += a (ROWS, k) b (k, VECTORS * W), in registers.
template <class P, int ROWS, int VECTORS>
__attribute__((always_inline)) inline void accumulate(const uint32_t *a, long lda, const uint32_t *b, long ldb, int k,
                                                      typename P::Sum (&sum)[ROWS][VECTORS]) {
  for (int i = 0; i < k; i++) {
    vu right[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) std::memcpy(&right[v], b + i * ldb + v * W, sizeof(vu));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sum[r][v] = P::multiply_add(sum[r][v], a[r * lda + i], right[v]);
  }
}

template <class P, int ROWS, int VECTORS>
inline void tile(const uint32_t *a, long lda, const uint32_t *b, long ldb, int k, float *c, long ldc, bool add) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) sum[r][v] = add ? load(c + r * ldc + v * W) : vf{};
  accumulate<P, ROWS, VECTORS>(a, lda, b, ldb, k, sum);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(c + r * ldc + v * W, sum[r][v]);
}

template <class P, int VECTORS>
void tiles(int rows, const uint32_t *a, long lda, const uint32_t *b, long ldb, int k, float *c, long ldc, bool add) {
  constexpr int MANY = TILE_VECTORS >= 2 * VECTORS ? 2 * TILE_ROWS : TILE_ROWS;  // as many sums as there are registers
  for (; rows >= MANY; rows -= MANY, a += MANY * lda, c += MANY * ldc)
    tile<P, MANY, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * lda, c += TILE_ROWS * ldc)
    tile<P, TILE_ROWS, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
  switch (rows) {
    case 5: return tile<P, 5, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
    case 4: return tile<P, 4, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
    case 3: return tile<P, 3, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
    case 2: return tile<P, 2, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
    case 1: return tile<P, 1, VECTORS>(a, lda, b, ldb, k, c, ldc, add);
  }
}

// c (rows, columns) = or += a (rows, k) b (k, columns); columns a multiple of W.
template <class P>
void product(int rows, int columns, int k, const uint32_t *a, long lda, const uint32_t *b, long ldb, float *c,
             long ldc, bool add) {
  int j = 0;
  for (; j + TILE_VECTORS * W <= columns; j += TILE_VECTORS * W)
    tiles<P, TILE_VECTORS>(rows, a, lda, b + j, ldb, k, c + j, ldc, add);
  switch ((columns - j) / W) {
    case 3: return tiles<P, 3>(rows, a, lda, b + j, ldb, k, c + j, ldc, add);
    case 2: return tiles<P, 2>(rows, a, lda, b + j, ldb, k, c + j, ldc, add);
    case 1: return tiles<P, 1>(rows, a, lda, b + j, ldb, k, c + j, ldc, add);
  }
}

constexpr int PANEL = TILE_VECTORS * W, ROWS_AT_ONCE = 96;  // columns, and rows whose inputs stay in the second cache

// What becomes of the sums of x W^T.
struct End {
  const float *bias;       // (columns,) or null
  const float *scale;      // (columns,) of bytes: what a unit of the weights is worth
  const int32_t *zero;     // (columns,) of bytes: what the sums hold too much
  const float *row_scale;  // (t,) of bytes
};

// A tile of x W^T + bias; A is float where more is to come.
template <class P, class A, int ROWS>
__attribute__((noinline)) void multiply_tile(const uint32_t *x, int steps, const uint32_t *weights, const End &end, long row,
                                             int column, A *out, int width) {
  typename P::Sum sum[ROWS][TILE_VECTORS] = {};
  accumulate<P, ROWS, TILE_VECTORS>(x, steps, weights, PANEL, steps, sum);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; v++) {
      const int c = column + v * W;
      vf y;
      if constexpr (std::is_same<typename P::Sum, vf>::value) {
        y = sum[r][v];
      } else {
        vi zero;
        std::memcpy(&zero, end.zero + c, sizeof zero);
        y = __builtin_convertvector(sum[r][v] - zero, vf) * (load(end.scale + c) * end.row_scale[row + r]);
      }
      if (end.bias) y += load(end.bias + c);
      store(out + long(r) * width + v * W, y);
    }
}

template <class P, class A>
inline void multiply_rows(int rows, const uint32_t *x, int steps, const uint32_t *weights, const End &end, long row, int column,
                          A *out, int width) {
  switch (rows) {
    case 1: return multiply_tile<P, A, 1>(x, steps, weights, end, row, column, out, width);
    case 2: return multiply_tile<P, A, 2>(x, steps, weights, end, row, column, out, width);
    case 3: return multiply_tile<P, A, 3>(x, steps, weights, end, row, column, out, width);
    case 4: return multiply_tile<P, A, 4>(x, steps, weights, end, row, column, out, width);
    case 5: return multiply_tile<P, A, 5>(x, steps, weights, end, row, column, out, width);
    default: return multiply_tile<P, A, TILE_ROWS>(x, steps, weights, end, row, column, out, width);
  }
}

// What is left to do with a tile (rows, PANEL): activate, multiply by its other half, write at most ``room`` columns.
template <int KIND, bool GATED, class A>
__attribute__((noinline)) void end_tile(const float *tile, int rows, A *out, int width, int room) {
  constexpr bool ROUGH = !std::is_same<A, float>::value;
  constexpr int KEPT = GATED ? TILE_VECTORS / 2 : TILE_VECTORS;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < KEPT && v * W < room; v++) {
      const float *from = tile + r * PANEL + v * W;
      A *to = out + long(r) * width + v * W;
      vf y = activate<KIND, ROUGH>(load(from));
      if (GATED) y *= load(from + KEPT * W);
      if ((v + 1) * W <= room) {
        store(to, y);
        continue;
      }
      A rest[W];
      store(rest, y);
      std::copy(rest, rest + (room - v * W), to);
    }
}

template <class A> using EndTile = void (*)(const float *, int, A *, int, int);

template <class A> EndTile<A> end_of(int activation, bool gated) {
  switch (activation) {
    case GELU: return gated ? end_tile<GELU, true, A> : end_tile<GELU, false, A>;
    case GELU_TANH: return gated ? end_tile<GELU_TANH, true, A> : end_tile<GELU_TANH, false, A>;
    case SILU: return gated ? end_tile<SILU, true, A> : end_tile<SILU, false, A>;
    case RELU: return gated ? end_tile<RELU, true, A> : end_tile<RELU, false, A>;
    default: return end_tile<NONE, false, A>;
  }
}

template <class P, class A>
void multiply(int activation, bool gated, const uint32_t *x, long t, int steps, const uint32_t *panels, int columns,
              const End &end, A *out, int width, int threads) {
  const int panel_count = columns / PANEL, step = gated ? PANEL / 2 : PANEL;
  const long blocks = (t + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const long rows_each = blocks ? ((t + blocks - 1) / blocks + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : 0;
  const EndTile<A> finish = end_of<A>(activation, gated);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (long block = 0; block < blocks; block++)
    for (int panel = 0; panel < panel_count; panel++) {
      alignas(64) float tile[TILE_ROWS * PANEL];
      const uint32_t *weights = panels + size_t(panel) * steps * PANEL;
      const int column = panel * PANEL, room = width - panel * step;
      const bool at_once = activation == NONE && room >= PANEL;
      const long stop = std::min(t, (block + 1) * rows_each);
      for (long row = block * rows_each; row < stop; row += TILE_ROWS) {
        const int rows = int(std::min<long>(TILE_ROWS, stop - row));
        A *to = out + row * width + panel * step;
        if (at_once) {
          multiply_rows<P, A>(rows, x + row * steps, steps, weights, end, row, column, to, width);
        } else {
          multiply_rows<P, float>(rows, x + row * steps, steps, weights, end, row, column, tile, PANEL);
          finish(tile, rows, to, width, room);
        }
      }
    }
}

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

}  // namespace

extern "C" {

// One layer's attention, as far as it is the same for every batch.
struct Heads {
  int32_t queries, keys, channels;
  int32_t left, right;      // how far a token sees to either side; a large number: everything
  float scale;              // of queries without a norm; makes exponents of 2 where there is no cap
  float cap;                // logits are cap * tanh(logits / cap); 0: as they are
  const float *query_norm;  // (d,) RMSNorm of every head, its weight times what ``scale`` would be, or null
  const float *key_norm;    // (d,)
  float norm_eps;
};

// The weights of a product, see effir_multiply.
struct Weights {
  int32_t kind, steps, columns, activation, gated, width;
  const void *panels;
  const float *bias, *scale;
  const int32_t *zero;
};

struct Norm {
  int32_t kind;             // 0: none, 1: LayerNorm, 2: RMSNorm
  float eps;
  const float *weight;      // (h,) or null
  const float *bias;        // (h,) or null
};

// An attention or an MLP: two products, what lies between them, and the norms around.
struct Sublayer {
  int32_t attends, rotary;  // which of the rotations, -1: none
  int32_t has_after;        // the norm ``after`` is of the stream itself (post-norm models)
  float lowest;             // what is multiplied second is never further below zero, where it becomes bytes
  const float *first_times, *second_times;
  Heads heads;
  Weights first, second;
  Norm before, inner, after;
};

}  // extern "C"

namespace {

// --- attention ---

struct Where {
  const int32_t *bounds;    // (n + 1,): text i is tokens bounds[i] to bounds[i + 1]
  const int64_t *rows;      // (n,): the one token of each text that asks; null: all of them
  const float *cos, *sin;   // (t, turned) or null
  int32_t turned;           // pairs of channels that are rotated: channel c with channel c + turned
};

// One head of one token, as it goes into the product: scaled, normalised, turned.
template <int D, class A>
inline void read_head(const A *from, float scale, const float *norm, float eps, const Where &where, long token, int channels,
                      float *to) {
  if (D) channels = D;
#pragma omp simd
  for (int c = 0; c < channels; c++) to[c] = widen(from[c]) * scale;
  if (norm) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < channels; c++) sum += to[c] * to[c];
    float share = 1.0f / std::sqrt(sum / channels + eps);
#pragma omp simd
    for (int c = 0; c < channels; c++) to[c] *= share * norm[c];
  }
  if (where.cos) {
    const float *cos = where.cos + token * where.turned, *sin = where.sin + token * where.turned;
    float *low = to, *high = to + where.turned;
#pragma omp simd
    for (int c = 0; c < where.turned; c++) {
      float first = low[c], second = high[c];
      low[c] = first * cos[c] - second * sin[c];
      high[c] = second * cos[c] + first * sin[c];
    }
  }
}

constexpr float HIDDEN = -1e30f;        // the score of what a token does not see: its weight, 2^-126, changes no sum
constexpr int BLOCK = 24, CHUNK = 256;  // queries and keys whose scores (24 KiB) stay in the first cache

struct Scratch {
  std::vector<uint32_t> keys, values, queries, weights;
  std::vector<float> scores, sums, head;
  std::vector<char> narrow;
};

// How many columns the keys of a text have as they are laid out.
inline int padded_length(long length) { return round_up(int(length), CHUNK < length ? CHUNK : W); }

// Keys and values of one head of one text, as products want them: keys (d / PACK, padded length), values (padded
// length / PACK, padded d), each element PACK neighbours.
template <class P, class A, int D>
void pack_head(const Heads &heads, const Where &where, const A *qkv, int text, int key_head, uint32_t *keys,
               uint32_t *values, Scratch &s) {
  using Value = typename P::Value;
  static_assert(std::is_same<A, Value>::value, "values go into products as they come");
  const int d = D ? D : heads.channels, padded_d = round_up(d, W), steps_d = (d + P::PACK - 1) / P::PACK;
  const long stride = long(heads.queries + 2 * heads.keys) * d;
  const long start = where.bounds[text], length = where.bounds[text + 1] - start;
  const long k_at = long(heads.queries + key_head) * d, v_at = k_at + long(heads.keys) * d;
  const int padded = padded_length(length);
  s.head.assign(padded_d, 0.0f);
  s.narrow.assign(size_t(2) * padded_d * sizeof(Value), 0);
  float *one = s.head.data();
  Value *half[2] = {reinterpret_cast<Value *>(s.narrow.data()), reinterpret_cast<Value *>(s.narrow.data()) + padded_d};
  const bool as_is = !where.cos && !heads.key_norm && d % P::PACK == 0;
  for (int c = 0; c < steps_d; c++) std::fill(keys + size_t(c) * padded + length, keys + size_t(c + 1) * padded, 0);
  for (long j = 0; j < length; j++) {
    const A *from = qkv + (start + j) * stride + k_at;
    const char *packed = reinterpret_cast<const char *>(from);
    if (!as_is) {
      read_head<D>(from, 1.0f, heads.key_norm, heads.norm_eps, where, start + j, d, one);
      P::narrow_row(one, d, half[0]);
      packed = reinterpret_cast<const char *>(half[0]);
    }
    for (int c = 0; c < steps_d; c++) std::memcpy(keys + size_t(c) * padded + j, packed + 4 * c, 4);
  }
  std::fill(half[0], half[0] + 2 * padded_d, Value(0));
  for (long j = 0; j < padded; j += P::PACK) {
    const Value *rows[2] = {half[0], half[1]};
    for (int part = 0; part < P::PACK; part++) {
      const A *from = qkv + (start + j + part) * stride + v_at;
      if (j + part >= length)
        std::fill(half[part], half[part] + padded_d, Value(0));
      else if (d == padded_d)
        rows[part] = from;
      else
        std::copy(from, from + d, half[part]);
    }
    P::pair(rows[0], rows[1], padded_d, values + size_t(j / P::PACK) * padded_d);
  }
}

// Softmax attention of one head over one text, a block of queries and a chunk of keys at a time (online softmax:
// arXiv 2205.14135). P multiplies, A is what comes and goes.
template <class P, class A, int D>
void attend_head(const Heads &heads, const Where &where, const A *qkv, int text, int head, const uint32_t *keys,
                 const uint32_t *values, A *out, Scratch &s) {
  using Value = typename P::Value;
  const int d = D ? D : heads.channels, padded_d = round_up(d, W), steps_d = (d + P::PACK - 1) / P::PACK;
  const long stride = long(heads.queries + 2 * heads.keys) * d, q_at = long(head) * d;
  const long start = where.bounds[text], length = where.bounds[text + 1] - start;
  const int padded = padded_length(length);
  const long asking = where.rows ? 1 : length;
  const int chunk = std::min(CHUNK, padded), steps_chunk = chunk / P::PACK;
  s.head.assign(padded_d, 0.0f);
  float *one = s.head.data();
  s.queries.assign(size_t(BLOCK) * steps_d, 0);
  s.weights.resize(size_t(BLOCK) * steps_chunk);
  s.scores.resize(size_t(BLOCK) * chunk);
  s.sums.resize(size_t(BLOCK) * padded_d);
  const float scale = heads.query_norm ? 1.0f : heads.scale;
  for (long first = 0; first < asking; first += BLOCK) {
    const int rows = int(std::min<long>(BLOCK, asking - first));
    float highest[BLOCK], total[BLOCK];
    long places[BLOCK];
    for (int r = 0; r < rows; r++) {
      long token = where.rows ? where.rows[text] : start + first + r;
      places[r] = token - start;
      read_head<D>(qkv + token * stride + q_at, scale, heads.query_norm, heads.norm_eps, where, token, d, one);
      P::narrow_row(one, d, reinterpret_cast<Value *>(s.queries.data() + size_t(r) * steps_d));
      highest[r] = HIDDEN;
      total[r] = 0;
    }
    std::fill(s.sums.begin(), s.sums.end(), 0.0f);
    const long from = std::max<long>(0, places[0] - heads.left), to = std::min(length, places[rows - 1] + heads.right + 1);
    for (long begin = from / CHUNK * CHUNK; begin < to; begin += CHUNK) {
      const int columns = round_up(int(std::min<long>(CHUNK, to - begin)), W);
      product<P>(rows, columns, steps_d, s.queries.data(), steps_d, keys + begin, padded, s.scores.data(), chunk, false);
      for (int r = 0; r < rows; r++) {
        float *score = s.scores.data() + size_t(r) * chunk;
        if (heads.cap)
          for (int c = 0; c < columns; c += W) {
            vf e = exp_of<false>(load(score + c) * (2.0f / heads.cap));
            store(score + c, heads.cap * 1.44269504f * (1.0f - 2.0f / (e + 1.0f)));
          }
        const int low = int(std::clamp<long>(places[r] - heads.left - begin, 0, columns));
        const int high = int(std::clamp<long>(std::min(length, places[r] + heads.right + 1) - begin, low, columns));
        for (int c = 0; c < low; c++) score[c] = HIDDEN;
        for (int c = high; c < columns; c++) score[c] = HIDDEN;
        uint32_t *weights = s.weights.data() + size_t(r) * steps_chunk;
        if (low == high) {  // sees nothing of this chunk
          std::fill(weights, weights + columns / P::PACK, 0);
          continue;
        }
        vf best = load(score);
        for (int c = W; c < columns; c += W) {
          vf x = load(score + c);
          best = best > x ? best : x;
        }
        const float top = std::max(highest[r], largest_of(best));
        vf sum{};
        for (int c = 0; c < columns; c += W) {
          vf e = exp2_of<P::PACK == 2>(load(score + c) - top);
          sum += e;
          P::weigh(e, weights + c / P::PACK);
        }
        const float shrink = total[r] ? std::exp2(highest[r] - top) : 0.0f;
        total[r] = total[r] * shrink + sum_of(sum);
        if (shrink != 1.0f)
          for (int c = 0; c < padded_d; c++) s.sums[size_t(r) * padded_d + c] *= shrink;
        highest[r] = top;
      }
      product<P>(rows, padded_d, columns / P::PACK, s.weights.data(), steps_chunk,
                 values + size_t(begin / P::PACK) * padded_d, padded_d, s.sums.data(), padded_d, true);
    }
    for (int r = 0; r < rows; r++) {
      const float share = 1.0f / total[r];
      const long row = where.rows ? text : start + first + r;
      A *to_row = out + row * heads.queries * d + q_at;
      const float *sums = s.sums.data() + size_t(r) * padded_d;
#pragma omp simd
      for (int c = 0; c < d; c++) write(to_row + c, sums[c] * share);
    }
  }
}

// Where several heads ask the same keys, these are laid out once for all, before.
template <class P, class A, int D>
void attend(const Heads &heads, const Where &where, const A *qkv, int texts, A *out, int threads) {
  const int d = D ? D : heads.channels, padded_d = round_up(d, W), steps_d = (d + P::PACK - 1) / P::PACK;
  const long tasks = long(texts) * heads.queries;
  const bool shared = heads.queries > heads.keys;
  static thread_local std::vector<uint32_t> all_keys, all_values;
  std::vector<size_t> key_starts, value_starts;  // of the heads of each text
  if (shared) {
    size_t key_size = 0, value_size = 0;
    for (int text = 0; text < texts; text++) {
      const size_t padded = padded_length(where.bounds[text + 1] - where.bounds[text]);
      key_starts.push_back(key_size);
      value_starts.push_back(value_size);
      key_size += heads.keys * padded * steps_d;
      value_size += heads.keys * padded / P::PACK * padded_d;
    }
    all_keys.resize(key_size);
    all_values.resize(value_size);
  }
  uint32_t *keys_at = all_keys.data(), *values_at = all_values.data();
  auto lies = [&](long text, int key_head) {
    const size_t padded = padded_length(where.bounds[text + 1] - where.bounds[text]);
    return std::make_pair(keys_at + key_starts[text] + key_head * padded * steps_d,
                          values_at + value_starts[text] + key_head * (padded / P::PACK) * padded_d);
  };
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    if (shared) {
#pragma omp for schedule(dynamic)
      for (long task = 0; task < long(texts) * heads.keys; task++) {
        const int text = int(task / heads.keys), key_head = int(task % heads.keys);
        const auto [keys, values] = lies(text, key_head);
        pack_head<P, A, D>(heads, where, qkv, text, key_head, keys, values, scratch);
      }
    }
#pragma omp for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
      const int text = int(task / heads.queries), head = int(task % heads.queries);
      if (shared) {
        const auto [keys, values] = lies(text, head / (heads.queries / heads.keys));
        attend_head<P, A, D>(heads, where, qkv, text, head, keys, values, out, scratch);
        continue;
      }
      const size_t padded = padded_length(where.bounds[text + 1] - where.bounds[text]);
      scratch.keys.resize(padded * steps_d);
      scratch.values.resize(padded / P::PACK * padded_d);
      pack_head<P, A, D>(heads, where, qkv, text, head, scratch.keys.data(), scratch.values.data(), scratch);
      attend_head<P, A, D>(heads, where, qkv, text, head, scratch.keys.data(), scratch.values.data(), out, scratch);
    }
  }
}

// The usual sizes of a head are known to the compiler.
template <class P, class A>
void attend(const Heads &heads, const Where &where, const A *qkv, int texts, A *out, int threads) {
  switch (heads.channels) {
    case 32: return attend<P, A, 32>(heads, where, qkv, texts, out, threads);
    case 64: return attend<P, A, 64>(heads, where, qkv, texts, out, threads);
    case 128: return attend<P, A, 128>(heads, where, qkv, texts, out, threads);
    default: return attend<P, A, 0>(heads, where, qkv, texts, out, threads);
  }
}

// --- rows ---

// x (h,) normalised in place; ``sum``: of its values.
void normalise(const Norm &norm, float *x, int h, float sum) {
  if (!norm.kind) return;
  const float mean = norm.kind == 1 ? sum / h : 0.0f;
  vf squares{};
  int c = 0;
  for (; c + W <= h; c += W) {
    vf v = load(x + c) - mean;
    squares += v * v;
  }
  float square = sum_of(squares);
  for (int i = c; i < h; i++) square += (x[i] - mean) * (x[i] - mean);
  const float share = 1.0f / std::sqrt(square / h + norm.eps);
  const auto weight = [&](int i) { return norm.weight ? load(norm.weight + i) * share : vf{} + share; };
  for (c = 0; c + W <= h; c += W) {
    vf v = (load(x + c) - mean) * weight(c);
    store(x + c, norm.bias ? v + load(norm.bias + c) : v);
  }
  for (; c < h; c++)
    x[c] = (x[c] - mean) * share * (norm.weight ? norm.weight[c] : 1.0f) + (norm.bias ? norm.bias[c] : 0.0f);
}

// y = more, or x + more; returns the sum of its values.
template <class A> float add(const float *x, const A *more, float *y, int h) {
  vf sums{};
  int c = 0;
  for (; c + W <= h; c += W) {
    vf v = load(more + c);
    if (x) v += load(x + c);
    sums += v;
    store(y + c, v);
  }
  float sum = sum_of(sums);
  for (; c < h; c++) {
    y[c] = widen(more[c]) + (x ? x[c] : 0.0f);
    sum += y[c];
  }
  return sum;
}

// Types of what is read and written: the numbers of cpu_kernels.py.
enum Kind { FLOAT = 0, BFLOAT = 1, BYTE = 2 };

// Of y = x * times: bytes round(y / scale) + 128 with scale = largest magnitude / 127. Where x is never below -lowest, of
// y = (x + lowest) * times: round(y / scale) with scale = largest / 255. Neither leaves 0 to 255.
float to_bytes(const float *x, const float *times, int n, uint8_t *out, float lowest) {
  const auto value = [&](int c) {
    vf v = load(x + c) + lowest;
    return times ? v * load(times + c) : v;
  };
  const auto one = [&](int c) { return (x[c] + lowest) * (times ? times[c] : 1.0f); };
  vf highs = vf{} + 1e-30f;
  int at = 0;
  for (; at + W <= n; at += W) {
    vf v = value(at);
    v = v > 0.0f ? v : -v;
    highs = highs > v ? highs : v;
  }
  float high = largest_of(highs);
  for (; at < n; at++) high = std::max(high, std::fabs(one(at)));
  const float scale = high / (lowest ? 255.0f : 127.0f), shift = lowest ? 0.5f : 128.5f, steps = 1.0f / scale;
  for (at = 0; at + W <= n; at += W) {
    vf v = value(at) * steps + shift;
    vb bytes = __builtin_convertvector(__builtin_convertvector(v > 0.0f ? v : vf{}, vi), vb);
    std::memcpy(out + at, &bytes, sizeof bytes);
  }
  for (; at < n; at++) out[at] = uint8_t(std::max(0, int(one(at) * steps + shift)));
  return scale;
}

template <class A>
void join(const A *added, float *stream, long t, int h, const Norm &inner, const Norm &outer, bool post, void *out, int kind,
          float *out_scale, const float *times, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> buffer;
    buffer.resize(h);
    float *y = buffer.data();
#pragma omp for schedule(static)
    for (long row = 0; row < t; row++) {
      float *x = stream + row * h;
      float sum;
      if (!added) {
        sum = add<float>(nullptr, x, y, h);
      } else if (inner.kind) {
        sum = add<A>(nullptr, added + row * h, y, h);
        normalise(inner, y, h, sum);
        sum = add<float>(x, y, y, h);
      } else {
        sum = add<A>(x, added + row * h, y, h);
      }
      if (!post && added) std::memcpy(x, y, size_t(h) * 4);
      normalise(outer, y, h, sum);
      if (post) std::memcpy(x, y, size_t(h) * 4);
      if (!out) continue;
      if (kind == FLOAT) {
        std::memcpy(static_cast<float *>(out) + row * h, y, size_t(h) * 4);
      } else if (kind == BFLOAT) {
        bf16 *to = static_cast<bf16 *>(out) + row * h;
        int c = 0;
        for (; c + W <= h; c += W) store(to + c, load(y + c));
        for (; c < h; c++) to[c] = narrow(y[c]);
      } else {
        out_scale[row] = to_bytes(y, times, h, static_cast<uint8_t *>(out) + row * h, 0.0f);
      }
    }
  }
}

template <class T>
void embed_row(const T *tokens, const T *places, const T *all, int64_t id, int64_t position, int h, float scale, float *out) {
  const T *token = tokens + id * h, *place = places ? places + position * h : nullptr;
#pragma omp simd
  for (int c = 0; c < h; c++) out[c] = widen(token[c]) * scale;
  if (place)
#pragma omp simd
    for (int c = 0; c < h; c++) out[c] += widen(place[c]);
  if (all)
#pragma omp simd
    for (int c = 0; c < h; c++) out[c] += widen(all[c]);
}

// Memory that is kept from batch to batch: fresh pages would cost a quarter of a float32 pass.
struct Buffer {
  void *at = nullptr;
  size_t bytes = 0;
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(at); }
  void *get(size_t wanted) {
    if (wanted > bytes) {
      std::free(at);
      bytes = 0;
      const size_t rounded = (wanted + 4095) / 4096 * 4096;
      at = std::aligned_alloc(64, rounded);
      if (!at) throw std::bad_alloc();
      bytes = rounded;
    }
    return at;
  }
};

inline void swap(Buffer &a, Buffer &b) {
  std::swap(a.at, b.at);
  std::swap(a.bytes, b.bytes);
}

}  // namespace

extern "C" {

// out (t, width) = activation(x W^T + bias), of a gated product its first half times the second. x (t, 4 * steps bytes)
// of ``kind``; W in panels: (columns / PANEL, steps, PANEL) elements of 4 bytes, of a gated product a panel has PANEL / 2
// columns of the first half and then as many of the second; bias, scale and zero are in the order of the panels.
void effir_multiply(int kind, const void *x, const float *row_scale, int64_t t, int steps, const void *panels, int columns,
                    const float *bias, const float *scale, const int32_t *zero, int activation, int gated, void *out,
                    int out_kind, int width, int threads) {
  const End end{bias, scale, zero, row_scale};
  const uint32_t *from = static_cast<const uint32_t *>(x), *weights = static_cast<const uint32_t *>(panels);
  float *floats = static_cast<float *>(out);
  bf16 *halves = static_cast<bf16 *>(out);
  if (kind == FLOAT)
    multiply<Float>(activation, gated, from, t, steps, weights, columns, end, floats, width, threads);
#if HAS_BFLOAT
  if (kind == BFLOAT)
    multiply<BFloat>(activation, gated, from, t, steps, weights, columns, end, halves, width, threads);
#endif
#if HAS_BYTES
  if (kind == BYTE && out_kind == FLOAT)
    multiply<Byte>(activation, gated, from, t, steps, weights, columns, end, floats, width, threads);
  if (kind == BYTE && out_kind == BFLOAT)
    multiply<Byte>(activation, gated, from, t, steps, weights, columns, end, halves, width, threads);
#endif
  (void)halves;
}

// out (t or n, q d) in the type of qkv (t, (q + 2 k) d).
void effir_attend(const Heads *heads, const void *qkv, int kind, const int32_t *bounds, int texts, const int64_t *rows,
                  const float *cos, const float *sin, int turned, void *out, int threads) {
  const Where where{bounds, rows, cos, sin, turned};
  if (kind == FLOAT)
    attend<Float>(*heads, where, static_cast<const float *>(qkv), texts, static_cast<float *>(out), threads);
#if HAS_BFLOAT
  else
    attend<BFloat>(*heads, where, static_cast<const bf16 *>(qkv), texts, static_cast<bf16 *>(out), threads);
#endif
}

// stream (t, h) += inner(added); out = outer(stream), which becomes the stream where ``post``. Without ``added`` only
// the second.
void effir_join(const void *added, int added_kind, float *stream, int64_t t, int h, const Norm *inner, const Norm *outer,
                int post, void *out, int kind, float *out_scale, const float *times, int threads) {
  if (added_kind == FLOAT)
    join(static_cast<const float *>(added), stream, t, h, *inner, *outer, post, out, kind, out_scale, times, threads);
  else
    join(static_cast<const bf16 *>(added), stream, t, h, *inner, *outer, post, out, kind, out_scale, times, threads);
}

// out (t, n) bytes of x (t, n), with a scale a row; ``times`` (n,) or null, see to_bytes.
void effir_to_bytes(const void *x, int kind, int64_t t, int n, float lowest, const float *times, uint8_t *out,
                    float *out_scale, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> buffer;
    buffer.resize(n);
#pragma omp for schedule(static)
    for (long row = 0; row < t; row++) {
      const float *from = static_cast<const float *>(x) + row * n;
      if (kind == BFLOAT) {
        add<bf16>(nullptr, static_cast<const bf16 *>(x) + row * n, buffer.data(), n);
        from = buffer.data();
      }
      out_scale[row] = to_bytes(from, times, n, out + row * n, lowest);
    }
  }
}

// out (t, h) = scale * tokens[ids] + places[positions] + all[0]; the last two tables may be null.
void effir_embed(const void *tokens, int kind, const int64_t *ids, const void *places, const int64_t *positions,
                 const void *all, int64_t t, int h, float scale, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long row = 0; row < t; row++)
    if (kind == FLOAT)
      embed_row(static_cast<const float *>(tokens), static_cast<const float *>(places), static_cast<const float *>(all),
                ids[row], positions[row], h, scale, out + row * h);
    else
      embed_row(static_cast<const bf16 *>(tokens), static_cast<const bf16 *>(places), static_cast<const bf16 *>(all),
                ids[row], positions[row], h, scale, out + row * h);
}

// out (n, h): the mean over the tokens of each text of x (t, h).
void effir_mean(const float *x, const int32_t *bounds, int64_t texts, int h, float *out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long text = 0; text < texts; text++) {
    float *to = out + text * h;
    std::fill(to, to + h, 0.0f);
    for (long row = bounds[text]; row < bounds[text + 1]; row++)
#pragma omp simd
      for (int c = 0; c < h; c++) to[c] += x[row * h + c];
    const float share = 1.0f / (bounds[text + 1] - bounds[text]);
    for (int c = 0; c < h; c++) to[c] *= share;
  }
}

// A whole pass: out (t or n, h) is ``final`` of the stream (t, h) after all sublayers. ``kind``: of activations. rows:
// the one token of each text that is asked for, or null; from the sublayer ``last`` on only those are computed. One
// call for everything, since a query's products take microseconds each.
// Returns 1 where memory runs out, else 0.
int effir_pass(const Sublayer *sublayers, int count, int last, int kind, float *stream, int64_t t, int h,
               const int32_t *bounds, int texts, const int64_t *rows, const float *const *cos, const float *const *sin,
               const int32_t *turned, const Norm *final, float *out, int threads) try {
  static thread_local Buffer inputs, input_scales, first, between, between_scales, second, chosen;
  const Norm none{0, 0.0f, nullptr, nullptr};
  const size_t unit = kind == FLOAT ? 4 : 2;
  auto room = [&](Buffer &buffer, int of_kind, long n, int width) {
    return buffer.get(size_t(n) * width * (of_kind == BYTE ? 1 : of_kind == FLOAT ? 4 : 2));
  };
  float *x_scale = static_cast<float *>(input_scales.get(size_t(t) * 4));
  void *x = out;
  if (count) x = room(inputs, sublayers[0].first.kind, t, h);
  effir_join(nullptr, FLOAT, stream, t, h, &none, count ? &sublayers[0].before : final, 0, x,
             count ? sublayers[0].first.kind : FLOAT, x_scale, count ? sublayers[0].first_times : nullptr, threads);
  for (int number = 0; number < count; number++) {
    const Sublayer &s = sublayers[number];
    void *y = first.get(size_t(t) * s.first.width * unit);
    effir_multiply(s.first.kind, x, x_scale, t, s.first.steps, s.first.panels, s.first.columns, s.first.bias,
                   s.first.scale, s.first.zero, s.first.activation, s.first.gated, y, kind, s.first.width, threads);
    int width = s.first.width;
    if (s.attends) {
      const bool some = rows && number == last;
      width = s.heads.queries * s.heads.channels;
      void *z = between.get(size_t(t) * width * unit);
      const bool turns = s.rotary >= 0;
      effir_attend(&s.heads, y, kind, bounds, texts, some ? rows : nullptr, turns ? cos[s.rotary] : nullptr,
                   turns ? sin[s.rotary] : nullptr, turns ? turned[s.rotary] : 0, z, threads);
      swap(first, between);
      y = z;
      if (some) {
        float *of_rows = static_cast<float *>(chosen.get(size_t(texts) * h * 4));
        for (int text = 0; text < texts; text++)
          std::memcpy(of_rows + long(text) * h, stream + rows[text] * h, size_t(h) * 4);
        stream = of_rows;
        t = texts;
      }
    }
    float *y_scale = nullptr;
    if (s.second.kind == BYTE) {
      uint8_t *bytes = static_cast<uint8_t *>(between.get(size_t(t) * width));
      y_scale = static_cast<float *>(between_scales.get(size_t(t) * 4));
      effir_to_bytes(y, kind, t, width, s.lowest, s.second_times, bytes, y_scale, threads);
      y = bytes;
    }
    void *added = second.get(size_t(t) * h * unit);
    effir_multiply(s.second.kind, y, y_scale, t, s.second.steps, s.second.panels, s.second.columns, s.second.bias,
                   s.second.scale, s.second.zero, s.second.activation, s.second.gated, added, kind, h, threads);
    const Sublayer *next = number + 1 < count ? &sublayers[number + 1] : nullptr;
    const int next_kind = next ? next->first.kind : int(FLOAT);
    x = next ? room(inputs, next_kind, t, h) : out;
    effir_join(added, kind, stream, t, h, &s.inner, s.has_after ? &s.after : next ? &next->before : final, s.has_after, x,
               next_kind, x_scale, next ? next->first_times : nullptr, threads);
  }
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

int effir_panel() { return PANEL; }
int effir_has_bytes() { return HAS_BYTES; }
int effir_has_bfloat16() { return HAS_BFLOAT; }

}  // extern "C"
