// All rules of list.h.
#pragma once

#include "adadelta.h"
#include "adafactor.h"
#include "adagrad.h"
#include "adamax.h"
#include "adamw.h"
#include "ademamix.h"
#include "asgd.h"
#include "lbfgs.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "radam.h"
#include "rprop.h"
#include "schedule_free.h"
#include "sparse_adam.h"
