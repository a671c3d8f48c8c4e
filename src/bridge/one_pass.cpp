#include "one_pass.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "arithmetic.h"
#include "kernel_form.h"
#include "low_precision_kernels.h"
#include "rules/all.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TIG_X86 1
#endif

namespace tig {
namespace {

// With fewer elements in all, one thread is faster than waking another, and much faster where the cores are busy.
constexpr int64_t PARALLEL_FROM = 1 << 17;
// How many elements a chunk has. Updating them takes long compared to fetching a chunk, and short compared to a time
// slice of the scheduler.
constexpr int64_t CHUNK = 1 << 15;
// With fewer bytes of zeros in all, those that come next find them in a cache.
constexpr int64_t STREAM_FROM = 1 << 25;
// How many elements of f16 or bf16 are converted at a time. Five buffers of this many floats stay in the L1 cache.
constexpr int64_t BLOCK = 512;

// AVX-512 with vectors of 256 and of 512 bits. clang and GCC spell this differently, and each of them ignores the whole
// attribute, with its instruction set, if it contains the other's spelling.
#define TIG_AVX512_SET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#if defined(__clang__)
#define TIG_AVX512_IN_256 __attribute__((target(TIG_AVX512_SET ",tune=skylake-avx512")))
#define TIG_AVX512_IN_512 __attribute__((target(TIG_AVX512_SET), min_vector_width(512)))
#else
#define TIG_AVX512_IN_256 __attribute__((target(TIG_AVX512_SET ",prefer-vector-width=256")))
#define TIG_AVX512_IN_512 __attribute__((target(TIG_AVX512_SET ",prefer-vector-width=512")))
#endif

#ifdef TIG_X86
constexpr bool FMA_EVERYWHERE = false;
#elif defined(__FMA__) || defined(__aarch64__)
constexpr bool FMA_EVERYWHERE = true;
#else
constexpr bool FMA_EVERYWHERE = false;
#endif

constexpr bool is_sgd(Rule r) { return r <= Rule::SgdFirstNesterov; }
constexpr bool is_adam(Rule r) { return r >= Rule::Adam && r <= Rule::AdamWAmsgrad; }
constexpr bool is_rmsprop(Rule r) { return r >= Rule::RmsProp && r <= Rule::RmsPropCenteredMomentum; }

// The rule of one of our own optimizers; `void` for the rules that stand here.
template <Rule R>
struct OwnKernel {
  using Type = void;
};
#define TIG_OWN_KERNEL(NAME)     \
  template <>                    \
  struct OwnKernel<Rule::NAME> { \
    using Type = rules::NAME;    \
  };
TIG_OWN_KERNELS(TIG_OWN_KERNEL)

// A step of one of our own optimizers (rules/).
template <typename Kernel, bool DECAY, bool FMA, typename S>
TIG_INLINE void update_own(S* __restrict p, const S* __restrict g, S* __restrict a, S* __restrict b, S* __restrict c,
                           int64_t n, const double* numbers, S factor) {
  S k[std::tuple_size<Numbers>::value];
  for (size_t i = 0; i < std::tuple_size<Numbers>::value; ++i) k[i] = S(numbers[i]);
  for (int64_t i = 0; i < n; ++i) {
    S w = p[i], s[3] = {};
    if constexpr (Kernel::tensors > 0) s[0] = a[i];
    if constexpr (Kernel::tensors > 1) s[1] = b[i];
    if constexpr (Kernel::tensors > 2) s[2] = c[i];
    Kernel::template element<DECAY, FMA, S>(w, g[i] * factor, s, k);
    p[i] = w;
    if constexpr (Kernel::tensors > 0) a[i] = s[0];
    if constexpr (Kernel::tensors > 1) b[i] = s[1];
    if constexpr (Kernel::tensors > 2) c[i] = s[2];
  }
}

template <Rule R, bool DECAY, bool FMA, typename S>
TIG_INLINE void update(S* __restrict p, const S* __restrict g, S* __restrict a, S* __restrict b, S* __restrict c,
                       int64_t n, const double* k, S factor) {
  using Own = typename OwnKernel<R>::Type;
  if constexpr (!std::is_void<Own>::value) return update_own<Own, DECAY, FMA, S>(p, g, a, b, c, n, k, factor);
  const S k0 = S(k[0]), k1 = S(k[1]), k2 = S(k[2]), k3 = S(k[3]);
  const S k4 = S(k[4]), k5 = S(k[5]), k6 = S(k[6]), k7 = S(k[7]), one_over_k6 = S(1) / k6;
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (R == Rule::Lerp) {
      p[i] = mul_add<FMA>(g[i], k1, p[i] * k0);
    } else if constexpr (R == Rule::Mean) {
      p[i] = p[i] + (g[i] - p[i]) / k0;
    } else if constexpr (R == Rule::Scale) {
      p[i] = p[i] * k0;
    } else if constexpr (R == Rule::Clamp) {
      const S x = p[i] > k0 ? k0 : p[i];
      p[i] = x < -k0 ? -k0 : x;
    } else if constexpr (R == Rule::Swap) {
      const S x = p[i];
      p[i] = a[i];
      a[i] = x;
    } else if constexpr (is_sgd(R)) {
      S d = g[i] * factor;
      if constexpr (DECAY) d = mul_add<FMA>(p[i], k1, d);
      if constexpr (R != Rule::Sgd) {
        constexpr bool first = R == Rule::SgdFirst || R == Rule::SgdFirstNesterov;
        S buffer = d;
        if constexpr (!first) buffer = mul_add<FMA>(d, k3, a[i] * k2);
        a[i] = buffer;
        constexpr bool nesterov = R == Rule::SgdNesterov || R == Rule::SgdFirstNesterov;
        d = nesterov ? mul_add<FMA>(buffer, k2, d) : buffer;
      }
      p[i] = mul_add<FMA>(d, -k0, p[i]);
    } else if constexpr (is_adam(R)) {
      constexpr bool decoupled = R == Rule::AdamW || R == Rule::AdamWAmsgrad;
      S d = g[i] * factor, w = p[i];
      if constexpr (DECAY && decoupled) w = w * k1;
      if constexpr (DECAY && !decoupled) d = mul_add<FMA>(w, k1, d);
      const S m = mul_add<FMA>(d, k3, a[i] * k2);
      S v = mul_add<FMA>(k5 * d, d, b[i] * k4);
      a[i] = m;
      b[i] = v;
      if constexpr (R == Rule::AdamAmsgrad || R == Rule::AdamWAmsgrad) {
        // A NaN stays, as in torch::max.
        const S most = c[i];
        v = v > most || v != v ? v : most;
        c[i] = v;
      }
      const S denominator = quotient<FMA>(root(v), k6, one_over_k6) + k7;
      p[i] = w + (-k0 * m) / denominator;
    } else {
      constexpr bool centered = R == Rule::RmsPropCentered || R == Rule::RmsPropCenteredMomentum;
      constexpr bool momentum = R == Rule::RmsPropMomentum || R == Rule::RmsPropCenteredMomentum;
      S d = g[i] * factor;
      if constexpr (DECAY) d = mul_add<FMA>(p[i], k1, d);
      S average = mul_add<FMA>(k3 * d, d, a[i] * k2);
      a[i] = average;
      if constexpr (centered) {
        const S mean = mul_add<FMA>(d, k3, c[i] * k2);
        c[i] = mean;
        average = mul_add<FMA>(-mean, mean, average);
      }
      average = root(average) + k4;
      if constexpr (momentum) {
        const S buffer = b[i] * k5 + d / average;
        b[i] = buffer;
        p[i] = mul_add<FMA>(buffer, -k0, p[i]);
      } else {
        p[i] = p[i] + (-k0 * d) / average;
      }
    }
  }
}

template <typename T>
TIG_INLINE void load(float* __restrict to, const T* __restrict from, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]) * factor;
}

template <typename T>
TIG_INLINE void store(T* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

TIG_INLINE double widened(double x) { return x; }
TIG_INLINE double widened(float x) { return x; }
template <typename T>
TIG_INLINE double widened(T x) {
  return static_cast<float>(x);
}

// The number of partial sums that run side by side. With a single sum each addition would wait for the one before.
constexpr int LANES = 32;
// Memory that is only read may be prefetched this many bytes ahead, where the processor's own prefetcher stops at the
// end of a page. LINE is the size of a cache line.
constexpr int64_t AHEAD = 8192, LINE = 64;

template <typename T>
TIG_INLINE void fetch_ahead(const T* from, int64_t rest, bool prefetch) {
  if (!prefetch || rest * int64_t(sizeof(T)) <= AHEAD + LANES * int64_t(sizeof(T))) return;
  for (int64_t line = 0; line < LANES * int64_t(sizeof(T)); line += LINE)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD + line);
}

template <typename T>
TIG_INLINE double squares_in_f64(const T* from, int64_t n, bool prefetch) {
  double sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    fetch_ahead(from + i, n - i, prefetch);
    for (int j = 0; j < LANES; ++j) {
      const double x = widened(from[i + j]);
      sums[j] += x * x;
    }
  }
  for (; i < n; ++i) {
    const double x = widened(from[i]);
    sums[0] += x * x;
  }
  double sum = 0;
  for (double each : sums) sum += each;
  return sum;
}

// Sums up squares in f32, a few for each lane, and these sums in f64: conversions of every element would take a fifth
// longer. A lane's rounding errors stay below 2^-19 of its sum in the worst case, and those of different lanes cancel.
template <bool FMA, typename T>
TIG_INLINE double sum_of_squares(const T* from, int64_t n, bool prefetch) {
  if constexpr (std::is_same<T, double>::value) return squares_in_f64(from, n, prefetch);
  double sums[LANES] = {};
  int64_t i = 0;
  while (i + LANES <= n) {
    float part[LANES] = {};
    for (const int64_t end = std::min(n - LANES, i + 31 * LANES); i <= end; i += LANES) {
      fetch_ahead(from + i, n - i, prefetch);
      for (int j = 0; j < LANES; ++j) {
        const float x = static_cast<float>(from[i + j]);
        part[j] = mul_add<FMA>(x, x, part[j]);
      }
    }
    for (int j = 0; j < LANES; ++j) sums[j] += part[j];
  }
  for (; i < n; ++i) sums[0] += widened(from[i]) * widened(from[i]);
  double sum = 0;
  for (double each : sums) sum += each;
  // Squares in f32 reach from 1e-38 to 1e38 alone. A sum near these bounds is made again in f64.
  constexpr double LEAST = 1e-23, MOST = std::numeric_limits<double>::max();
  return sum > LEAST && sum <= MOST ? sum : squares_in_f64(from, n, prefetch);
}

// The largest absolute value; NaN if an element is NaN.
template <typename T>
TIG_INLINE double largest(const T* from, int64_t n, bool prefetch) {
  double most[LANES] = {}, nan[LANES] = {};
  const auto look = [&](T value, int lane) {
    const double x = magnitude(widened(value));
    most[lane] = x > most[lane] ? x : most[lane];
    nan[lane] = x == x ? nan[lane] : x;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    fetch_ahead(from + i, n - i, prefetch);
    for (int j = 0; j < LANES; ++j) look(from[i + j], j);
  }
  for (; i < n; ++i) look(from[i], 0);
  double all = 0;
  for (double each : most) all = each > all ? each : all;
  for (double each : nan) all = each == each ? all : each;
  return all;
}

// The sum of 0 * x over all elements: 0 if all are finite, NaN if one is infinite or NaN.
template <typename T>
TIG_INLINE double nonfinite(const T* from, int64_t n, bool prefetch) {
  double sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    fetch_ahead(from + i, n - i, prefetch);
    for (int j = 0; j < LANES; ++j) sums[j] += widened(from[i + j]) * 0.;
  }
  for (; i < n; ++i) sums[0] += widened(from[i]) * 0.;
  double sum = 0;
  for (double each : sums) sum += each;
  return sum;
}

enum class Reduction { Squares, Largest, NonFinite };

template <typename S>
using UpdateFn = void (*)(S*, const S*, S*, S*, S*, int64_t, const double*, S factor);

// The functions above, compiled for one instruction set.
struct Isa {
  UpdateFn<float> (*float_update)(Rule, bool decay);
  UpdateFn<double> (*double_update)(Rule, bool decay);
  void (*load_half)(float*, const c10::Half*, int64_t, float);
  void (*load_bfloat)(float*, const c10::BFloat16*, int64_t, float);
  void (*store_half)(c10::Half*, const float*, int64_t);
  void (*store_bfloat)(c10::BFloat16*, const float*, int64_t);
  double (*reduce)(const void*, int64_t, at::ScalarType, Reduction, bool prefetch);
  void (*read_half)(float*, const c10::Half*, const void*, int64_t, LowPrecision);
  void (*read_bfloat)(float*, const c10::BFloat16*, const void*, int64_t, LowPrecision);
  void (*write_half)(c10::Half*, void*, const float*, int64_t, LowPrecision, uint64_t key, uint64_t first);
  void (*write_bfloat)(c10::BFloat16*, void*, const float*, int64_t, LowPrecision, uint64_t key, uint64_t first);
};

#define TIG_RULES(X)                                                                                   \
  X(Sgd) X(SgdMomentum) X(SgdNesterov) X(SgdFirst) X(SgdFirstNesterov) X(Adam) X(AdamAmsgrad) X(AdamW) \
      X(AdamWAmsgrad) X(RmsProp) X(RmsPropMomentum) X(RmsPropCentered) X(RmsPropCenteredMomentum)      \
          X(Lerp) X(Mean) X(Scale) X(Clamp) X(Swap) TIG_OWN_KERNELS(X)

#define TIG_CASE(R) \
  case Rule::R: return decay ? run<Rule::R, true, S> : run<Rule::R, false, S>;

// Makes a namespace NAME that holds the functions above, compiled with the attribute TARGET.
#define TIG_ISA(NAME, TARGET, FMA)                                                                              \
  namespace NAME {                                                                                              \
  template <Rule R, bool DECAY, typename S>                                                                     \
  TARGET void run(S* p, const S* g, S* a, S* b, S* c, int64_t n, const double* k, S factor) {                   \
    update<R, DECAY, FMA, S>(p, g, a, b, c, n, k, factor);                                                      \
  }                                                                                                             \
  template <typename S>                                                                                         \
  UpdateFn<S> find(Rule rule, bool decay) {                                                                     \
    switch (rule) { TIG_RULES(TIG_CASE) }                                                                       \
    return nullptr;                                                                                             \
  }                                                                                                             \
  template <typename T>                                                                                         \
  TARGET void load_all(float* to, const T* from, int64_t n, float factor) { load(to, from, n, factor); }        \
  template <typename T>                                                                                         \
  TARGET void store_all(T* to, const float* from, int64_t n) { store(to, from, n); }                            \
  template <typename T>                                                                                         \
  TARGET void read_low(float* to, const T* p, const void* kept, int64_t n, LowPrecision how) {                  \
    read_stored(to, p, kept, n, how);                                                                           \
  }                                                                                                             \
  template <typename T>                                                                                         \
  TARGET void write_low(T* p, void* kept, const float* value, int64_t n, LowPrecision how, uint64_t key,        \
                        uint64_t first) {                                                                       \
    write_stored(p, kept, value, n, how, key, first);                                                           \
  }                                                                                                             \
  template <typename T>                                                                                         \
  TARGET double reduce_as(const void* data, int64_t n, Reduction reduction, bool prefetch) {                    \
    const T* from = static_cast<const T*>(data);                                                                \
    switch (reduction) {                                                                                        \
      case Reduction::Squares: return sum_of_squares<FMA>(from, n, prefetch);                                   \
      case Reduction::Largest: return largest(from, n, prefetch);                                               \
      case Reduction::NonFinite: return nonfinite(from, n, prefetch);                                           \
    }                                                                                                           \
    return std::numeric_limits<double>::quiet_NaN();                                                            \
  }                                                                                                             \
  double reduce(const void* data, int64_t n, at::ScalarType dtype, Reduction reduction, bool prefetch) {        \
    switch (dtype) {                                                                                            \
      case at::kDouble: return reduce_as<double>(data, n, reduction, prefetch);                                 \
      case at::kFloat: return reduce_as<float>(data, n, reduction, prefetch);                                   \
      case at::kHalf: return reduce_as<c10::Half>(data, n, reduction, prefetch);                                \
      case at::kBFloat16: return reduce_as<c10::BFloat16>(data, n, reduction, prefetch);                        \
      default: return std::numeric_limits<double>::quiet_NaN(); /* OnePass::add refused it */                   \
    }                                                                                                           \
  }                                                                                                             \
  const Isa isa = {find<float>,           find<double>,             load_all<c10::Half>, load_all<c10::BFloat16>, \
                   store_all<c10::Half>,  store_all<c10::BFloat16>, reduce,                                       \
                   read_low<c10::Half>,   read_low<c10::BFloat16>,  write_low<c10::Half>,                         \
                   write_low<c10::BFloat16>};                                                                     \
  }

TIG_ISA(baseline, , FMA_EVERYWHERE)
#ifdef TIG_X86
TIG_ISA(avx2, __attribute__((target("avx2,fma"))), true)
TIG_ISA(avx512vl, TIG_AVX512_IN_256, true)
TIG_ISA(avx512, TIG_AVX512_IN_512, true)
#endif

const Isa& isa() {
#ifdef TIG_X86
  switch (kernel_form().vectors) {
    case Vectors::Baseline: return baseline::isa;
    case Vectors::Avx2: return avx2::isa;
    case Vectors::Avx512Vl: return avx512vl::isa;
    case Vectors::Avx512: return avx512::isa;
  }
#endif
  return baseline::isa;
}

// Whether there are loops for this type.
bool is_floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

template <typename S>
S* at_offset(void* data, int64_t offset) {
  return data ? static_cast<S*>(data) + offset : nullptr;
}

// f32 and f64 are updated directly in memory.
template <typename S>
void update_range(const Task& task, const double* k, double factor, int64_t begin, int64_t end, UpdateFn<S> run) {
  auto at = [begin](auto* data) { return at_offset<S>(data, begin); };
  run(at(task.p), at(const_cast<void*>(task.g)), at(task.s[0]), at(task.s[1]), at(task.s[2]), end - begin, k, S(factor));
}

// f16 and bf16 are converted to f32 in blocks, updated, and rounded once when they are stored.
template <typename T>
void update_range(const Task& task, const double* k, double factor, int64_t begin, int64_t end,
                  UpdateFn<float> run, void (*load)(float*, const T*, int64_t, float), void (*store)(T*, const float*, int64_t)) {
  alignas(64) float p[BLOCK], g[BLOCK], s[3][BLOCK];
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = std::min(BLOCK, end - at);
    T* state[3];
    load(p, static_cast<const T*>(task.p) + at, n, 1.f);
    if (task.g) load(g, static_cast<const T*>(task.g) + at, n, static_cast<float>(factor));
    for (int i = 0; i < 3; ++i) {
      state[i] = at_offset<T>(task.s[i], at);
      if (state[i]) load(s[i], state[i], n, 1.f);
    }
    run(p, g, s[0], s[1], s[2], n, k, 1.f);
    store(static_cast<T*>(task.p) + at, p, n);
    for (int i = 0; i < 3; ++i)
      if (state[i]) store(state[i], s[i], n);
  }
}

// f16 and bf16 with a storage of low precision: values, state and what is computed are f32.
template <typename T, typename Load, typename Read, typename Write>
void update_low(const Task& task, const double* k, double factor, int64_t begin, int64_t end, UpdateFn<float> run,
                Load load, Read read, Write write) {
  const LowPrecisionTask& low = task.low;
  alignas(64) float values[BLOCK], gradients[BLOCK];
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = std::min(BLOCK, end - at);
    const bool master = low.how == LowPrecision::MasterWeights;
    T* const p = static_cast<T*>(task.p) + at;
    void* const kept = master ? static_cast<void*>(at_offset<float>(low.kept, at)) : at_offset<T>(low.kept, at);
    float* const value = master ? static_cast<float*>(kept) : values;
    read(value, p, kept, n, low.how);
    const float* g = static_cast<const float*>(task.g) + at;
    if (!low.wide_gradient) {
      load(gradients, static_cast<const T*>(task.g) + at, n, static_cast<float>(factor));
      g = gradients;
    }
    auto state = [&](int i) { return at_offset<float>(task.s[i], at); };
    run(value, g, state(0), state(1), state(2), n, k, low.wide_gradient ? static_cast<float>(factor) : 1.f);
    write(p, kept, value, n, low.how, low.key, static_cast<uint64_t>(at));
  }
}

void update_range(const Task& task, const double* k, double factor, int64_t begin, int64_t end) {
  const Isa& with = isa();
  if (task.dtype == at::kDouble)
    return update_range<double>(task, k, factor, begin, end, with.double_update(task.rule, task.decay));
  const auto run = with.float_update(task.rule, task.decay);
  if (task.dtype == at::kFloat) return update_range<float>(task, k, factor, begin, end, run);
  if (task.low.how != LowPrecision::None) {
    if (task.dtype == at::kHalf)
      return update_low<c10::Half>(task, k, factor, begin, end, run, with.load_half, with.read_half, with.write_half);
    return update_low<c10::BFloat16>(task, k, factor, begin, end, run, with.load_bfloat, with.read_bfloat,
                                     with.write_bfloat);
  }
  if (task.dtype == at::kHalf)
    return update_range<c10::Half>(task, k, factor, begin, end, run, with.load_half, with.store_half);
  update_range<c10::BFloat16>(task, k, factor, begin, end, run, with.load_bfloat, with.store_bfloat);
}

// The entry of the OpenMP runtime that libtorch has loaded, looked up by name so that no second runtime is linked. Null
// where libtorch has none; then everything runs on one thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Parallel openmp() {
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void OnePass::clear() {
  tasks_.clear();
  numbers_.clear();
  chunks_.clear();
  apart_.clear();
  overlapping_.reset();
  total_ = 0;
}

uint32_t OnePass::add(const Numbers& numbers) {
  numbers_.push_back(numbers);
  return numbers_.size() - 1;
}

uint32_t OnePass::add(const Task& task) {
  const bool has_kernel = is_floating(task.dtype) && isa().float_update(task.rule, task.decay) != nullptr;
  if (!has_kernel) throw std::invalid_argument("the one pass has no kernel for this type or rule");
  const auto index = static_cast<uint32_t>(tasks_.size());
  tasks_.push_back(task);
  apart_.push_back(nullptr);
  for (int64_t begin = 0; begin < task.n; begin += CHUNK)
    chunks_.push_back({index, begin, std::min(begin + CHUNK, task.n)});
  total_ += task.n;
  return index;
}

// Whether a task writes to memory that another task reads or writes. Then the order of tasks matters, and the pass
// runs on one thread.
bool OnePass::overlapping() {
  const auto range = [](const Task& task, const void* data, bool wide) {
    auto begin = static_cast<const char*>(data);
    return std::make_pair(begin, begin + task.n * static_cast<int64_t>(c10::elementSize(wide ? at::kFloat : task.dtype)));
  };
  if (!overlapping_) {
    written_.clear();
    for (const Task& task : tasks_) {
      const auto writes = [&](const void* data, bool wide) {
        if (data && task.n > 0) written_.push_back(range(task, data, wide));
      };
      writes(task.p, false);
      for (const void* state : task.s) writes(state, task.low.how != LowPrecision::None);
      writes(task.low.kept, task.low.how == LowPrecision::MasterWeights);
    }
    std::sort(written_.begin(), written_.end());
    overlapping_ = false;
    for (size_t i = 1; i < written_.size(); ++i)
      if (written_[i].first < written_[i - 1].second) overlapping_ = true;
  }
  if (*overlapping_) return true;
  // The memory of `g` may be a different one in each call, but mostly it is the same: only a new address is checked.
  for (size_t i = 0; i < tasks_.size(); ++i) {
    const Task& task = tasks_[i];
    if (!task.g || task.g == task.p || task.g == apart_[i] || task.n == 0) continue;
    const auto read = range(task, task.g, task.low.wide_gradient);
    const auto ends_before = [&](const auto& one, const char* begin) { return one.second <= begin; };
    const auto next = std::lower_bound(written_.begin(), written_.end(), read.first, ends_before);
    if (next != written_.end() && next->first < read.second) return true;
    apart_[i] = task.g;
  }
  return false;
}

// Calls f(index of the chunk, its task, begin, end) for each chunk, on several threads where that pays.
template <typename F>
void OnePass::for_chunks(bool writes, const F& f) {
  auto one = [&](size_t index) {
    const Chunk& chunk = chunks_[index];
    f(index, tasks_[chunk.task], chunk.begin, chunk.end);
  };
  const bool alone = total_ < PARALLEL_FROM || at::get_num_threads() == 1 || at::in_parallel_region() ||
                     openmp() == nullptr || (writes && overlapping());
  if (alone) {
    for (size_t index = 0; index < chunks_.size(); ++index) one(index);
    return;
  }
  // Each thread fetches its next chunk when it is free, so that a thread whose core is busy elsewhere gets fewer.
  struct Shared {
    std::atomic<size_t> next{0};
    size_t count;
    const decltype(one)* call;
  } shared;
  shared.count = chunks_.size();
  shared.call = &one;
  openmp()(
      [](void* data) {
        auto& shared = *static_cast<Shared*>(data);
        for (size_t i = shared.next++; i < shared.count; i = shared.next++) (*shared.call)(i);
      },
      &shared, 0, 0);
}

void OnePass::update(double factor) {
  for_chunks(true, [&](size_t, const Task& task, int64_t begin, int64_t end) {
    update_range(task, numbers_[task.numbers].data(), task.maximize ? -factor : factor, begin, end);
  });
}

void OnePass::update(Rule rule, double number) {
  const uint32_t numbers = add(Numbers{number});
  for (Task& task : tasks_) {
    task.g = nullptr;
    task.rule = rule;
    task.numbers = numbers;
  }
  update();
}

namespace {
#ifdef TIG_X86
// Writes zeros past the caches, so that no line is fetched that is overwritten as a whole.
__attribute__((target("avx"))) void stream_zeros(char* to, size_t bytes) {
  const size_t before = std::min(bytes, -reinterpret_cast<uintptr_t>(to) % LINE), lines = (bytes - before) / LINE;
  std::memset(to, 0, before);
  to += before;
  for (size_t line = 0; line < lines; ++line, to += LINE)
    for (size_t half = 0; half < 2; ++half) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + half, _mm256_setzero_si256());
  std::memset(to, 0, bytes - before - lines * LINE);
  _mm_sfence();  // other threads see these zeros before what this one writes next
}
#else
void stream_zeros(char* to, size_t bytes) { std::memset(to, 0, bytes); }
#endif
}  // namespace

void OnePass::zero() {
  int64_t bytes = 0;
  for (const Task& task : tasks_) bytes += task.n * static_cast<int64_t>(c10::elementSize(task.dtype));
  const KernelForm form = kernel_form();
  const bool stream = form.streaming && form.vectors != Vectors::Baseline && bytes >= STREAM_FROM;
  for_chunks(false, [&](size_t, const Task& task, int64_t begin, int64_t end) {
    const auto item = static_cast<int64_t>(c10::elementSize(task.dtype));
    char* const to = static_cast<char*>(task.p) + begin * item;
    const auto size = static_cast<size_t>((end - begin) * item);
    if (stream) stream_zeros(to, size);
    else std::memset(to, 0, size);
  });
}

namespace {
double reduce_range(const Task& task, int64_t begin, int64_t end, Reduction reduction) {
  auto data = static_cast<const char*>(task.g) + begin * static_cast<int64_t>(c10::elementSize(task.dtype));
  return isa().reduce(data, end - begin, task.dtype, reduction, kernel_form().prefetch);
}
}  // namespace

double OnePass::norm(Norm norm) {
  const auto reduction = norm == Norm::Two ? Reduction::Squares : Reduction::Largest;
  partial_.assign(chunks_.size(), 0.);
  for_chunks(false, [&](size_t index, const Task& task, int64_t begin, int64_t end) {
    partial_[index] = reduce_range(task, begin, end, reduction);
  });
  double all = 0;
  for (double each : partial_) all = norm == Norm::Two ? all + each : (each > all || each != each ? each : all);
  return norm == Norm::Two ? std::sqrt(all) : all;
}

bool OnePass::any_nonfinite() {
  std::atomic<bool> found{false};
  for_chunks(false, [&](size_t, const Task& task, int64_t begin, int64_t end) {
    if (reduce_range(task, begin, end, Reduction::NonFinite) != 0.) found.store(true, std::memory_order_relaxed);
  });
  return found;
}

bool is_plain_cpu(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided && is_floating(tensor.scalar_type()) &&
         tensor.is_non_overlapping_and_dense() && !tensor.is_inference() && !tensor.is_neg() &&
         is_within_storage(*tensor.unsafeGetTensorImpl(), tensor.element_size());
}

}  // namespace tig
