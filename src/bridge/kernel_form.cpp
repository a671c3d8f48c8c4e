#include "kernel_form.h"

#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "guarded.h"

namespace tig {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
bool has(Vectors vectors) {
  __builtin_cpu_init();
  if (vectors == Vectors::Baseline) return true;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  return vectors == Vectors::Avx2 ||
         (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
}

bool is_amd() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}
#else
bool has(Vectors vectors) { return vectors == Vectors::Baseline; }
bool is_amd() { return false; }
#endif

#ifdef __x86_64__
constexpr bool IS_X86 = true;
#else
constexpr bool IS_X86 = false;
#endif

// AMD's Zen 4 takes longer for a vector of 512 bits than for two of 256, and longer where a kernel fetches ahead what the
// processor fetches by itself; an Intel Xeon does not. Zen 3 takes longer where kernels fetch the beginnings of pages.
// docs/NUMBERS.md has the figures. No other processor was measured: all of AMD get what suits these two, because the
// compilers' own names for them are newer than some of them, and all others what suits the Xeon. TCH_IGNITE_KERNELS
// chooses another form.
KernelForm of_processor() {
  const bool amd = is_amd();
  KernelForm form{Vectors::Baseline, !amd, true};
  for (Vectors vectors : {Vectors::Avx2, Vectors::Avx512Vl, Vectors::Avx512})
    if (has(vectors) && !(amd && vectors == Vectors::Avx512)) form.vectors = vectors;
  return form;
}

KernelForm from_words(const std::string& words) {
  KernelForm form = of_processor();
  std::istringstream rest(words);
  for (std::string word; rest >> word;) {
    if (word == "baseline") form.vectors = Vectors::Baseline;
    else if (word == "avx2") form.vectors = Vectors::Avx2;
    else if (word == "avx512vl") form.vectors = Vectors::Avx512Vl;
    else if (word == "avx512") form.vectors = Vectors::Avx512;
    else if (word == "prefetch" || word == "no-prefetch") form.prefetch = word == "prefetch";
    else if (word == "streaming" || word == "no-streaming") form.streaming = word == "streaming";
    else
      throw std::invalid_argument("kernels have no form '" + word + "': the words are baseline, avx2, avx512vl, avx512, " +
                                  "prefetch, no-prefetch, streaming and no-streaming");
  }
  // The processor comes last, so that a wrong word is the same error everywhere.
  if (!has(form.vectors))
    throw std::invalid_argument("this processor has no instructions for kernels in the form '" + words + "'");
  return form;
}

KernelForm from_environment() {
  const char* words = std::getenv("TCH_IGNITE_KERNELS");
  try {
    return from_words(words ? words : "");
  } catch (const std::invalid_argument& wrong) {
    throw std::invalid_argument(std::string("the environment variable TCH_IGNITE_KERNELS: ") + wrong.what());
  }
}

std::atomic<KernelForm>& current() {
  static std::atomic<KernelForm> form(from_environment());
  return form;
}

}  // namespace

bool multiplies_bf16_fast() { return !IS_X86 || has(Vectors::Avx512); }

KernelForm kernel_form() { return current().load(std::memory_order_relaxed); }

void set_kernel_form(const std::string& words) {
  current().store(words.empty() ? from_environment() : from_words(words), std::memory_order_relaxed);
}

}  // namespace tig

extern "C" {

int tig_set_kernel_form(const char* words, char** error) {
  return guarded(error, [&] { tig::set_kernel_form(words); });
}

}  // extern "C"
