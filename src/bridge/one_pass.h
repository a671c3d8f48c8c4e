// Elementwise updates of many CPU tensors in one pass: a list of tasks, cut into chunks, which run in one parallel
// region at most. The pass never calls libtorch's dispatcher, and allocates nothing once its lists have grown.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "low_precision.h"
#include "rules/list.h"

#define TIG_INLINE inline __attribute__((always_inline))

namespace tig {

// The arithmetic of one kind of update. `a`, `b`, `c` are the state tensors of a task; `k` are its numbers. The
// operations have the order of libtorch's own loops, so that results in f32 and f64 agree with those loops.
enum class Rule : int {
  // k: lr, weight decay, momentum, 1 - dampening. a: momentum buffer.
  Sgd,
  SgdMomentum,
  SgdNesterov,
  SgdFirst,          // makes the momentum buffer
  SgdFirstNesterov,
  // k: step size, weight decay, beta1, 1 - beta1, beta2, 1 - beta2, sqrt of bias correction 2, eps.
  // a: exp_avg, b: exp_avg_sq, c: max_exp_avg_sq.
  Adam,
  AdamAmsgrad,
  // As for Adam, but k[1] is 1 - lr * weight decay, by which the parameter is multiplied.
  AdamW,
  AdamWAmsgrad,
  // k: lr, weight decay, alpha, 1 - alpha, eps, momentum. a: square_avg, b: momentum_buffer, c: grad_avg.
  RmsProp,
  RmsPropMomentum,
  RmsPropCentered,
  RmsPropCenteredMomentum,
  // p = p * k[0] + g * k[1]
  Lerp,
  // p = p + (g - p) / k[0]
  Mean,
  // p = p * k[0]
  Scale,
  // p = p between -k[0] and k[0]; a NaN stays
  Clamp,
  // p and a exchange their values
  Swap,
  // The rules of our own optimizers; each has a file in rules/, which says what `k`, `a`, `b` and `c` are.
#define TIG_COMMA(NAME) NAME,
  TIG_OWN_KERNELS(TIG_COMMA)
#undef TIG_COMMA
};

using Numbers = std::array<double, 12>;

// A task knows this of a parameter with a storage of low precision, whose state is f32.
struct LowPrecisionTask {
  LowPrecision how;    // None for all other tasks
  bool wide_gradient;  // the gradient is f32
  void* kept;          // master weights or compensation
  uint64_t key;        // of the random numbers of this step
};

struct Task {
  void* p;
  const void* g;
  void* s[3];
  int64_t n;
  at::ScalarType dtype;
  Rule rule;
  bool decay;        // weight decay is not 0
  bool maximize;     // the gradients count negated
  uint32_t numbers;  // index of the task's numbers `k` in the pass
  LowPrecisionTask low;
};

enum class Norm : int { Two, Infinity };

class OnePass {
 public:
  void clear();
  bool empty() const { return tasks_.empty(); }

  // Add numbers and tasks; a task names its numbers by their index. Both may be changed between calls, except for a
  // task's size, its type and the memory that it writes to. `add` throws for a type or rule that has no kernel.
  uint32_t add(const Numbers& numbers);
  uint32_t add(const Task& task);
  Numbers& numbers(uint32_t index) { return numbers_[index]; }
  Task& task(uint32_t index) { return tasks_[index]; }

  // Makes all updates; each `g` counts `factor` times.
  void update(double factor = 1.);

  // Makes the update `rule` with one number on the `p` of all tasks, in place of the tasks' own rules, which are lost.
  void update(Rule rule, double number);

  // Fills the `p` of all tasks with zeros.
  void zero();

  // The norm of all elements of all `g`, accumulated in f64. The result does not depend on the number of threads.
  double norm(Norm norm);

  // Whether any element of any `g` is infinite or NaN.
  bool any_nonfinite();

 private:
  struct Chunk {
    uint32_t task;
    int64_t begin, end;
  };
  template <typename F>
  void for_chunks(bool writes, const F& f);
  bool overlapping();

  std::vector<Task> tasks_;
  std::vector<Numbers> numbers_;
  std::vector<Chunk> chunks_;
  std::vector<double> partial_;
  std::vector<std::pair<const char*, const char*>> written_;
  std::vector<const void*> apart_;  // for each task, the last `g` that overlapped no range of `written_`
  std::optional<bool> overlapping_;  // whether ranges of `written_` overlap
  int64_t total_ = 0;
};

// Whether a task may be made for this tensor: a dense CPU tensor of a type that has kernels.
bool is_plain_cpu(const at::Tensor& tensor);

TIG_INLINE c10::StorageImpl& storage_of(const c10::TensorImpl& t) {
  return *const_cast<c10::TensorImpl&>(t).unsafe_storage().unsafeGetStorageImpl();
}

// Whether all elements of a dense tensor, each of `item` bytes, lie within its storage.
TIG_INLINE bool is_within_storage(const c10::TensorImpl& tensor, size_t item) {
  const size_t n = static_cast<size_t>(tensor.numel());
  return n == 0 || (static_cast<size_t>(tensor.storage_offset()) + n) * item <= storage_of(tensor).nbytes();
}

// Whether two tensors have the same size and the same order of elements in memory. Sizes and strides are nearly always
// equal, so they are first compared without a branch for each.
TIG_INLINE bool have_same_layout(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const auto sizes = a.sizes(), strides = a.strides(), other_sizes = b.sizes(), other_strides = b.strides();
  const size_t dims = sizes.size();
  if (dims != other_sizes.size()) return false;
  int64_t differ = 0;
  for (size_t i = 0; i < dims; ++i)
    differ |= (sizes.data()[i] ^ other_sizes.data()[i]) | (strides.data()[i] ^ other_strides.data()[i]);
  if (differ == 0) return true;
  for (size_t i = 0; i < dims; ++i)
    if (sizes[i] != other_sizes[i] || (strides[i] != other_strides[i] && sizes[i] != 1)) return false;
  return true;
}

// Whether a kernel may read `other` element by element beside `tensor`, which is dense: `other` has this type, the same
// device and layout in memory, and all its elements, each of `item` bytes, lie within its storage. The answer holds for
// one step only, because set_data can change all of this. Each step calls this for each tensor, so it is inline.
TIG_INLINE bool is_alike(const c10::TensorImpl& tensor, const c10::TensorImpl& other, size_t item, caffe2::TypeMeta type) {
  // The keys say the kind of device, the layout, and whether the tensor is a negated view or an inference tensor. There
  // is only one CPU, so its device needs no comparison.
  const bool one_device = other.key_set().has_backend(c10::BackendComponent::CPUBit) || other.device() == tensor.device();
  return other.key_set() == tensor.key_set() && one_device && other.dtype() == type &&
         have_same_layout(tensor, other) && is_within_storage(other, item);
}
// The same for one type.
TIG_INLINE bool is_alike(const c10::TensorImpl& tensor, const c10::TensorImpl& other, size_t item) {
  return is_alike(tensor, other, item, tensor.dtype());
}
inline bool is_alike(const at::Tensor& tensor, const at::Tensor& other, at::ScalarType type) {
  return other.defined() && is_alike(*tensor.unsafeGetTensorImpl(), *other.unsafeGetTensorImpl(),
                                     c10::elementSize(type), c10::scalarTypeToTypeMeta(type));
}
inline bool is_alike(const at::Tensor& tensor, const at::Tensor& other) {
  return is_alike(tensor, other, tensor.scalar_type());
}

}  // namespace tig
