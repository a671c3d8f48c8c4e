// Notes operations that make the CPU wait for a device, with libtorch's observers (RecordFunction).

#include <ATen/record_function.h>

#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_set>

#include "guarded.h"

namespace {

std::mutex lock;
// The names that were found since tig_host_syncs_begin, one on each line.
std::string found;

// Whether the CPU needs the result of this operation, or the size of its result, and so waits for it.
bool waits(std::string_view name) {
  static const std::unordered_set<std::string_view> names = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",      "aten::equal",
      "aten::_unique2",            "aten::_unique", "aten::unique_consecutive", "aten::unique_dim",
      "aten::bincount",
  };
  return names.count(name) > 0;
}

std::unique_ptr<at::ObserverContext> note(const at::RecordFunction& function) {
  const std::string_view name = function.name();
  if (waits(name)) {
    std::lock_guard<std::mutex> guard(lock);
    found.append(name).push_back('\n');
  }
  return nullptr;
}

}  // namespace

extern "C" {

// Adds the observer to this thread. libtorch hands it on to the threads that run backward.
int tig_host_syncs_begin(uint64_t* callback, char** error) {
  return guarded(error, [&] {
    found.clear();
    *callback = at::addThreadLocalCallback(at::RecordFunctionCallback(note).scopes({at::RecordScope::FUNCTION}));
  });
}

int tig_host_syncs_end(uint64_t callback, char** names, char** error) {
  return guarded(error, [&] {
    at::removeCallback(callback);
    std::lock_guard<std::mutex> guard(lock);
    *names = strdup(found.c_str());
  });
}

}  // extern "C"
