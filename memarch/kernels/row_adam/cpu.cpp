// Adam on the rows of a table that have a gradient; the formulas are in __init__.py. Rows lie far apart, so those of the next steps are fetched ahead.
//
//   U rows with a gradient   d width   how: b1, b2, lr / (1 - b1^t), sqrt(1 - b2^t), eps

#include <cmath>
#include <cstdint>

namespace {

using Int = int64_t;
constexpr Int AHEAD = 8;

template <class F>
void fetch(const F* row, Int d) {
  for (Int j = 0; j < d; j += 64 / sizeof(F)) __builtin_prefetch(row + j, 1);
}

template <class F>
void step(F* p, F* m, F* v, const Int* rows, const F* g, const double* how, Int U, Int d, bool one, Int threads) {
  const F a = F(1 - how[0]), b2 = F(how[1]), b = F(1 - how[1]), rate = F(how[2]), root = F(1 / how[3]), eps = F(how[4]);
  const Int width = one ? 1 : d;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int u = 0; u < U; u++) {
    if (u + AHEAD < U) {
      const Int next = rows[u + AHEAD];
      fetch(p + next * d, d), fetch(m + next * d, d), fetch(v + next * width, width);
    }
    F *P = p + rows[u] * d, *M = m + rows[u] * d, *V = v + rows[u] * width;
    const F* G = g + u * d;
    if (one) {
      F sum = 0;
#pragma omp simd reduction(+ : sum)
      for (Int j = 0; j < d; j++) sum += G[j] * G[j];
      V[0] = b2 * V[0] + b * (sum / F(d));
      const F scale = rate / (std::sqrt(V[0]) * root + eps);
#pragma omp simd
      for (Int j = 0; j < d; j++) M[j] += a * (G[j] - M[j]), P[j] -= scale * M[j];
    } else {
#pragma omp simd
      for (Int j = 0; j < d; j++) {
        M[j] += a * (G[j] - M[j]);
        V[j] = b2 * V[j] + b * (G[j] * G[j]);
        P[j] -= rate * M[j] / (std::sqrt(V[j]) * root + eps);
      }
    }
  }
}

}  // namespace

#define ROW_ADAM(F, f)                                                                                                                     \
  extern "C" Int row_adam_##f(F* p, F* m, F* v, const Int* rows, const F* g, const double* how, Int U, Int d, Int one, Int threads) {      \
    step<F>(p, m, v, rows, g, how, U, d, one != 0, threads);                                                                               \
    return 0;                                                                                                                              \
  }
ROW_ADAM(float, f32)
ROW_ADAM(double, f64)
