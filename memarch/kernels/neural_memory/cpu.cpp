// The chunks of a neural memory in dual form, forwards and backwards, and the recurrence for one token. The formulas are those of gates.py, chunk.py,
// inner.py and reference.py.
//
//   X memories (rows and heads)   n chunks   C tokens in a chunk   L layers   B bases: W, S, W_0 and M', those that there are   H heads
//
// One memory after the other goes through all chunks, so that its matrices stay in the cache. A matrix has rows of a whole number of vectors, and
// zeros behind its width: products need no edges on that side.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using Int = int64_t;

// Bytes of a vector; rows and vectors of what a product holds in registers at a time.
#ifdef __AVX512F__
constexpr Int BYTES = 64, ROWS = 8, TILE = 2;
#else
constexpr Int BYTES = 32, ROWS = 4, TILE = 2;
#endif

template <class F>
struct Wide {
  static constexpr Int LANES = BYTES / sizeof(F);
  typedef F V __attribute__((vector_size(BYTES), may_alias));
  typedef std::conditional_t<sizeof(F) == 4, int32_t, int64_t> Index;
  typedef Index I __attribute__((vector_size(BYTES)));
};

template <class F>
struct Mat {
  F* p = nullptr;
  Int rows = 0, cols = 0, wide = 0;
  F* row(Int i) const { return p + i * wide; }
};

template <class F>
struct Arena {
  std::vector<void*> blocks;
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    for (void* block : blocks) std::free(block);
  }
  Mat<F> mat(Int rows, Int cols) {
    constexpr Int LANES = Wide<F>::LANES;
    const Int wide = (cols + LANES - 1) / LANES * LANES, high = (rows + LANES - 1) / LANES * LANES;
    const Int bytes = std::max<Int>(wide * high, LANES) * Int(sizeof(F));
    blocks.push_back(std::aligned_alloc(BYTES, bytes));
    std::memset(blocks.back(), 0, bytes);
    return {static_cast<F*>(blocks.back()), rows, cols, wide};
  }
};

template <class F>
Mat<F> like(const Mat<F>& room, const Mat<F>& x) {  // of the shape of x
  return {room.p, x.rows, x.cols, x.wide};
}

// ---- products

// y [R, W vectors] (+)= a b over k, where a's entries are `down` apart from row to row and `along` from k to k
template <class F, Int R, Int W>
inline void tile(const F* a, Int down, Int along, const F* b, Int wide, F* y, Int stride, Int inner, bool more) {
  using V = typename Wide<F>::V;
  constexpr Int LANES = Wide<F>::LANES;
  V sum[R][W];
  for (Int i = 0; i < R; i++)
    for (Int j = 0; j < W; j++) sum[i][j] = more ? *reinterpret_cast<const V*>(y + i * stride + j * LANES) : V{};
  for (Int k = 0; k < inner; k++) {
    V row[W];
    for (Int j = 0; j < W; j++) row[j] = *reinterpret_cast<const V*>(b + k * wide + j * LANES);
    for (Int i = 0; i < R; i++)
      for (Int j = 0; j < W; j++) sum[i][j] += a[i * down + k * along] * row[j];
  }
  for (Int i = 0; i < R; i++)
    for (Int j = 0; j < W; j++) *reinterpret_cast<V*>(y + i * stride + j * LANES) = sum[i][j];
}

// Which part of a product is asked for: of a square a or y, only what is on and below the diagonal, for the rest is zero, or not looked at.
enum Part : Int { WHOLE, LOWER_A, LOWER_A_DOWN, LOWER_Y };

template <class F, Int R, Int W>
inline void rows(Int i, Part part, const F* a, Int down, Int along, const F* b, Int wide, F* y, Int stride, Int inner, bool more) {
  const Int from = part == LOWER_A_DOWN ? i : 0, to = part == LOWER_A ? std::min(i + R, inner) : inner;
  tile<F, R, W>(a + i * down + from * along, down, along, b + from * wide, wide, y + i * stride, stride, to - from, more);
}

template <class F, Int W>
inline void columns(Int j, Part part, const F* a, Int down, Int along, const F* b, Int wide, F* y, Int stride, Int count, Int inner, bool more) {
  Int i = part == LOWER_Y ? j / ROWS * ROWS : 0;
  for (; i + ROWS <= count; i += ROWS) rows<F, ROWS, W>(i, part, a, down, along, b + j, wide, y + j, stride, inner, more);
  for (; i < count; i++) rows<F, 1, W>(i, part, a, down, along, b + j, wide, y + j, stride, inner, more);
}

template <class F>
void product(Part part, const F* a, Int down, Int along, const Mat<F>& b, const Mat<F>& y, Int count, Int inner, bool more) {
  constexpr Int LANES = Wide<F>::LANES;
  const Int wide = std::min(b.wide, y.wide);
  Int j = 0;
  for (; j + TILE * LANES <= wide; j += TILE * LANES) columns<F, TILE>(j, part, a, down, along, b.p, b.wide, y.p, y.wide, count, inner, more);
  for (; j < wide; j += LANES) columns<F, 1>(j, part, a, down, along, b.p, b.wide, y.p, y.wide, count, inner, more);
}

template <class F>
void times(const Mat<F>& y, const Mat<F>& a, const Mat<F>& b, bool more = false, Part part = WHOLE) {  // y (+)= a b
  product(part, a.p, a.wide, Int(1), b, y, a.rows, a.cols, more);
}

template <class F>
void down_times(const Mat<F>& y, const Mat<F>& a, const Mat<F>& b, bool more = false, Part part = WHOLE) {  // y (+)= a^T b
  product(part, a.p, Int(1), a.wide, b, y, a.cols, a.rows, more);
}

// Exchanges the odd blocks of H lanes of the rows i with the even ones of the rows i + H, and so, for H = LANES / 2 .. 1, transposes a square.
template <class F, Int H>
inline void exchange(typename Wide<F>::V* x) {
  using I = typename Wide<F>::I;
  constexpr Int LANES = Wide<F>::LANES;
  I low, high;
  for (Int j = 0; j < LANES; j++) low[j] = j & H ? LANES + j - H : j, high[j] = j & H ? LANES + j : j + H;
  for (Int i = 0; i < LANES; i++) {
    if (i & H) continue;
    const auto a = x[i], b = x[i + H];
    x[i] = __builtin_shuffle(a, b, low), x[i + H] = __builtin_shuffle(a, b, high);
  }
  if constexpr (H > 1) exchange<F, H / 2>(x);
}

template <class F>
void turn(const Mat<F>& y, const Mat<F>& a) {  // y = a^T
  using V = typename Wide<F>::V;
  constexpr Int LANES = Wide<F>::LANES;
  for (Int i = 0; i < a.rows; i += LANES)
    for (Int j = 0; j < a.cols; j += LANES) {
      V x[LANES];
      for (Int r = 0; r < LANES; r++) x[r] = *reinterpret_cast<const V*>(a.row(i + r) + j);
      exchange<F, LANES / 2>(x);
      for (Int r = 0; r < LANES; r++) *reinterpret_cast<V*>(y.row(j + r) + i) = x[r];
    }
}

// ---- rows

template <class F>
inline F dot(const F* a, const F* b, Int n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

template <class F>
inline F length(const F* a, Int n) {
  return std::sqrt(dot(a, a, n));
}

template <class F>
inline F total(const F* a, Int n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Int i = 0; i < n; i++) sum += a[i];
  return sum;
}

template <class F>
inline void scaled(F* y, const F* x, F s, Int n) {
#pragma omp simd
  for (Int i = 0; i < n; i++) y[i] = s * x[i];
}

template <class F>
inline void add(F* y, const F* x, F s, Int n) {
#pragma omp simd
  for (Int i = 0; i < n; i++) y[i] += s * x[i];
}

template <class F>
Mat<F> scaled_rows(const Mat<F>& room, const Mat<F>& x, const F* s) {
  const Mat<F> y = like(room, x);
  for (Int i = 0; i < x.rows; i++) scaled(y.row(i), x.row(i), s[i], x.wide);
  return y;
}

// ---- the activation

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {  // to an ulp or two; zero and infinity are 1e-38 and 2e38 here
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  const float n = std::nearbyint(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  const float power = __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
  return (y * r * r + r + 1.f) * power;
}

inline double lower_tail(double x, double) { return 0.5 * std::erfc(x * std::sqrt(0.5)); }
inline float lower_tail(float x, float bell) {  // of a normal variable, at x >= 0; bell = exp(-x^2 / 2)
  const float t = 1.f / (1.f + 0.32f * x);
  float y = -0.0210745703f;  // a minimax fit of tail / (t bell), right to 4e-8 of itself, for 1.5e-7 is too rough for what the second derivative multiplies
  for (float c : {0.0953897012f, -0.146671179f, 0.0652867219f, -0.00934936406f, 0.0586421891f, 0.0878320236f, 0.114621962f, 0.12766097f, 0.127661529f})
    y = y * t + c;
  return bell * t * y;
}

// phi and its first ORDER derivatives
template <int ORDER, class F>
void curve(const F* __restrict z, Int n, bool gelu, F* __restrict y, F* __restrict slope, F* __restrict bend) {
  if (gelu) {
#pragma omp simd
    for (Int i = 0; i < n; i++) {
      const F x = z[i], bell = exponential(F(-0.5) * x * x), tail = lower_tail(std::abs(x), bell), below = x < 0 ? tail : 1 - tail;
      const F density = bell * F(0.39894228040143267794);
      y[i] = x * below;
      if (ORDER > 0) slope[i] = below + x * density;
      if (ORDER > 1) bend[i] = density * (2 - x * x);
    }
  } else {
#pragma omp simd
    for (Int i = 0; i < n; i++) {
      const F x = z[i], s = 1 / (1 + exponential(-x)), rest = 1 - s;
      y[i] = x * s;
      if (ORDER > 0) slope[i] = s * (1 + x * rest);
      if (ORDER > 1) bend[i] = s * rest * (2 + x * (rest - s));
    }
  }
}

// ---- the answer and the error, a row at a time

enum Post : Int { NONE, RES, RMS, LN };
constexpr double EPS = 1e-6, TINY = 1e-30;

template <class F>
struct Net {
  Int post, V;
  const F *gain, *bias;  // of this memory, or null
  F* room[8];            // rows for what is between

  bool norms() const { return post == RMS || post == LN; }
  F g(Int i) const { return gain ? gain[i] : F(1); }

  F normal(const F* z, F* zh) const {  // -> r
    const F mean = post == LN ? total(z, V) / V : F(0);
    for (Int i = 0; i < V; i++) zh[i] = z[i] - mean;
    const F r = 1 / std::sqrt(dot(zh, zh, V) / V + F(EPS));
    scaled(zh, zh, r, V);
    return r;
  }

  void J(F* y, const F* w, const F* zh, F r) const {
    const F along = dot(w, zh, V) / V;
    for (Int i = 0; i < V; i++) y[i] = w[i] - along * zh[i];
    const F mean = post == LN ? total(y, V) / V : F(0);
    for (Int i = 0; i < V; i++) y[i] = r * (y[i] - mean);
  }

  void answer(F* y, const F* z, const F* k, const F* zh) const {  // zh where z is normalised
    for (Int i = 0; i < V; i++) y[i] = (post == NONE ? z[i] : k[i] + (norms() ? g(i) * zh[i] : z[i])) + (bias ? bias[i] : F(0));
  }

  void answer(F* y, const F* z, const F* k) const {
    if (norms()) normal(z, room[0]);
    answer(y, z, k, room[0]);
  }

  void error(F* d, const F* z, const F* k, const F* v) const {
    F *zh = room[0], *miss = room[1];
    const F r = norms() ? normal(z, zh) : F(1);
    answer(miss, z, k, zh);
    for (Int i = 0; i < V; i++) miss[i] -= v[i];
    if (!norms()) {
      std::copy(miss, miss + V, d);
      return;
    }
    for (Int i = 0; i < V; i++) miss[i] *= g(i);
    J(d, miss, zh, r);
  }

  void answer_back(F* dz, F* dk, F* dgain, F* dbias, const F* z, const F* dy) const {  // dk is written, the last two are added to
    for (Int i = 0; i < V && post != NONE; i++) dk[i] = dy[i];
    if (bias) add(dbias, dy, F(1), V);
    if (!norms()) {
      std::copy(dy, dy + V, dz);
      return;
    }
    F *zh = room[0], *w = room[1];
    const F r = normal(z, zh);
    for (Int i = 0; i < V; i++) w[i] = g(i) * dy[i];
    J(dz, w, zh, r);
    for (Int i = 0; i < V && gain; i++) dgain[i] += dy[i] * zh[i];
  }

  // dv is written, dk, dgain and dbias are added to
  void error_back(F* dz, F* dk, F* dv, F* dgain, F* dbias, const F* z, const F* k, const F* v, const F* dd) const {
    if (!norms()) {
      for (Int i = 0; i < V; i++) dz[i] = dd[i], dv[i] = -dd[i];
      for (Int i = 0; i < V && post == RES; i++) dk[i] += dd[i];
      return;
    }
    F *zh = room[0], *miss = room[1], *e = room[2], *de = room[3], *w = room[4], *last = room[5];
    const F r = normal(z, zh);
    answer(miss, z, k, zh);
    for (Int i = 0; i < V; i++) miss[i] -= v[i], e[i] = g(i) * miss[i];
    J(de, dd, zh, r);
    const F crossed = dot(e, zh, V) / V, back = dot(dd, zh, V) / V, both = dot(de, e, V) / V;
    for (Int i = 0; i < V; i++) {
      const F dmiss = g(i) * de[i];
      w[i] = g(i) * dmiss - r * (dd[i] * crossed + e[i] * back);
      dk[i] += dmiss, dv[i] = -dmiss;
      if (gain) dgain[i] += de[i] * miss[i] + dmiss * zh[i];
      if (bias) dbias[i] += dmiss;
    }
    J(last, w, zh, r);
    for (Int i = 0; i < V; i++) dz[i] = last[i] - r * zh[i] * both;
  }
};

// ---- one call

template <class F>
struct Call {
  Int L, C, K, V, X, n, post, gelu, H, chunk, window;
  const Int* sizes;  // in and out of every layer
  void** next;       // the tensors that are still to be read

  Call(const Int* shape, void** tensors)
      : L(shape[0]), C(shape[1]), K(shape[2]), V(shape[3]), X(shape[4]), n(shape[5]), post(shape[6]), gelu(shape[7]), H(shape[8]), chunk(shape[9]),
        window(shape[10]), sizes(shape + 11), next(tensors) {}
  Int in(Int l) const { return sizes[2 * l]; }
  Int out(Int l) const { return sizes[2 * l + 1]; }
  Int area(Int l) const { return in(l) * out(l); }
  Int fed(Int l) const { return l ? out(l - 1) : K; }  // in, without the ones of a bias
  F* tensor() { return static_cast<F*>(*next++); }
  F** layers() {
    F** found = reinterpret_cast<F**>(next);
    next += L;
    return found;
  }
};

template <class F>
struct Tokens {  // [rows, n C, H, .] of all chunks; what there is not is null
  const F *q, *k, *v, *decay, *momentum, *step, *real, *pull;
  const Int* ends;  // of every row: how many places are filled in the end
  const F *gain, *bias, *clip;
  Int H, chunk, length;
  explicit Tokens(Call<F>& a)
      : q(a.tensor()), k(a.tensor()), v(a.tensor()), decay(a.tensor()), momentum(a.tensor()), step(a.tensor()), real(a.tensor()), pull(a.tensor()),
        ends(reinterpret_cast<const Int*>(a.tensor())), gain(a.tensor()), bias(a.tensor()), clip(a.tensor()), H(a.H), chunk(a.chunk), length(a.n * a.C) {}

  Int place(Int x, Int t) const { return (x / H * length + t) * H + x % H; }  // of token t of memory x among all; the next one is H further on
  bool done(Int x, Int chunks) const { return chunks * chunk <= ends[x / H]; }
  bool begins(Int x, Int i) const { return i > 0 && done(x, i); }  // chunk 0 goes on where the last call ended
};

// What of every write, and of the start, is in the memory after every token of a chunk. Token j has row j + 1, before it is row 0. In double, for every
// row is made from the one before it, and small next to the rest.
struct Gates {
  const Int C, window;
  Arena<double> arena;
  Mat<double> E, G;  // zero above the diagonal
  std::vector<double> a, eta, r, beta, m, f;

  Gates(Int C, Int window)
      : C(C), window(window), E(arena.mat(C + 1, C)), G(arena.mat(C + 1, C)), a(C), eta(C), r(C), beta(C + 1, 1.), m(C + 1, 1.), f(C + 1, 0.) {}

  Int first(Int j) const { return std::max<Int>(j + 1 - window, 0); }  // whose gradients token j follows

  template <class F>
  void read(const Tokens<F>& t, Int at) {
    for (Int j = 0; j < C; j++, at += t.H) {
      a[j] = std::exp(double(t.decay[at])), eta[j] = t.momentum ? std::exp(double(t.momentum[at])) : 0, r[j] = t.real ? t.real[at] : 1;
      beta[j + 1] = a[j] * beta[j], m[j + 1] = eta[j] * m[j], f[j + 1] = a[j] * f[j] + r[j] * m[j + 1];
      double *e = E.row(j + 1), *g = G.row(j + 1);
      scaled(e, E.row(j), eta[j], j), e[j] = 0;
      for (Int i = first(j); i <= j; i++) e[i] -= t.step[at];
      scaled(g, G.row(j), a[j], j), g[j] = 0;
      add(g, e, r[j], j + 1);
    }
  }
};

template <class F>
using Mats = std::vector<Mat<F>>;

template <class F>
void fill(const Mat<F>& y, const F* x) {
  for (Int i = 0; i < y.rows; i++) std::copy(x + i * y.cols, x + (i + 1) * y.cols, y.row(i));
}

template <class F>
void keep(F* x, const Mat<F>& y) {
  for (Int i = 0; i < y.rows; i++) std::copy(y.row(i), y.row(i) + y.cols, x + i * y.cols);
}

template <class F>
void mixed(const Mat<F>& y, F s, const Mat<F>& x, F t) {  // y = s y + t x
  for (Int i = 0; i < y.rows; i++) {
    F *a = y.row(i), *b = x.row(i);
#pragma omp simd
    for (Int j = 0; j < y.cols; j++) a[j] = s * a[j] + t * b[j];
  }
}

// What one thread works with, for one memory and one chunk at a time.
template <class F>
struct Work {
  const Call<F>& a;
  const Tokens<F>& t;
  Arena<F> arena;
  Net<F> net;
  Mats<F> W, S, P, I, x, d, u, z, slope, bend, e, X, Z, slopes, scores, mixed_scores;
  Mats<F> turned;  // P, of the first layer in the backward only
  std::vector<const Mats<F>*> bases;
  Gates gates;
  std::vector<double> pull;  // of every row; row C is what the chunk leaves
  Mat<F> c, G, room, product_room, tokens_turned;
  std::vector<F> E;  // of the last token, as m
  F m;
  Int at;     // where the chunk's first token is
  bool over;  // the chunk ends in this call
  const bool with_start;

  Work(const Call<F>& a, const Tokens<F>& t, bool with_start) : a(a), t(t), gates(a.C, a.window), pull(a.C + 1, 1.), E(a.C), with_start(with_start) {
    const Int C = a.C;
    Int widest = std::max(a.K, a.V);
    for (Int l = 0; l < a.L; l++) {
      const Int in = a.in(l), out = a.out(l);
      widest = std::max({widest, in, out});
      for (Mats<F>* y : {&W, &S, &P, &I}) y->push_back(y == &S && !t.momentum ? Mat<F>{} : y == &I && !with_start ? Mat<F>{} : arena.mat(in, out));
      for (Mats<F>* y : {&d, &u, &z, &slope, &bend, &Z, &slopes}) y->push_back(arena.mat(C, out));
      for (Mats<F>* y : {&x, &e, &X}) y->push_back(arena.mat(C, in));
      for (Mats<F>* y : {&scores, &mixed_scores}) y->push_back(arena.mat(C, C));
      turned.push_back(arena.mat(out, in));
    }
    bases.push_back(&W);
    if (t.momentum) bases.push_back(&S);
    if (with_start) bases.push_back(&I);
    if (t.pull) bases.push_back(&P);
    c = arena.mat(Int(bases.size()), C + 1), G = arena.mat(C + 1, C);
    room = arena.mat(C, widest), product_room = arena.mat(C, widest), tokens_turned = arena.mat(widest, C);
    net = {a.post, a.V, nullptr, nullptr, {}};
    for (F*& room : net.room) room = arena.mat(1, a.V).p;
  }

  Mat<F> on_its_side(const Mat<F>& y) const {  // [C, cols] -> [cols, C]
    const Mat<F> found{tokens_turned.p, y.cols, y.rows, tokens_turned.wide};
    turn(found, y);
    return found;
  }

  void begin(Int xi) {
    net.gain = t.gain ? t.gain + xi * a.V : nullptr;
    net.bias = t.bias ? t.bias + xi * a.V : nullptr;
  }

  const F* query(Int j) const { return t.q + (at + j * a.H) * a.K; }
  const F* key(Int j) const { return t.k + (at + j * a.H) * a.K; }
  const F* value(Int j) const { return t.v + (at + j * a.H) * a.V; }

  void read(Int xi, Int i) {
    at = t.place(xi, i * a.C), over = t.done(xi, i + 1);
    for (Int j = 0; j < a.C; j++) feed(x[0].row(j), key(j)), feed(X[0].row(j), query(j));
    gates.read(t, at);
    for (Int j = 0; j <= a.C; j++) {
      const Int last = std::min(j, a.C - 1);
      if (t.pull) pull[j] = j < a.C || over ? t.pull[last] : 1;
      const double beta = gates.beta[last + 1], p = pull[j];
      for (size_t b = 0; b < bases.size(); b++) c.row(b)[j] = bases[b] == &P ? 1 - p : p * (b == 0 ? beta : bases[b] == &S ? gates.f[last + 1] : 1 - beta);
      for (Int k = 0; k <= last; k++) G.row(j)[k] = p * gates.G.row(last + 1)[k];
    }
    std::copy(gates.E.row(a.C), gates.E.row(a.C) + a.C, E.begin());
    m = gates.m[a.C];
  }

  void feed(F* row, const F* from) const {
    std::copy(from, from + a.K, row);
    if (a.in(0) > a.K) row[a.K] = 1;
  }

  template <int ORDER>
  void activate(const Mats<F>& to, const Mats<F>& from, Int l, const Mats<F>& slope, const Mats<F>& bend) const {  // the inputs of layer l
    for (Int i = 0; i < a.C; i++) {
      curve<ORDER>(from[l - 1].row(i), a.fed(l), a.gelu, to[l].row(i), slope[l - 1].row(i), bend[l - 1].row(i));
      if (a.in(l) > a.fed(l)) to[l].row(i)[a.fed(l)] = 1;
    }
  }

  template <int ORDER>
  void gradient() {  // at P -> x, z, e, d, u
    for (Int l = 0; l < a.L; l++) {
      if (l) activate<ORDER>(x, z, l, slope, bend);
      times(z[l], x[l], P[l]);
    }
    const Int last = a.L - 1;
    for (Int i = 0; i < a.C; i++) net.error(d[last].row(i), z[last].row(i), key(i), value(i));
    for (Int l = last; l > 0; l--) {
      turn(turned[l], P[l]);
      times(e[l], d[l], turned[l]);
      for (Int i = 0; i < a.C; i++)
        for (Int j = 0; j < a.fed(l); j++) d[l - 1].row(i)[j] = e[l].row(i)[j] * slope[l - 1].row(i)[j];
    }
    for (Int l = 0; l < a.L; l++)
      for (Int i = 0; i < a.C; i++) scaled(u[l].row(i), d[l].row(i), clipping(l, i), a.out(l));
  }

  F size(Int l, Int i) const { return length(x[l].row(i), a.in(l)) * length(d[l].row(i), a.out(l)); }
  F clipping(Int l, Int i) const { return t.clip ? *t.clip / std::max(size(l, i), *t.clip) : F(1); }

  template <int ORDER>
  void forward() {  // with what so many derivatives of the answers need
    gradient<ORDER + 1>();
    for (Int l = 0; l < a.L; l++) {
      if (l) activate<ORDER>(X, Z, l, slopes, slopes);
      times(scores[l], X[l], on_its_side(x[l]), false, LOWER_Y);
      for (Int i = 0; i < a.C; i++)
        for (Int j = 0; j <= i; j++) mixed_scores[l].row(i)[j] = scores[l].row(i)[j] * G.row(i)[j];
      times(Z[l], mixed_scores[l], u[l], false, LOWER_A);
      for (size_t b = 0; b < bases.size(); b++) times(Z[l], scaled_rows(room, X[l], c.row(b)), (*bases[b])[l], true);
    }
  }

  void leave() {  // W and S after the chunk
    for (Int l = 0; l < a.L; l++) {
      for (size_t b = 1; b < bases.size(); b++) mixed(W[l], b == 1 ? last(0) : F(1), (*bases[b])[l], last(b));
      if (bases.size() == 1) mixed(W[l], last(0), W[l], F(0));
      down_times(W[l], scaled_rows(room, x[l], G.row(a.C)), u[l], true);
      if (!t.momentum) continue;
      mixed(S[l], m, S[l], F(0));
      down_times(S[l], scaled_rows(room, x[l], E.data()), u[l], true);
    }
  }

  F last(size_t b) const { return c.row(b)[a.C]; }
};

template <class F>
Int forward(const Int* shape, void** tensors, Int threads) {
  Call<F> a(shape, tensors);
  const Tokens<F> t(a);
  F* o = a.tensor();
  F **W = a.layers(), **S = a.layers(), **P = a.layers(), **I = a.layers(), **Ws = a.layers(), **Ss = a.layers();
#pragma omp parallel num_threads(threads)
  {
    Work<F> w(a, t, I[0]);
#pragma omp for schedule(static)
    for (Int x = 0; x < a.X; x++) {
      w.begin(x);
      for (Int l = 0; l < a.L; l++) {
        fill(w.W[l], W[l] + x * a.area(l)), fill(w.P[l], P[l] + x * a.area(l));
        if (t.momentum) fill(w.S[l], S[l] + x * a.area(l));
        if (I[0]) fill(w.I[l], I[l] + x * a.area(l));
      }
      for (Int i = 0; i < a.n; i++) {
        for (Int l = 0; l < a.L; l++) {
          const Int at = (i * a.X + x) * a.area(l);
          if (t.begins(x, i)) std::copy(w.W[l].p, w.W[l].row(a.in(l)), w.P[l].p);
          if (Ws[0]) keep(Ws[l] + at, w.W[l]);
          if (Ws[0] && t.momentum) keep(Ss[l] + at, w.S[l]);
        }
        w.read(x, i);
        w.template forward<0>();
        for (Int j = 0; j < a.C; j++) w.net.answer(o + (w.at + j * a.H) * a.V, w.Z[a.L - 1].row(j), w.query(j));
        w.leave();
      }
      for (Int l = 0; l < a.L; l++) {
        keep(W[l] + x * a.area(l), w.W[l]), keep(P[l] + x * a.area(l), w.P[l]);
        if (t.momentum) keep(S[l] + x * a.area(l), w.S[l]);
      }
    }
  }
  return 0;
}

template <class F>
struct Back : Work<F> {
  using Work<F>::a, Work<F>::t, Work<F>::net, Work<F>::arena, Work<F>::bases, Work<F>::gates, Work<F>::c, Work<F>::E, Work<F>::m, Work<F>::G, Work<F>::at;
  using Work<F>::W, Work<F>::S, Work<F>::P, Work<F>::x, Work<F>::d, Work<F>::u, Work<F>::z, Work<F>::slope, Work<F>::bend, Work<F>::e, Work<F>::X, Work<F>::Z;
  using Work<F>::slopes, Work<F>::scores, Work<F>::mixed_scores;
  Mats<F> dW, dS, dP, dI, du, dx, dX, dz, own, turned_start, turned_other;  // own: room for an M' that is not W
  std::vector<Mats<F>*> dbases;
  Mat<F> dscores, dG, dc;
  std::vector<F> dE;
  std::vector<double> gG, gE;

  Back(const Call<F>& a, const Tokens<F>& t, bool with_start) : Work<F>(a, t, with_start) {
    for (Int l = 0; l < a.L; l++) {
      const Int in = a.in(l), out = a.out(l);
      for (Mats<F>* y : {&dW, &dS, &dP, &dI}) y->push_back(y == &dS && !t.momentum ? Mat<F>{} : y == &dI && !with_start ? Mat<F>{} : arena.mat(in, out));
      for (Mats<F>* y : {&du, &dz}) y->push_back(arena.mat(a.C, out));
      for (Mats<F>* y : {&dx, &dX}) y->push_back(arena.mat(a.C, in));
      own.push_back(P[l]), turned_other.push_back(arena.mat(out, in));
      if (with_start) turned_start.push_back(arena.mat(out, in));
    }
    dbases.push_back(&dW);
    if (t.momentum) dbases.push_back(&dS);
    if (with_start) dbases.push_back(&dI);
    if (t.pull) dbases.push_back(nullptr);  // M', which is W once the chunk has begun
    dscores = arena.mat(a.C, a.C), dG = arena.mat(a.C + 1, a.C), dc = arena.mat(Int(bases.size()), a.C + 1);
    dE.resize(a.C), gG.resize(a.C), gE.resize(a.C);
  }

  // Backwards through (row x)^T u, whose gradient is `left`
  void written(Int l, const F* row, F* drow, const Mat<F>& left) {
    const Mat<F> y = like(this->product_room, u[l]);
    times(y, x[l], left);
    for (Int i = 0; i < a.C; i++) {
      drow[i] += dot(y.row(i), u[l].row(i), a.out(l));
      add(du[l].row(i), y.row(i), row[i], a.out(l));
    }
    turn(turned_other[l], left);
    times(dx[l], scaled_rows(this->room, u[l], row), turned_other[l], true);
  }

  const Mat<F>& basis_on_its_side(const Mat<F>& basis, Int l) {
    if (basis.p == P[l].p) return this->turned[l];
    if (basis.p == this->I[l].p) return turned_start[l];
    turn(turned_other[l], basis);
    return turned_other[l];
  }

  // What the chunk's gradient at M' is added to: W's where the chunk began with M' = W
  Mats<F>& at_point(bool done) { return done ? dW : dP; }

  void answers(bool done, F* dq, F* dm) {
    for (Int l = a.L - 1; l >= 0; l--) {
      const Mat<F>& dZ = dz[l];
      times(dscores, dZ, this->on_its_side(u[l]), false, LOWER_Y);
      for (Int i = 0; i < a.C; i++) {
        F *s = dscores.row(i), *g = dG.row(i);
        for (Int j = 0; j <= i; j++) g[j] += s[j] * scores[l].row(i)[j], s[j] *= G.row(i)[j];
        std::fill(s + i + 1, s + a.C, F(0));
      }
      down_times(du[l], mixed_scores[l], dZ, false, LOWER_A_DOWN);
      times(dX[l], dscores, x[l], false, LOWER_A);
      down_times(dx[l], dscores, X[l], false, LOWER_A_DOWN);
      written(l, G.row(a.C), dG.row(a.C), dW[l]);
      if (t.momentum) {
        written(l, E.data(), dE.data(), dS[l]);
        *dm += inner(dS[l], S[l]);
      }
      for (size_t b = 0; b < bases.size(); b++) {
        const Mat<F>& basis = (*bases[b])[l];
        const Mat<F> y = like(this->product_room, X[l]);
        dc.row(b)[a.C] += inner(dW[l], basis);
        times(y, dZ, basis_on_its_side(basis, l));
        for (Int i = 0; i < a.C; i++) {
          dc.row(b)[i] += dot(y.row(i), X[l].row(i), a.in(l));
          add(dX[l].row(i), y.row(i), c.row(b)[i], a.in(l));
        }
      }
      // Now the gradients of what the chunk leaves become those of what it began with.
      F kept = this->last(0);
      for (size_t b = 1; b < bases.size(); b++) {
        if (!dbases[b] && done)
          kept += this->last(b);
        else
          mixed((dbases[b] ? *dbases[b] : dP)[l], dbases[b] == &dS ? m : F(1), dW[l], this->last(b));
      }
      mixed(dW[l], kept, dW[l], F(0));
      for (size_t b = 0; b < bases.size(); b++)
        down_times((dbases[b] ? *dbases[b] : at_point(done))[l], X[l], scaled_rows(this->room, dZ, c.row(b)), true);
      for (Int i = 0; i < a.C && l; i++)
        for (Int j = 0; j < a.fed(l); j++) dz[l - 1].row(i)[j] = dX[l].row(i)[j] * slopes[l - 1].row(i)[j];
    }
    for (Int i = 0; i < a.C; i++) add(dq + (at + i * a.H) * a.K, dX[0].row(i), F(1), a.K);
  }

  static F inner(const Mat<F>& a, const Mat<F>& b) {
    F sum = 0;
    for (Int i = 0; i < a.rows; i++) sum += dot(a.row(i), b.row(i), a.cols);
    return sum;
  }

  void unclip(Int l) {
    for (Int i = 0; i < a.C; i++) {
      F *g = du[l].row(i), *y = d[l].row(i);
      const F size = this->size(l, i), clip = *t.clip;
      if (size <= clip) continue;
      const F scale = clip / size, lost = scale * dot(g, y, a.out(l));
      add(dx[l].row(i), x[l].row(i), -lost / std::max(dot(x[l].row(i), x[l].row(i), a.in(l)), F(TINY)), a.in(l));
      const F share = lost / std::max(dot(y, y, a.out(l)), F(TINY));
      for (Int j = 0; j < a.out(l); j++) g[j] = scale * g[j] - share * y[j];
    }
  }

  void writes(bool done, F* dk, F* dv, F* dgain, F* dbias) {
    const Int last = a.L - 1;
    Mats<F>& dpoint = at_point(done);
    for (Int l = 0; l < a.L && t.clip; l++) unclip(l);
    for (Int l = 0; l < last; l++) {  // du becomes the gradient of d, and then of e
      for (Int i = 0; i < a.C; i++)
        for (Int j = 0; j < a.out(l); j++) {
          dz[l].row(i)[j] = du[l].row(i)[j] * e[l + 1].row(i)[j] * bend[l].row(i)[j];
          du[l].row(i)[j] *= slope[l].row(i)[j];
        }
      times(du[l + 1], du[l], P[l + 1], true);
    }
    for (Int i = 0; i < a.C; i++)
      net.error_back(dz[last].row(i), dk + (at + i * a.H) * a.K, dv + (at + i * a.H) * a.V, dgain, dbias, z[last].row(i), this->key(i), this->value(i),
                     du[last].row(i));
    for (Int l = last; l >= 0; l--) {
      down_times(dpoint[l], x[l], dz[l], true);
      times(dx[l], dz[l], this->turned[l], true);
      if (!l) continue;
      down_times(dpoint[l], du[l - 1], d[l], true);
      for (Int i = 0; i < a.C; i++)
        for (Int j = 0; j < a.fed(l); j++) dz[l - 1].row(i)[j] += dx[l].row(i)[j] * slope[l - 1].row(i)[j];
    }
    for (Int i = 0; i < a.C; i++) add(dk + (at + i * a.H) * a.K, dx[0].row(i), F(1), a.K);
  }

  // From the last token to the first: g is the gradient of what stands after it, d what its own row asks for. Row C is the last token's once more.
  void gated(F* ddecay, F* dmomentum, F* dstep, F* dpull, F dm) {
    const Int C = a.C, start = t.momentum ? 2 : 1;
    double gbeta = 0, gf = 0, gm = dm;
    std::fill(gG.begin(), gG.end(), 0.), std::copy(dE.begin(), dE.end(), gE.begin());
    for (Int row = C; row >= 0; row--) {
      const Int j = std::min(row, C - 1), here = at + j * a.H;
      const double p = this->pull[row], dstart = this->with_start ? dc.row(start)[row] : 0;
      const double dbeta = dc.row(0)[row] - dstart, df = t.momentum ? dc.row(1)[row] : 0;
      if (t.pull && (row < C || this->over)) {
        double told = dbeta * gates.beta[j + 1] + df * gates.f[j + 1] + dstart - dc.row(Int(bases.size()) - 1)[row];
        for (Int i = 0; i <= j; i++) told += dG.row(row)[i] * gates.G.row(j + 1)[i];
        dpull[j] += told;
      }
      gbeta += p * dbeta, gf += p * df;
      for (Int i = 0; i <= j; i++) gG[i] += p * dG.row(row)[i];
      if (row == C) continue;
      const double decay = gates.a[j], eta = gates.eta[j], r = gates.r[j];
      ddecay[here] = decay * (gbeta * gates.beta[j] + gf * gates.f[j] + dot(gG.data(), gates.G.row(j), j));
      gm += r * gf, add(gE.data(), gG.data(), r, j + 1);
      dstep[here] = -total(gE.data() + gates.first(j), j + 1 - gates.first(j));
      if (t.momentum) dmomentum[here] = eta * (gm * gates.m[j] + dot(gE.data(), gates.E.row(j), j));
      gbeta *= decay, gf *= decay, gm *= eta;
      scaled(gG.data(), gG.data(), decay, j), scaled(gE.data(), gE.data(), eta, j);
    }
  }
};

template <class F>
Int backward(const Int* shape, void** tensors, Int threads) {
  Call<F> a(shape, tensors);
  const Tokens<F> t(a);
  const F* dO = a.tensor();
  F *dq = a.tensor(), *dk = a.tensor(), *dv = a.tensor(), *ddecay = a.tensor(), *dmomentum = a.tensor(), *dstep = a.tensor();
  F *dgain = a.tensor(), *dbias = a.tensor(), *dpull = a.tensor();
  F **Ws = a.layers(), **Ss = a.layers(), **given = a.layers(), **I = a.layers();
  F **dW = a.layers(), **dS = a.layers(), **dP = a.layers(), **dI = a.layers();
#pragma omp parallel num_threads(threads)
  {
    Back<F> w(a, t, I[0]);
    const Int B = Int(w.bases.size()), C = a.C;
#pragma omp for schedule(static)
    for (Int x = 0; x < a.X; x++) {
      w.begin(x);
      for (Int l = 0; l < a.L; l++) {
        const Int at = x * a.area(l);
        fill(w.dW[l], dW[l] + at), fill(w.dP[l], dP[l] + at);
        if (t.momentum) fill(w.dS[l], dS[l] + at);
        if (I[0]) fill(w.I[l], I[l] + at), fill(w.dI[l], dI[l] + at), turn(w.turned_start[l], w.I[l]);
      }
      bool waits = true;  // dP is not zero
      for (Int i = a.n - 1; i >= 0; i--) {
        const bool done = t.begins(x, i);
        w.read(x, i);
        for (Int l = 0; l < a.L; l++) {
          const Int at = (i * a.X + x) * a.area(l);
          fill(w.W[l], Ws[l] + at);
          if (t.momentum) fill(w.S[l], Ss[l] + at);
          const bool apart = given[0] && !i;
          w.P[l] = apart ? w.own[l] : w.W[l];
          if (apart) fill(w.P[l], given[l] + x * a.area(l));
        }
        turn(w.turned[0], w.P[0]);
        w.template forward<1>();
        std::fill(w.dG.p, w.dG.row(C + 1), F(0)), std::fill(w.dc.p, w.dc.row(B), F(0)), std::fill(w.dE.begin(), w.dE.end(), F(0));
        F dm = 0;
        F *gain = dgain ? dgain + x * a.V : nullptr, *bias = dbias ? dbias + x * a.V : nullptr;
        for (Int j = 0; j < C; j++) {
          const Int key = (w.at + j * a.H) * a.K, value = (w.at + j * a.H) * a.V;
          std::fill(dq + key, dq + key + a.K, F(0)), std::fill(dk + key, dk + key + a.K, F(0));
          w.net.answer_back(w.dz[a.L - 1].row(j), dq + key, gain, bias, w.Z[a.L - 1].row(j), dO + value);
        }
        w.answers(done, dq, &dm);
        w.writes(done, dk, dv, gain, bias);
        w.gated(ddecay, dmomentum, dstep, dpull ? dpull + x * C : nullptr, dm);
        for (Int l = 0; l < a.L && done && waits; l++) mixed(w.dW[l], F(1), w.dP[l], F(1)), mixed(w.dP[l], F(0), w.dP[l], F(0));
        waits = !done;
      }
      for (Int l = 0; l < a.L; l++) {
        const Int at = x * a.area(l);
        keep(dW[l] + at, w.dW[l]), keep(dP[l] + at, w.dP[l]);
        if (t.momentum) keep(dS[l] + at, w.dS[l]);
        if (I[0]) keep(dI[l] + at, w.dI[l]);
      }
    }
  }
  return 0;
}

// ---- one token

template <class F>
struct Token {
  Call<F>& a;
  Net<F> net;
  std::vector<std::vector<F>> x, d, slope;  // by layer
  std::vector<F> z, zeros, spare;  // the last two are rows of S where there is no momentum

  explicit Token(Call<F>& a) : a(a), net{a.post, a.V, nullptr, nullptr, {}}, rooms(8, std::vector<F>(a.V)) {
    Int widest = a.V;
    for (Int l = 0; l < a.L; l++) {
      x.emplace_back(a.in(l)), d.emplace_back(a.out(l)), slope.emplace_back(a.out(l));
      widest = std::max({widest, a.in(l), a.out(l)});
    }
    z.resize(widest), zeros.resize(widest), spare.resize(widest);
    for (int i = 0; i < 8; i++) net.room[i] = rooms[i].data();
  }

  // z of the last layer, the inputs of every layer and the slopes between them
  void answer(F** W, Int at, const F* k) {
    for (Int l = 0; l < a.L; l++) {
      if (l)
        curve<1>(z.data(), a.fed(l), a.gelu, x[l].data(), slope[l - 1].data(), slope[l - 1].data());
      else
        std::copy(k, k + a.K, x[0].data());
      if (a.in(l) > a.fed(l)) x[l][a.fed(l)] = 1;
      std::fill(z.begin(), z.end(), F(0));
      for (Int i = 0; i < a.in(l); i++) add(z.data(), W[l] + at * a.area(l) + i * a.out(l), x[l][i], a.out(l));
    }
  }

  void gradient(F** W, Int at, const F* k, const F* v) {
    answer(W, at, k);
    net.error(d[a.L - 1].data(), z.data(), k, v);
    for (Int l = a.L - 1; l > 0; l--)
      for (Int i = 0; i < a.fed(l); i++) d[l - 1][i] = slope[l - 1][i] * dot(W[l] + at * a.area(l) + i * a.out(l), d[l].data(), a.out(l));
  }

 private:
  std::vector<std::vector<F>> rooms;
};

// A row of S and of W after x d^T, of which it has `share` times d.
template <class F>
void moved(F* __restrict w, F* s, const F* __restrict old, const F* before, const F* __restrict d, F share, F keep, F eta, Int n) {
#pragma omp simd
  for (Int j = 0; j < n; j++) {
    const F push = share * d[j] + eta * before[j];
    s[j] = push;
    w[j] = keep * old[j] + push;
  }
}

// W, S and M' of a token's memory, each read and written once. place counts the tokens of the chunk, this one with them.
template <class F>
Int token(const Int* shape, void** tensors, Int threads) {
  Call<F> a(shape, tensors);
  const Int H = a.H, chunk = a.chunk;
  const F *q = a.tensor(), *k = a.tensor(), *v = a.tensor(), *decay = a.tensor(), *momentum = a.tensor(), *step = a.tensor();
  const Int *real = reinterpret_cast<const Int*>(a.tensor()), *place = reinterpret_cast<const Int*>(a.tensor());
  const F *gain = a.tensor(), *bias = a.tensor(), *clip = a.tensor();
  F* o = a.tensor();
  F **W = a.layers(), **S = a.layers(), **P = a.layers(), **I = a.layers(), **newW = a.layers(), **newS = a.layers(), **newP = a.layers();
#pragma omp parallel num_threads(threads)
  {
    Token<F> t(a);
#pragma omp for schedule(static)
    for (Int at = 0; at < a.X; at++) {
      const Int b = at / H, h = at % H;
      if (real && real[b] <= 0) {
        for (Int l = 0; l < a.L; l++)
          for (auto [to, from] : {std::pair{newW, W}, {newS, S}, {newP, P}})
            if (to[0]) std::copy(from[l] + at * a.area(l), from[l] + (at + 1) * a.area(l), to[l] + at * a.area(l));
        std::fill(o + at * a.V, o + (at + 1) * a.V, F(0));
        continue;
      }
      const bool done = chunk && place[b] == chunk;
      const F keep = std::exp(decay[at]), eta = momentum ? std::exp(momentum[at]) : F(0);
      t.net.gain = gain ? gain + h * a.V : nullptr, t.net.bias = bias ? bias + h * a.V : nullptr;
      t.gradient(chunk ? P : W, at, k + at * a.K, v + at * a.V);
      for (Int l = 0; l < a.L; l++) {
        const Int in = a.in(l), out = a.out(l);
        const F *x = t.x[l].data(), *d = t.d[l].data();
        const F share = -step[at] * (clip ? *clip / std::max(length(x, in) * length(d, out), *clip) : F(1));
        for (Int i = 0; i < in; i++) {
          const Int row = at * a.area(l) + i * out;
          F *w = newW[l] + row, *s = momentum ? newS[l] + row : t.spare.data();
          moved(w, s, W[l] + row, momentum ? S[l] + row : t.zeros.data(), d, share * x[i], keep, eta, out);
          if (I[0]) add(w, I[l] + h * a.area(l) + i * out, 1 - keep, out);
          if (chunk) std::memcpy(newP[l] + row, done ? w : P[l] + row, out * sizeof(F));
        }
      }
      t.answer(newW, at, q + at * a.K);
      t.net.answer(o + at * a.V, t.z.data(), q + at * a.K);
    }
  }
  return 0;
}

}  // namespace

#define NEURAL_MEMORY(F, f)                                                                                                            \
  extern "C" Int neural_memory_##f(const Int* shape, void** tensors, Int threads) { return forward<F>(shape, tensors, threads); }       \
  extern "C" Int neural_memory_back_##f(const Int* shape, void** tensors, Int threads) { return backward<F>(shape, tensors, threads); } \
  extern "C" Int neural_memory_token_##f(const Int* shape, void** tensors, Int threads) { return token<F>(shape, tensors, threads); }
NEURAL_MEMORY(float, f32)
NEURAL_MEMORY(double, f64)
