// All rules of list.h.
#pragma once

#include "adadelta.h"
#include "adafactor.h"
#include "adagrad.h"
#include "adamax.h"
#include "adamw.h"
#include "asgd.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "radam.h"
#include "rprop.h"
#include "sparse_adam.h"
