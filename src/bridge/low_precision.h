// f16 and bf16 parameters whose steps compute in f32: a step reads the parameter's f32 value, the optimizer's rule
// computes the new one, and the storage below writes it, so that small updates are not lost by rounding.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>

#include "abi.h"

namespace tig {

using abi::LowPrecision;

// How the f16 and bf16 parameters of a group are stored between steps.
//   None                the parameter alone, rounded to the nearest: small updates are lost
//   MasterWeights       the value in f32, beside the parameter, which is the value rounded
//   KahanSum            the parameter, and what rounding took from the value (`compensation`), in the parameter's type
//   StochasticRounding  the parameter alone, rounded up or down at random, so that the mean is the value
struct Storage {
  LowPrecision how = LowPrecision::None;
  uint64_t seed = 0;  // of stochastic rounding
};

// Data that an optimizer keeps of such a parameter, beside the state of its rule, which is f32.
struct Kept {
  at::Tensor tensor;   // master weights, or compensation
  int64_t stream = 0;  // the number of the random numbers that the next step rounds with
};

inline bool is_low_precision(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// The number of bits by which the significand of f32 is longer.
constexpr int dropped_bits(at::ScalarType type) { return type == at::kBFloat16 ? 16 : 13; }

// Data of a parameter before its first step; `place` differs for all parameters of an optimizer.
Kept begin_low_precision(const at::Tensor& p, const Storage& storage, std::pair<uint64_t, uint64_t> place);

// The value in f32. A parameter that was given other values since its last step has these: they count, and what was kept
// of the old ones does not.
at::Tensor low_precision_value(const at::Tensor& p, const Kept& kept, LowPrecision how);

// The same, to be stepped in place and stored: for master weights this is `kept` itself, brought up to date.
at::Tensor low_precision_to_step(const at::Tensor& p, const Kept& kept, LowPrecision how);

// Stores the value that a step computed.
void store_low_precision(at::Tensor p, const at::Tensor& value, Kept& kept, LowPrecision how);

// Says why `kept` cannot belong to the parameter; empty if it can.
std::string low_precision_misfit(const at::Tensor& p, const Kept& kept, LowPrecision how);

// Spreads a number over all bits (the finaliser of SplitMix64).
inline uint64_t spread(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The key of the random numbers of one step; the next call gives that of the next step.
inline uint64_t next_key(int64_t& stream) {
  const auto now = static_cast<uint64_t>(stream);
  stream = static_cast<int64_t>(now + 1);
  return spread(now);
}

}  // namespace tig
