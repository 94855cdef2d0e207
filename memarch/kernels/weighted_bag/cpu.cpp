// The weighted bag on a CPU, as plain loops that the compiler vectorises. The formulas are those of __init__.py.
//
//   T bags   R slots a bag   E groups   h slices of w columns   d = h w width   U rows that are read at all
//
// X is the type of the table, A that of sums, weights, y and dy. Every sum is made by one thread in the order of the slots,
// so the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using Int = int64_t;

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};

template <class X, class A>
inline X rounded(A x) {
  return X(x);
}

template <class A>
inline BFloat16 to_bfloat16(A value) {  // to nearest, ties to even; NaN stays NaN
  float x = float(value);
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return BFloat16{uint16_t((u >> 16) | 64)};
  return BFloat16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline BFloat16 rounded<BFloat16, float>(float x) {
  return to_bfloat16(x);
}
template <>
inline BFloat16 rounded<BFloat16, double>(double x) {
  return to_bfloat16(x);
}

constexpr Int AHEAD = 8;  // slots: rows lie anywhere, and only the program knows where the next ones are

template <class X>
inline void prefetch(const X* row, Int d) {
  for (Int byte = 0; byte < d * Int(sizeof(X)); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

template <class X, class A>
inline void add(A* __restrict y, const X* __restrict x, A scale, Int n) {
#pragma omp simd
  for (Int j = 0; j < n; j++) y[j] += scale * A(x[j]);
}

template <class A>
inline void scaled(A* __restrict y, const A* __restrict x, A scale, Int n) {
#pragma omp simd
  for (Int j = 0; j < n; j++) y[j] = scale * x[j];
}

template <class X, class A>
inline A dot(const A* __restrict x, const X* __restrict y, Int n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Int j = 0; j < n; j++) sum += x[j] * A(y[j]);
  return sum;
}

template <class X, class A>
void forward(const X* table, const Int* ids, const A* weights, const Int* groups, A* y, Int T, Int R, Int E, Int h, Int d, Int threads) {
  const Int w = d / h;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int t = 0; t < T; t++) {
    A* out = y + t * E * d;
    std::fill(out, out + E * d, A(0));
    for (Int s = t * R; s < (t + 1) * R; s++) {
      if (s + AHEAD < T * R) prefetch(table + ids[s + AHEAD] * d, d);
      const X* row = table + ids[s] * d;
      A* sum = out + (groups ? groups[s] * d : 0);
      for (Int i = 0; i < h; i++) add(sum + i * w, row + i * w, weights[s * h + i], w);
    }
  }
}

// Segment u: the slots order[begins[u]] .. order[begins[u + 1] - 1] read row rows[u]. dtable is [U, d], or the whole table's if `dense`;
// dtable and dweights may be null. One visit of a segment gives both.
template <class X, class A>
void backward(const X* table, const A* dy, const A* weights, const Int* groups, const Int* order, const Int* begins, const Int* rows, X* dtable, A* dweights,
              Int R, Int E, Int h, Int d, Int U, Int dense, Int threads) {
  const Int w = d / h;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<A[]> sum(new A[d]);
#pragma omp for schedule(dynamic, 64)
    for (Int u = 0; u < U; u++) {
      const X* row = table + rows[u] * d;
      if (dweights && u + AHEAD < U) prefetch(table + rows[u + AHEAD] * d, d);
      for (Int p = begins[u]; p < begins[u + 1]; p++) {
        const Int s = order[p], e = groups ? groups[s] : 0;
        const A* g = dy + (s / R * E + e) * d;
        for (Int i = 0; i < h; i++) {
          if (dweights) dweights[s * h + i] = dot(g + i * w, row + i * w, w);
          if (!dtable) continue;
          if (p == begins[u])
            scaled(sum.get() + i * w, g + i * w, weights[s * h + i], w);
          else
            add(sum.get() + i * w, g + i * w, weights[s * h + i], w);
        }
      }
      if (!dtable) continue;
      X* out = dtable + (dense ? rows[u] : u) * d;
#pragma omp simd
      for (Int j = 0; j < d; j++) out[j] = rounded<X, A>(sum[j]);
    }
  }
}

struct Slot {
  Int id, at;
};

}  // namespace

#define BAG(X, A, x, a)                                                                                                                              \
  extern "C" Int bag_forward_##x##_##a(const X* table, const Int* ids, const A* weights, const Int* groups, A* y, Int T, Int R, Int E, Int h, Int d, \
                                       Int threads) {                                                                                                \
    forward<X, A>(table, ids, weights, groups, y, T, R, E, h, d, threads);                                                                           \
    return 0;                                                                                                                                        \
  }                                                                                                                                                  \
  extern "C" Int bag_backward_##x##_##a(const X* table, const A* dy, const A* weights, const Int* groups, const Int* order, const Int* begins,       \
                                        const Int* rows, X* dtable, A* dweights, Int, Int R, Int E, Int h, Int d, Int U, Int dense, Int threads) {   \
    backward<X, A>(table, dy, weights, groups, order, begins, rows, dtable, dweights, R, E, h, d, U, dense, threads);                                \
    return 0;                                                                                                                                        \
  }
BAG(float, float, f32, f32)
BAG(float, double, f32, f64)
BAG(double, double, f64, f64)
BAG(BFloat16, float, bf16, f32)
BAG(BFloat16, double, bf16, f64)

// A stable radix sort of the slots by id -> their order, the rows that are read [U], the first slot of each and one end [U + 1]; returns U.
extern "C" Int bag_sort(const Int* ids, Int S, Int N, Int* order, Int* begins, Int* rows, Int) {
  constexpr Int BITS = 11, DIGITS = 1 << BITS;
  std::unique_ptr<Slot[]> from(new Slot[S]), to(new Slot[S]);
  for (Int s = 0; s < S; s++) from[s] = {ids[s], s};
  for (Int shift = 0; shift < 63 && (N - 1) >> shift > 0; shift += BITS) {
    Int count[DIGITS] = {0};
    for (Int s = 0; s < S; s++) count[(from[s].id >> shift) & (DIGITS - 1)]++;
    for (Int digit = 0, sum = 0; digit < DIGITS; digit++) {
      const Int here = count[digit];
      count[digit] = sum;
      sum += here;
    }
    for (Int s = 0; s < S; s++) to[count[(from[s].id >> shift) & (DIGITS - 1)]++] = from[s];
    std::swap(from, to);
  }
  Int U = 0;
  for (Int p = 0; p < S; p++) {
    order[p] = from[p].at;
    if (p && from[p].id == from[p - 1].id) continue;
    rows[U] = from[p].id;
    begins[U++] = p;
  }
  begins[U] = S;
  return U;
}

// Fresh memory costs 2 us per page of 4 KiB, as much as filling it: ask for pages of 2 MiB.
extern "C" Int bag_huge_pages(void* memory, Int bytes, Int) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t begin = (uintptr_t(memory) + PAGE - 1) & ~(PAGE - 1), end = (uintptr_t(memory) + bytes) & ~(PAGE - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return 0;
}
