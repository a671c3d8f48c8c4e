// The form in which the one pass's kernels run, which depends on the processor. Its parts change how fast a kernel is, and
// no bit of its result; only Baseline rounds a product before it adds to it where the others do not.
#pragma once

#include <cstdint>
#include <string>

namespace tig {

// The instructions that kernels are compiled for. Avx512Vl has those of AVX-512 and vectors of 256 bits.
enum class Vectors : uint8_t { Baseline, Avx2, Avx512Vl, Avx512 };

struct alignas(4) KernelForm {  // read as one atomic value
  Vectors vectors;
  bool prefetch;   // whether kernels that only read fetch memory ahead
  bool streaming;  // whether 32 MB of zeros and more are written past the caches
};

// The form that suits this processor, changed by the environment variable TCH_IGNITE_KERNELS, or the last that was set.
// Throws if the variable is wrong.
KernelForm kernel_form();

// Sets the form for all threads. `words` are some of: baseline, avx2, avx512vl, avx512; prefetch, no-prefetch;
// streaming, no-streaming. The processor decides what they do not say; without words the form is that of the start.
// Throws for other words, and for instructions that this processor does not have.
void set_kernel_form(const std::string& words);

// Whether libtorch's matrix products of bf16 are as fast here as those of f32: on x86 they need AVX-512.
bool multiplies_bf16_fast();

}  // namespace tig
