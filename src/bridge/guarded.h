// Turns C++ exceptions into texts for Rust.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

// Refuses a number that the Rust side sent and the C++ side has no meaning for.
[[noreturn]] inline void unknown(const char* what, int number) {
  throw std::invalid_argument("the bridge knows no " + std::string(what) + " " + std::to_string(number));
}

// Calls f and returns 0. If f throws, returns 1 and leaves the exception's text in *error; the caller frees the text
// with tig_free.
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
