// The exact k best pairs of s1[i] + s2[j]; the argument for pruning is in __init__.py.
//
//   Q searches   n sub-keys an axis   k pairs kept
//
// A score and its index are one whole number, a key: the score's bits, made to grow with the score, above the bits of the index, made to
// fall with it. Keys are never equal, and their order is that of the results, ties included.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

using Int = int64_t;

template <class F>
struct Number;
template <>
struct Number<float> {
  using Bits = uint32_t;
  using Key = uint64_t;
};
template <>
struct Number<double> {
  using Bits = uint64_t;
  using Key = unsigned __int128;
};

template <class F>
using Key = typename Number<F>::Key;
constexpr Int LOW = 0xffffffff;

template <class F>
inline Key<F> pack(F score, Int id) {
  using B = typename Number<F>::Bits;
  constexpr B sign = B(1) << (8 * sizeof(B) - 1);
  score += F(0);  // makes -0.0 equal 0.0
  B bits;
  std::memcpy(&bits, &score, sizeof bits);
  return Key<F>(bits & sign ? ~bits : bits | sign) << (8 * sizeof(B)) | Key<F>(LOW - id);
}

template <class F>
inline F score_of(Key<F> key) {
  using B = typename Number<F>::Bits;
  constexpr B sign = B(1) << (8 * sizeof(B) - 1);
  B bits = B(key >> (8 * sizeof(B)));
  bits = bits & sign ? bits ^ sign : ~bits;
  F score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

template <class F>
inline Int id_of(Key<F> key) {
  return LOW - Int(key & Key<F>(LOW));
}

// The k best of `many` keys, sorted, into `out`. Few are ranked by comparing each with each: no branch that the processor has to guess.
template <class K>
void sorted(K* keys, Int many, Int k, K* out, Int* rank) {
  if (many > 256) {
    if (k < many) std::nth_element(keys, keys + k - 1, keys + many, std::greater<K>());
    std::sort(keys, keys + k, std::greater<K>());
    std::copy(keys, keys + k, out);
    return;
  }
  std::fill(rank, rank + many, Int(0));
  for (Int i = 0; i < many; i++) {
    const K key = keys[i];
#pragma omp simd
    for (Int j = 0; j < many; j++) rank[j] += key > keys[j];
  }
  for (Int j = 0; j < many; j++)
    if (rank[j] < k) out[rank[j]] = keys[j];
}

template <class F>
inline Int at_least(const F* s, Int m, F t) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (Int j = 0; j < m; j++) count += s[j] >= t;
  return count;
}

// A score that k to `room` of s [m] reach, by halving; false if there is none (ties) or it is too hard to find (wild scores).
template <class F>
bool threshold(const F* s, Int m, Int k, Int room, F& t) {
  F low = std::numeric_limits<F>::infinity(), high = -low;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (Int j = 0; j < m; j++) {
    const F x = s[j] > -std::numeric_limits<F>::infinity() ? s[j] : std::numeric_limits<F>::infinity();
    low = x < low ? x : low;
    high = s[j] > high ? s[j] : high;
  }
  t = high;  // for k = 1 that is it
  for (int tries = 0; tries < 24; tries++) {
    const Int count = at_least(s, m, t);
    if (count >= k && count <= room) return true;
    (count < k ? high : low) = t;
    const F middle = low + (high - low) / 2;
    if (!(low <= middle && middle < high)) return false;
    t = middle;
  }
  return false;
}

template <class F>
struct Buffers {
  std::vector<Key<F>> keys;
  std::vector<Int> rank = std::vector<Int>(256);
};

// The k best of s [m] with these ids (the index where there are none) as keys, best first.
template <class F>
void best(const F* s, const Int* ids, Int m, Int k, Key<F>* out, Buffers<F>& buffers) {
  constexpr Int BLOCK = 16;
  const Int room = k + std::max<Int>(8, k / 2);
  Key<F>* keys = buffers.keys.data();
  Int many = 0;
  F t;
  if (m <= room || !threshold(s, m, k, room, t)) {
    for (; many < m; many++) keys[many] = pack(s[many], ids ? ids[many] : many);
    return sorted(keys, many, k, out, buffers.rank.data());
  }
  for (Int begin = 0; begin < m; begin += BLOCK) {
    const F* x = s + begin;
    uint32_t mask = 0;
    if (m - begin >= BLOCK) {
#pragma omp simd reduction(| : mask)
      for (int j = 0; j < BLOCK; j++) mask |= uint32_t(x[j] >= t) << j;
    } else {
      for (int j = 0; j < m - begin; j++) mask |= uint32_t(x[j] >= t) << j;
    }
    for (; mask; mask &= mask - 1) {
      const Int j = __builtin_ctz(mask);
      keys[many++] = pack(x[j], ids ? ids[begin + j] : begin + j);
    }
  }
  sorted(keys, many, k, out, buffers.rank.data());
}

template <class F>
bool has_nan(const F* s, Int n) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (Int j = 0; j < n; j++) found |= s[j] != s[j];
  return found;
}

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
