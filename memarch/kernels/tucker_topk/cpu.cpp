// The k best cells of a Tucker-decomposed score. The formulas are those of __init__.py.
//
//   Q searches   H heads   r rank   n sub-keys an axis, `axis` of them kept   k cells kept

#include "../product_key_topk/best.h"

namespace {

// The columns of s [r, n] that the filter u [r] likes best: their indices [axis] and themselves, kept [r, axis]. Returns whether there is a NaN.
template <class F>
bool filter(const F* s, const F* u, Int r, Int n, Int axis, F* filtered, Key<F>* keys, Int* index, F* kept, Buffers<F>& buffers) {
  for (Int i = 0; i < n; i++) filtered[i] = u[0] * s[i];
  for (Int p = 1; p < r; p++)
    for (Int i = 0; i < n; i++) filtered[i] += u[p] * s[p * n + i];
  if (has_nan(filtered, n)) return true;
  best(filtered, nullptr, n, axis, keys, buffers);
  for (Int i = 0; i < axis; i++) index[i] = id_of<F>(keys[i]);
  for (Int p = 0; p < r; p++)
    for (Int i = 0; i < axis; i++) kept[p * axis + i] = s[p * n + index[i]];
  return false;
}

template <class F>
Int search(const F* s1, const F* s2, const F* core, const F* u, const F* v, F* scores, Int* ids, Int Q, Int H, Int r, Int n, Int k, Int axis,
           Int threads) {
  int nan = 0;
#pragma omp parallel num_threads(threads) reduction(| : nan)
  {
    Buffers<F> buffers;
    buffers.keys.resize(std::max(n, axis * axis));
    std::vector<Key<F>> keys(std::max(k, axis));
    std::vector<F> filtered(n), a(r * axis), b(r * axis), grid(axis * axis);
    std::vector<Int> i(axis), j(axis), cells(axis * axis);
#pragma omp for schedule(static)
    for (Int x = 0; x < Q * H; x++) {
      const Int h = x % H;
      const F* C = core + h * r * r;
      if (filter(s1 + x * r * n, u + h * r, r, n, axis, filtered.data(), keys.data(), i.data(), a.data(), buffers) ||
          filter(s2 + x * r * n, v + h * r, r, n, axis, filtered.data(), keys.data(), j.data(), b.data(), buffers)) {
        nan = 1;
        continue;
      }
      for (Int y = 0; y < axis; y++) {
        F* row = grid.data() + y * axis;
        for (Int z = 0; z < axis; z++) cells[y * axis + z] = i[y] * n + j[z];
        for (Int q = 0; q < r; q++) {
          F left = 0;
          for (Int p = 0; p < r; p++) left += a[p * axis + y] * C[p * r + q];
          for (Int z = 0; z < axis; z++) row[z] = (q ? row[z] : F(0)) + left * b[q * axis + z];
        }
      }
      if (has_nan(grid.data(), axis * axis)) {
        nan = 1;
        continue;
      }
      best(grid.data(), cells.data(), axis * axis, k, keys.data(), buffers);
      for (Int y = 0; y < k; y++) scores[x * k + y] = score_of<F>(keys[y]), ids[x * k + y] = id_of<F>(keys[y]);
    }
  }
  return nan;
}

}  // namespace

#define TUCKER(F, f)                                                                                                                   \
  extern "C" Int tucker_topk_##f(const F* s1, const F* s2, const F* core, const F* u, const F* v, F* scores, Int* ids, Int Q, Int H,   \
                                 Int r, Int n, Int k, Int axis, Int threads) {                                                         \
    return search<F>(s1, s2, core, u, v, scores, ids, Q, H, r, n, k, axis, threads);                                                   \
  }
TUCKER(float, f32)
TUCKER(double, f64)
