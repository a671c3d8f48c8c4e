// Declarations that the C++ files of the bridge share.
#pragma once

#include <torch/optim.h>

#include "abi.h"
#include "guarded.h"

using abi::Algorithm;

