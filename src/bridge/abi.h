// The numbers that Rust and C++ both know: what Rust passes to a function of the bridge, and what it gets back. abi.rs
// has the same enums with the same names, and says what the values mean; a test compares the two.
#pragma once

#include "guarded.h"

#define TIG_CLASSES(X) X(Sgd, 0) X(Adam, 1) X(AdamW, 2) X(RmsProp, 3) X(Own, 4)

#define TIG_ALGORITHMS(X)                                                                                \
  X(Sgd, 0) X(Adam, 1) X(AdamW, 2) X(RmsProp, 3) X(Adagrad, 4) X(NAdam, 5) X(RAdam, 6) X(Adamax, 7)      \
  X(Adadelta, 8) X(Asgd, 9) X(Rprop, 10) X(Lion, 11) X(Adafactor, 12) X(Muon, 13) X(SparseAdam, 14)  \
  X(AdamWScheduleFree, 15) X(SgdScheduleFree, 16) X(AdEMAMix, 17) X(Lbfgs, 18)

#define TIG_HYPERS(X)                                                                                    \
  X(Lr, 0) X(Momentum, 1) X(Dampening, 2) X(WeightDecay, 3) X(Nesterov, 4) X(Beta1, 5) X(Beta2, 6)       \
  X(Eps, 7) X(Amsgrad, 8) X(Alpha, 9) X(Centered, 10) X(Maximize, 11) X(LrDecay, 12)                     \
  X(InitialAccumulatorValue, 13) X(MomentumDecay, 14) X(DecoupledWeightDecay, 15) X(Rho, 16)             \
  X(Lambd, 17) X(T0, 18) X(EtaMinus, 19) X(EtaPlus, 20) X(StepSizeMin, 21) X(StepSizeMax, 22)            \
  X(Beta2Decay, 23) X(Eps1, 24) X(Eps2, 25) X(D, 26) X(NsA, 27) X(NsB, 28) X(NsC, 29) X(NsSteps, 30)     \
  X(MatchRmsAdamW, 31) X(R, 32) X(WarmupSteps, 33) X(WeightLrPower, 34) X(K, 35) X(WeightSum, 36)        \
  X(LrMax, 37) X(TrainMode, 38) X(Beta3, 39) X(Beta3Warmup, 40) X(AlphaWarmup, 41) X(MaxIter, 42)        \
  X(MaxEval, 43) X(ToleranceGrad, 44) X(ToleranceChange, 45) X(HistorySize, 46) X(StrongWolfe, 47)

#define TIG_MODES(X) X(Loop, 0) X(Fused, 1) X(Kernels, 2)

#define TIG_UPDATES(X) X(Lerp, 0) X(Mean, 1) X(Copy, 2) X(Swap, 3) X(SwapBack, 4)

#define TIG_AUTOCAST_DEVICES(X) X(Cpu, 0) X(Cuda, 1)

#define TIG_CAUSES(X) X(Other, 0) X(TimedOut, 1) X(Store, 2) X(Network, 3)

#define TIG_REDUCTIONS(X) X(Sum, 0) X(Avg, 1) X(Product, 2) X(Min, 3) X(Max, 4)

#define TIG_COMPRESSIONS(X) X(None, 0) X(Fp16, 1) X(Bf16, 2)

#define TIG_LOW_PRECISIONS(X) X(None, 0) X(MasterWeights, 1) X(KahanSum, 2) X(StochasticRounding, 3)

// All lists, each with the name of its enum and the words for it in an error.
#define TIG_ALL_NUMBERS(X)                                      \
  X(Class, TIG_CLASSES, "kind of optimizer")                    \
  X(Algorithm, TIG_ALGORITHMS, "algorithm")                     \
  X(Hyper, TIG_HYPERS, "hyper-parameter")                       \
  X(Mode, TIG_MODES, "way to step")                             \
  X(Update, TIG_UPDATES, "update of averages")                  \
  X(AutocastDevice, TIG_AUTOCAST_DEVICES, "device of autocast") \
  X(Cause, TIG_CAUSES, "cause of an exception")                 \
  X(Reduction, TIG_REDUCTIONS, "reduction")                     \
  X(Compression, TIG_COMPRESSIONS, "compression")               \
  X(LowPrecision, TIG_LOW_PRECISIONS, "storage of low precision")

namespace abi {

// Turns a number from the Rust side into a value of the enum E, or throws.
template <typename E>
E of(int number);

#define TIG_ENTRY(NAME, NUMBER) NAME = NUMBER,
#define TIG_KNOWN(NAME, NUMBER) case NUMBER:
#define TIG_NUMBERS(ENUM, LIST, WHAT)                    \
  enum class ENUM : int { LIST(TIG_ENTRY) };             \
  template <>                                            \
  inline ENUM of<ENUM>(int number) {                     \
    switch (number) {                                    \
      LIST(TIG_KNOWN) return static_cast<ENUM>(number);  \
      default: unknown(WHAT, number);                    \
    }                                                    \
  }
TIG_ALL_NUMBERS(TIG_NUMBERS)
#undef TIG_NUMBERS
#undef TIG_KNOWN
#undef TIG_ENTRY

}  // namespace abi
