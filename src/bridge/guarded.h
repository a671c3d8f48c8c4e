// C++ exceptions as texts for Rust.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

// Calls f; what it throws becomes a message in *error, to be freed with tig_free, and a 1.
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
