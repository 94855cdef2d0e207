// The exact k best pairs of s1[i] + s2[j]; the argument for pruning is in __init__.py.
//
//   Q searches   n sub-keys an axis   k pairs kept

#include "best.h"

namespace {

template <class F>
Int search(const F* s1, const F* s2, F* scores, Int* ids, Int Q, Int n, Int k, Int threads) {
  Int P = 0;
  for (Int a = 0; a < k; a++) P += k / (a + 1);
  int nan = 0;
#pragma omp parallel num_threads(threads) reduction(| : nan)
  {
    Buffers<F> buffers;
    buffers.keys.resize(std::max(n, P));
    std::vector<Key<F>> first(k), second(k);
    std::vector<F> t2(k), sums(P);
    std::vector<Int> j(k), pairs(P);
#pragma omp for schedule(static)
    for (Int q = 0; q < Q; q++) {
      if (has_nan(s1 + q * n, n) || has_nan(s2 + q * n, n)) {
        nan = 1;
        continue;
      }
      best(s1 + q * n, nullptr, n, k, first.data(), buffers);
      best(s2 + q * n, nullptr, n, k, second.data(), buffers);
      for (Int b = 0; b < k; b++) t2[b] = score_of<F>(second[b]), j[b] = id_of<F>(second[b]);
      for (Int a = 0, at = 0; a < k; at += k / ++a) {
        const F x = score_of<F>(first[a]);
        const Int row = id_of<F>(first[a]) * n;
        for (Int b = 0; b < k / (a + 1); b++) sums[at + b] = x + t2[b], pairs[at + b] = row + j[b];
      }
      best(sums.data(), pairs.data(), P, k, first.data(), buffers);
      for (Int r = 0; r < k; r++) scores[q * k + r] = score_of<F>(first[r]), ids[q * k + r] = id_of<F>(first[r]);
    }
  }
  return nan;
}

template <class F>
void scatter(const F* dscores, const Int* ids, F* ds1, F* ds2, Int Q, Int n, Int k, Int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int q = 0; q < Q; q++) {
    std::fill(ds1 + q * n, ds1 + (q + 1) * n, F(0));
    std::fill(ds2 + q * n, ds2 + (q + 1) * n, F(0));
    for (Int r = q * k; r < (q + 1) * k; r++) {
      const uint32_t id = uint32_t(ids[r]), size = uint32_t(n);
      ds1[q * n + id / size] += dscores[r];
      ds2[q * n + id % size] += dscores[r];
    }
  }
}

}  // namespace

#define TOPK(F, f)                                                                                                                   \
  extern "C" Int product_key_topk_##f(const F* s1, const F* s2, F* scores, Int* ids, Int Q, Int n, Int k, Int threads) {             \
    return search<F>(s1, s2, scores, ids, Q, n, k, threads);                                                                         \
  }                                                                                                                                  \
  extern "C" Int product_key_topk_backward_##f(const F* dscores, const Int* ids, F* ds1, F* ds2, Int Q, Int n, Int k, Int threads) { \
    scatter<F>(dscores, ids, ds1, ds2, Q, n, k, threads);                                                                            \
    return 0;                                                                                                                        \
  }
TOPK(float, f32)
TOPK(double, f64)
