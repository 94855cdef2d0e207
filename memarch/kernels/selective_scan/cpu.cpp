// The selective scan on a CPU, channels side by side in vector registers. The equations are in __init__.py, the gradients in torch_impl.py.
//
//   R rows   T tokens   E channels   N states of a channel   W channels of a tile   S tokens of a chunk; the states before it are kept
//
// A tile goes through all chunks before the next tile begins, and one state of it through a chunk before the next state: what is worked on
// stays in the nearest caches. Every sum is made by one thread in a fixed order, so the result does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using Int = int64_t;
constexpr Int W = 64;
constexpr double LOG2E = 1.4426950408889634;

inline double power_of_2(double x) { return std::exp2(x); }

// 2^x = 2^n 2^r with n the nearest integer. Adding ROUND leaves n + 127 in the low bits, which is the exponent of 2^n: that of 0 below the
// normal numbers, that of infinity above them. The polynomial is the best of its degree for 2^r on [-1/2, 1/2], 2.6e-9 off at most.
inline float power_of_2(float x) {
  constexpr float ROUND = 12582912 + 127;
  x = std::min(std::max(x, -127.0f), 128.0f);
  const float shifted = x + ROUND, r = x - (shifted - ROUND);
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float scale, p = 0.00015594678f;
  std::memcpy(&scale, &bits, 4);
  p = p * r + 0.0013406643f;
  p = p * r + 0.009617693f;
  p = p * r + 0.055503104f;
  p = p * r + 0.24022652f;
  p = p * r + 0.69314724f;
  return (p * r + 1) * scale;
}

template <class F>
inline F sigmoid(F x) {
  return 1 / (1 + power_of_2(F(-LOG2E) * x));
}

template <class F>
struct alignas(64) Lanes {
  F at[W];

  void fill(F value) { std::fill(at, at + W, value); }
  // w numbers that lie `stride` apart, then zeros
  void load(const F* from, Int w, Int stride = 1) {
    for (Int i = 0; i < w; i++) at[i] = from[i * stride];
    std::fill(at + w, at + W, F(0));
  }
  void store(F* to, Int w, Int stride = 1) const {
    for (Int i = 0; i < w; i++) to[i * stride] = at[i];
  }
};

template <class F>
struct Inputs {
  const F *x, *dt, *A, *B, *C, *D, *z;
  const Int* lengths;  // D, z and lengths may be null
  Int R, T, E, N, S;

  Int tiles() const { return (E + W - 1) / W; }
  Int length(Int row) const { return lengths ? std::clamp(lengths[row], Int(0), T) : T; }
};

// A tile of channels of one row, and a chunk of its tokens. Lanes beyond w are channels of zeros, which do nothing.
template <class F>
struct Tile {
  const Inputs<F>& in;
  Int row, e, w;  // the tile is w wide and begins at channel e
  Int begin, s;   // the chunk has s tokens and begins with this one
  std::vector<Lanes<F>> rate, h, dt, x, u, y;  // rate: A in units in which e^{dt A} is a power of 2;  u = dt x
  Lanes<F> skip, z;

  explicit Tile(const Inputs<F>& in) : in(in), rate(in.N), h(in.N), dt(in.S), x(in.S), u(in.S), y(in.S) {}

  // Where things are: the tile in [R, T, E], a token in [R, T, N], the tile in [R, E, N] and in [R, chunks, N, E].
  Int at(Int t) const { return (row * in.T + begin + t) * in.E + e; }
  Int of(Int t, Int n) const { return (row * in.T + begin + t) * in.N + n; }
  Int state(Int n) const { return (row * in.E + e) * in.N + n; }
  Int kept(Int n) const { return ((row * ((in.T + in.S - 1) / in.S) + begin / in.S) * in.N + n) * in.E + e; }

  void enter(Int row_, Int tile) {
    row = row_, e = tile * W, w = std::min(W, in.E - e);
    for (Int n = 0; n < in.N; n++) {
      rate[n].load(in.A + e * in.N + n, w, in.N);
      for (F& a : rate[n].at) a *= F(LOG2E);
    }
    skip.load(in.D + e, in.D ? w : 0);
  }

  // Load a chunk, with y = D x; the next one is `ahead` tokens from it.
  void read(Int begin_, Int ahead) {
    begin = begin_, s = std::min(in.S, in.length(row) - begin);
    for (const F* from : {in.x, in.dt, in.z}) fetch(from, ahead);
    for (Int t = 0; t < s; t++) {
      dt[t].load(in.dt + at(t), w);
      x[t].load(in.x + at(t), w);
#pragma omp simd
      for (Int i = 0; i < W; i++) {
        u[t].at[i] = dt[t].at[i] * x[t].at[i];
        y[t].at[i] = skip.at[i] * x[t].at[i];
      }
    }
  }

  void gate(Lanes<F>& y, Int t) {
    if (!in.z) return;
    z.load(in.z + at(t), w);
#pragma omp simd
    for (Int i = 0; i < W; i++) y.at[i] *= z.at[i] * sigmoid(z.at[i]);
  }

  // The tokens of a tile lie a whole row apart, too far for the processor to guess.
  void fetch(const F* from, Int ahead) const {
    for (Int t = 0; from && t < s; t++)
      for (Int i = 0; i < w; i += 64 / sizeof(F)) __builtin_prefetch(from + at(t + ahead) + i);
  }
};

template <class F>
void forward(const Inputs<F>& in, const F* state, F* y, F* last, F* states, Int threads) {
#pragma omp parallel num_threads(threads)
  {
    Tile<F> tile(in);
#pragma omp for collapse(2) schedule(static)
    for (Int row = 0; row < in.R; row++)
      for (Int number = 0; number < in.tiles(); number++) {
        tile.enter(row, number);
        const Int w = tile.w, length = in.length(row);
        for (Int n = 0; n < in.N; n++) tile.h[n].load(state + tile.state(n), state ? w : 0, in.N);
        for (Int begin = 0; begin < length; begin += in.S) {
          tile.read(begin, in.S);
          tile.fetch(y, in.S);
          for (Int n = 0; n < in.N; n++) {
            const Lanes<F>& rate = tile.rate[n];
            Lanes<F>& h = tile.h[n];
            if (states) h.store(states + tile.kept(n), w);
            for (Int t = 0; t < tile.s; t++) {
              const F b = in.B[tile.of(t, n)], c = in.C[tile.of(t, n)];
              const Lanes<F> &dt = tile.dt[t], &u = tile.u[t];
              Lanes<F>& out = tile.y[t];
#pragma omp simd
              for (Int i = 0; i < W; i++) {
                h.at[i] = power_of_2(dt.at[i] * rate.at[i]) * h.at[i] + u.at[i] * b;
                out.at[i] += c * h.at[i];
              }
            }
          }
          for (Int t = 0; t < tile.s; t++) {
            tile.gate(tile.y[t], t);
            tile.y[t].store(y + tile.at(t), w);
          }
        }
        for (tile.begin = (length + in.S - 1) / in.S * in.S; states && tile.begin < in.T; tile.begin += in.S)  // chunks of pads
          for (Int n = 0; n < in.N; n++) tile.h[n].store(states + tile.kept(n), w);
        tile.begin = 0;
        for (Int t = length; t < in.T; t++) std::fill_n(y + tile.at(t), w, F(0));
        for (Int n = 0; n < in.N; n++) tile.h[n].store(last + tile.state(n), w, in.N);
      }
  }
}

template <class F>
struct Gradients {
  F *x, *dt, *A, *B, *C, *D, *z, *state;  // of A and D one sum for each row, of B and C one for each of `parts` groups of tiles
};

template <class F>
void backward(const F* dy, const F* dlast, const Inputs<F>& in, const F* states, const Gradients<F>& to, Int parts, Int threads) {
#pragma omp parallel num_threads(threads)
  {
    Tile<F> tile(in);
    std::vector<Lanes<F>> a(in.S), h(in.S + 1), dh(in.N), dA(in.N), out(in.S), du(in.S), ddt(in.S);  // out: the gradient of y before the gate
    Lanes<F> dD;
#pragma omp for collapse(2) schedule(static)
    for (Int part = 0; part < parts; part++)
      for (Int row = 0; row < in.R; row++) {
        const Int length = in.length(row), sums = part * in.R * in.T * in.N;
        std::fill_n(to.B + sums + row * in.T * in.N, in.T * in.N, F(0));
        std::fill_n(to.C + sums + row * in.T * in.N, in.T * in.N, F(0));
        for (Int number = in.tiles() * part / parts; number < in.tiles() * (part + 1) / parts; number++) {
          tile.enter(row, number);
          const Int w = tile.w;
          dD.fill(0);
          for (Int n = 0; n < in.N; n++) {
            dA[n].fill(0);
            dh[n].load(dlast + tile.state(n), w, in.N);
          }
          for (Int begin = (length + in.S - 1) / in.S * in.S - in.S; begin >= 0; begin -= in.S) {
            tile.read(begin, -in.S);
            for (const F* from : {dy, (const F*)to.x, (const F*)to.dt, (const F*)to.z}) tile.fetch(from, -in.S);
            for (Int t = 0; t < tile.s; t++) {
              out[t].load(dy + tile.at(t), w);
              tile.gate(out[t], t);
#pragma omp simd
              for (Int i = 0; i < W; i++) dD.at[i] += out[t].at[i] * tile.x[t].at[i];
              du[t].fill(0);
              ddt[t].fill(0);
            }
            for (Int n = 0; n < in.N; n++) {
              const Lanes<F>& rate = tile.rate[n];
              h[0].load(states + tile.kept(n), w);
              for (Int t = 0; t < tile.s; t++) {
                const F b = in.B[tile.of(t, n)];
                const Lanes<F> &dt = tile.dt[t], &u = tile.u[t];
#pragma omp simd
                for (Int i = 0; i < W; i++) {
                  a[t].at[i] = power_of_2(dt.at[i] * rate.at[i]);
                  h[t + 1].at[i] = a[t].at[i] * h[t].at[i] + u.at[i] * b;
                }
              }
              for (Int t = 0; in.z && t < tile.s; t++) {
                const F c = in.C[tile.of(t, n)];
#pragma omp simd
                for (Int i = 0; i < W; i++) tile.y[t].at[i] += c * h[t + 1].at[i];
              }
              for (Int t = tile.s - 1; t >= 0; t--) {
                const F b = in.B[tile.of(t, n)], c = in.C[tile.of(t, n)];
                const Lanes<F> &dt = tile.dt[t], &u = tile.u[t];
                F db = 0, dc = 0;
#pragma omp simd reduction(+ : db, dc)
                for (Int i = 0; i < W; i++) {
                  const F g = dh[n].at[i] + c * out[t].at[i], before = g * a[t].at[i], exponent = before * h[t].at[i];
                  db += g * u.at[i];
                  dc += h[t + 1].at[i] * out[t].at[i];
                  du[t].at[i] += g * b;
                  ddt[t].at[i] += exponent * rate.at[i];
                  dA[n].at[i] += exponent * dt.at[i];
                  dh[n].at[i] = before;
                }
                to.B[sums + tile.of(t, n)] += db;
                to.C[sums + tile.of(t, n)] += dc;
              }
            }
            for (Int t = 0; t < tile.s; t++) {
              const Lanes<F> &dt = tile.dt[t], &x = tile.x[t];
#pragma omp simd
              for (Int i = 0; i < W; i++) {
                ddt[t].at[i] = ddt[t].at[i] * F(1 / LOG2E) + du[t].at[i] * x.at[i];
                du[t].at[i] = du[t].at[i] * dt.at[i] + tile.skip.at[i] * out[t].at[i];
              }
              du[t].store(to.x + tile.at(t), w);
              ddt[t].store(to.dt + tile.at(t), w);
              if (in.z) {
                Lanes<F> &z = tile.z, &y = tile.y[t];
                z.load(in.z + tile.at(t), w);
                out[t].load(dy + tile.at(t), w);
#pragma omp simd
                for (Int i = 0; i < W; i++) {
                  const F open = sigmoid(z.at[i]);
                  y.at[i] *= out[t].at[i] * open * (1 + z.at[i] * (1 - open));
                }
                y.store(to.z + tile.at(t), w);
              }
            }
          }
          tile.begin = 0;
          for (Int t = length; t < in.T; t++)
            for (F* pad : {to.x, to.dt, to.z})
              if (pad) std::fill_n(pad + tile.at(t), w, F(0));
          for (Int n = 0; n < in.N; n++) {
            dh[n].store(to.state + tile.state(n), w, in.N);
            dA[n].store(to.A + tile.state(n), w, in.N);
          }
          dD.store(to.D + row * in.E + tile.e, w);
        }
      }
  }
}

template <class F>
inline F dot(const F* a, const F* b, Int n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// y [rows] = w x + b, w [rows, n], b [rows] or null: four rows at a time, so that x is loaded once for them and no sum waits for itself.
template <class F>
inline void map(const F* w, const F* b, const F* x, F* y, Int rows, Int n) {
  Int j = 0;
  for (; j + 4 <= rows; j += 4) {
    const F *w0 = w + j * n, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
    F s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (Int i = 0; i < n; i++) {
      s0 += w0[i] * x[i];
      s1 += w1[i] * x[i];
      s2 += w2[i] * x[i];
      s3 += w3[i] * x[i];
    }
    y[j] = s0, y[j + 1] = s1, y[j + 2] = s2, y[j + 3] = s3;
  }
  for (; j < rows; j++) y[j] = dot(w + j * n, x, n);
  if (b)
    for (j = 0; j < rows; j++) y[j] += b[j];
}

template <class F>
struct Maps {  // K taps, P numbers that the steps are made of
  const F *into, *into_bias, *conv, *conv_bias, *select, *dt, *dt_bias, *A_log, *D, *out, *out_bias;
};

// One token of a whole Mamba layer: it is many small things, each a call otherwise. u and y [R, width].
template <class F>
void token(const F* u, const F* tail, const F* memory, const Maps<F>& maps, F* y, F* new_tail, F* new_memory, Int R, Int width, Int E, Int N, Int K,
           Int P, Int threads) {
#pragma omp parallel num_threads(std::min(R, threads))
  {
    std::vector<F> xz(2 * E), x(E), dt(E), grown(E), chosen(P + 2 * N);
    const F *B = chosen.data() + P, *C = B + N;
#pragma omp for schedule(static)
    for (Int row = 0; row < R; row++) {
      const F *now = xz.data(), *z = now + E, *before = tail + row * (K - 1) * E;
      map(maps.into, maps.into_bias, u + row * width, xz.data(), 2 * E, width);
      F* after = new_tail + row * (K - 1) * E;
      for (Int k = 0; k < K - 1; k++) std::copy_n(k < K - 2 ? before + (k + 1) * E : now, E, after + k * E);
#pragma omp simd
      for (Int e = 0; e < E; e++) {
        F sum = maps.conv[e * K + K - 1] * now[e] + (maps.conv_bias ? maps.conv_bias[e] : 0);
        for (Int k = 0; k < K - 1; k++) sum += maps.conv[e * K + k] * before[k * E + e];
        x[e] = sum * sigmoid(sum);
      }
      map(maps.select, static_cast<const F*>(nullptr), x.data(), chosen.data(), P + 2 * N, E);
      map(maps.dt, maps.dt_bias, chosen.data(), dt.data(), E, P);
#pragma omp simd
      for (Int e = 0; e < E; e++) grown[e] = power_of_2(F(LOG2E) * std::min(dt[e], F(20)));
      for (Int e = 0; e < E; e++) dt[e] = dt[e] > 20 ? dt[e] : std::log1p(grown[e]);  // torch's softplus
      for (Int e = 0; e < E; e++) {
        const Int at = (row * E + e) * N;
        const F rate = F(-LOG2E) * dt[e], u = dt[e] * x[e];
        F sum = maps.D[e] * x[e];
#pragma omp simd reduction(+ : sum)
        for (Int n = 0; n < N; n++) {
          const F h = power_of_2(rate * power_of_2(F(LOG2E) * maps.A_log[e * N + n])) * memory[at + n] + u * B[n];
          new_memory[at + n] = h;
          sum += h * C[n];
        }
        x[e] = sum * z[e] * sigmoid(z[e]);
      }
      map(maps.out, maps.out_bias, x.data(), y + row * width, width, E);
    }
  }
}

}  // namespace

#define SCAN(F, f)                                                                                                                                    \
  extern "C" Int selective_scan_##f(const F* x, const F* dt, const F* A, const F* B, const F* C, const F* D, const F* z, const F* state,              \
                                    const Int* lengths, F* y, F* last, F* states, Int R, Int T, Int E, Int N, Int S, Int threads) {                   \
    forward<F>({x, dt, A, B, C, D, z, lengths, R, T, E, N, S}, state, y, last, states, threads);                                                      \
    return 0;                                                                                                                                         \
  }                                                                                                                                                   \
  extern "C" Int selective_scan_backward_##f(const F* dy, const F* dlast, const F* x, const F* dt, const F* A, const F* B, const F* C, const F* D,    \
                                             const F* z, const F* states, const Int* lengths, F* dx, F* ddt, F* dA, F* dB, F* dC, F* dD, F* dz,       \
                                             F* dstate, Int R, Int T, Int E, Int N, Int S, Int parts, Int threads) {                                  \
    backward<F>(dy, dlast, {x, dt, A, B, C, D, z, lengths, R, T, E, N, S}, states, {dx, ddt, dA, dB, dC, dD, dz, dstate}, parts, threads);            \
    return 0;                                                                                                                                         \
  }                                                                                                                                                   \
  extern "C" Int mamba_token_##f(const F* u, const F* tail, const F* memory, const F* into, const F* into_bias, const F* conv, const F* conv_bias,    \
                                 const F* select, const F* dt, const F* dt_bias, const F* A_log, const F* D, const F* out, const F* out_bias, F* y,   \
                                 F* new_tail, F* new_memory, Int R, Int width, Int E, Int N, Int K, Int P, Int threads) {                             \
    token<F>(u, tail, memory, {into, into_bias, conv, conv_bias, select, dt, dt_bias, A_log, D, out, out_bias}, y, new_tail, new_memory, R, width,    \
             E, N, K, P, threads);                                                                                                                    \
    return 0;                                                                                                                                         \
  }
SCAN(float, f32)
SCAN(double, f64)
