// What the C++ files of the bridge share.
#pragma once

#include <torch/optim.h>

#include <stdexcept>

#include "guarded.h"

// The numbers of the enum in mod.rs.
enum Kind : int { SGD = 0, ADAM = 1, ADAMW = 2, RMSPROP = 3 };

