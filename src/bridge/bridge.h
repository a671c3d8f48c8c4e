// What the C++ files of the bridge share.
#pragma once

#include <torch/optim.h>

#include "guarded.h"

// The numbers of the enum in mod.rs.
enum Kind : int { SGD = 0, ADAM = 1, ADAMW = 2, RMSPROP = 3 };

// The kind of that number. The casts of options and states rest on it.
inline Kind kind_of(int number) {
  switch (number) {
    case SGD:
    case ADAM:
    case ADAMW:
    case RMSPROP: return static_cast<Kind>(number);
    default: unknown("kind of optimizer", number);
  }
}

