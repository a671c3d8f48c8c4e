// The algorithms that have a file in this folder, each under its name in abi.h.
#pragma once

// Algorithms whose step is element-wise: they have a kernel in the one pass.
#define TIG_OWN_KERNELS(X)                                                                       \
  X(Adagrad) X(NAdam) X(RAdam) X(Adamax) X(Adadelta) X(Asgd) X(Rprop) X(Lion) X(AdamWScheduleFree) \
  X(SgdScheduleFree) X(AdEMAMix)

// AdamW shares the kernel of libtorch's class.
#define TIG_OWN_RULES(X) TIG_OWN_KERNELS(X) X(AdamW) X(Adafactor) X(Muon) X(SparseAdam) X(Lbfgs)
