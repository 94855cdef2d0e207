// The k best of some scores, exactly, ties to the lowest id.
//
// A score and its id are one whole number, a key: the score's bits, made to grow with the score, above the bits of the id, made to fall
// with it. Keys are never equal, and their order is that of the results, ties included. Ids of float32 scores have 32 bits.

#pragma once
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

}  // namespace
