// The storage of low_precision.h by operations of libtorch, for any device and layout.

#include "low_precision.h"

#include <ATen/ATen.h>

#include <limits>
#include <stdexcept>

namespace tig {
namespace {

using at::Tensor;

[[noreturn]] void no_storage() { throw std::logic_error("the parameter has no storage of low precision"); }

double largest_of(at::ScalarType type) {
  return type == at::kBFloat16 ? static_cast<float>(std::numeric_limits<c10::BFloat16>::max())
                               : static_cast<float>(std::numeric_limits<c10::Half>::max());
}

// The index of each element in memory, as the kernel counts them; in the order of dimensions where memory has gaps.
Tensor indices(const Tensor& p) {
  const Tensor all = at::arange(p.numel(), p.options().dtype(at::kLong).requires_grad(false));
  return p.is_non_overlapping_and_dense() ? all.as_strided(p.sizes(), p.strides()) : all.view(p.sizes());
}

constexpr int64_t LOW_32 = 0xffffffff;

// x * factor modulo 2^32, without an overflow in between.
Tensor multiplied(const Tensor& x, int64_t factor) {
  const Tensor high = x.mul(factor >> 16).bitwise_and_(0xffff).mul_(0x10000);
  return x.mul(factor & 0xffff).add_(high).bitwise_and_(LOW_32);
}

// The kernel's function of this name, for numbers below 2^32 in i64.
Tensor scrambled(Tensor x) {
  x = multiplied(x.bitwise_xor(x.__rshift__(16)), 0x85ebca6b);
  x = multiplied(x.bitwise_xor(x.__rshift__(13)), 0xc2b2ae35);
  return x.bitwise_xor(x.__rshift__(16));
}

Tensor random_bits(const Tensor& p, uint64_t key) {
  const Tensor index = indices(p);
  const Tensor first = scrambled(index.bitwise_and(LOW_32).bitwise_xor_(static_cast<int64_t>(key & LOW_32)));
  const Tensor beyond = multiplied(index.__rshift__(32), 0x9e3779b9);
  return scrambled(first.add(beyond).add_(static_cast<int64_t>(key >> 32)).bitwise_and_(LOW_32));
}

// The value, rounded up or down to a number of the type.
Tensor rounded_at_random(const Tensor& value, at::ScalarType type, const Tensor& random) {
  const Tensor size = value.abs();
  const int64_t dropped = (int64_t{1} << dropped_bits(type)) - 1;
  Tensor bits = size.contiguous().view(at::kInt).to(at::kLong);
  bits = bits.add_(random.bitwise_and(dropped)).bitwise_and_(~dropped);
  Tensor up_or_down = bits.to(at::kInt).view(at::kFloat);
  if (type == at::kHalf) {
    // Below its smallest normal number, f16 has steps of 2^-24.
    const Tensor steps = size.mul(0x1p24), whole = steps.trunc();
    const Tensor up = random.bitwise_and(0xffffff).to(at::kFloat).mul_(0x1p-24).lt(steps.sub(whole));
    up_or_down = at::where(size.ge(0x1p-14), up_or_down, whole.add(up).mul_(0x1p-24));
  }
  return at::where(size.lt(largest_of(type)), up_or_down.copysign(value), value);
}

}  // namespace

Kept begin_low_precision(const Tensor& p, const Storage& storage, std::pair<uint64_t, uint64_t> place) {
  switch (storage.how) {
    case LowPrecision::MasterWeights: return {p.detach().to(at::kFloat), 0};
    case LowPrecision::KahanSum: return {at::zeros_like(p.detach()), 0};
    case LowPrecision::StochasticRounding:
      return {Tensor(), static_cast<int64_t>(spread(spread(spread(storage.seed) + place.first) + place.second))};
    case LowPrecision::None: break;
  }
  no_storage();
}

Tensor low_precision_value(const Tensor& parameter, const Kept& kept, LowPrecision how) {
  const Tensor p = parameter.detach();
  const Tensor wide = p.to(at::kFloat);
  switch (how) {
    case LowPrecision::MasterWeights: return at::where(kept.tensor.to(p.scalar_type()).eq(p), kept.tensor, wide);
    case LowPrecision::KahanSum: {
      const Tensor lost = kept.tensor.to(at::kFloat);
      const double most = 1. / static_cast<double>(int64_t{1} << (24 - dropped_bits(p.scalar_type())));
      return at::where(lost.abs().le(wide.abs().mul_(most)), wide.add(lost), wide);
    }
    case LowPrecision::StochasticRounding: return wide;
    case LowPrecision::None: break;
  }
  no_storage();
}

Tensor low_precision_to_step(const Tensor& parameter, const Kept& kept, LowPrecision how) {
  if (how != LowPrecision::MasterWeights) return low_precision_value(parameter, kept, how);
  const Tensor p = parameter.detach();
  Tensor master = kept.tensor;
  at::where_out(master, master.to(p.scalar_type()).eq(p), master, p.to(at::kFloat));
  return master;
}

// All new memory comes before the first change, so that an error leaves the parameter and what is kept of it together.
void store_low_precision(Tensor p, const Tensor& value, Kept& kept, LowPrecision how) {
  switch (how) {
    case LowPrecision::MasterWeights: p.copy_(value); return;
    case LowPrecision::KahanSum: {
      const Tensor rounded = value.to(p.scalar_type());
      // Nothing is kept of a value that the type cannot hold.
      const Tensor lost = value.sub(rounded.to(at::kFloat)).nan_to_num_(0., 0., 0.);
      p.copy_(rounded);
      kept.tensor.copy_(lost);
      return;
    }
    case LowPrecision::StochasticRounding:
      p.copy_(rounded_at_random(value, p.scalar_type(), random_bits(p, next_key(kept.stream))));
      return;
    case LowPrecision::None: break;
  }
  no_storage();
}

std::string low_precision_misfit(const Tensor& p, const Kept& kept, LowPrecision how) {
  if (how == LowPrecision::StochasticRounding) return {};
  const bool master = how == LowPrecision::MasterWeights;
  const auto type = master ? at::kFloat : p.scalar_type();
  const Tensor& tensor = kept.tensor;
  if (tensor.defined() && tensor.layout() == at::kStrided && tensor.sizes() == p.sizes() &&
      tensor.device() == p.device() && tensor.scalar_type() == type)
    return {};
  return std::string("the optimizer's ") + (master ? "master" : "compensation") + " of it does not fit";
}

}  // namespace tig
