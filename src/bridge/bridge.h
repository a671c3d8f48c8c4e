// What the C++ files of the bridge share.
#pragma once

#include <torch/optim.h>

#include <cstring>
#include <exception>
#include <stdexcept>

// The numbers of the enum in mod.rs.
enum Kind : int { SGD = 0, ADAM = 1, ADAMW = 2, RMSPROP = 3 };

// Calls f. If it throws: non-zero, and a message in *error, to be freed with tig_free.
template <typename F>
int guarded(char** error, F&& f) {
  try {
    f();
    return 0;
  } catch (const c10::Error& e) {
    *error = strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    *error = strdup(e.what());
  } catch (...) {
    *error = strdup("unknown C++ exception");
  }
  return 1;
}
