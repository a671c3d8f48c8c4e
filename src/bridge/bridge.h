// Declarations that the C++ files of the bridge share.
#pragma once

#include <torch/optim.h>

#include "guarded.h"

// The kinds of optimizer. The numbers are those of the enum `Algorithm` in mod.rs.
enum Kind : int { SGD = 0, ADAM = 1, ADAMW = 2, RMSPROP = 3 };

// Turns a number from the Rust side into a kind, or throws. Options and states are cast to the types of that kind
// without a further check.
inline Kind kind_of(int number) {
  switch (number) {
    case SGD:
    case ADAM:
    case ADAMW:
    case RMSPROP: return static_cast<Kind>(number);
    default: unknown("kind of optimizer", number);
  }
}

