// Which operations make the CPU wait for a device, by libtorch's own observers.

#include <ATen/record_function.h>

#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_set>

#include "guarded.h"

namespace {

std::mutex lock;
// Of the one call that is watched, a name a line.
std::string found;

// The size of the result, or the result itself, is needed on the CPU.
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

// libtorch takes the callback along to the threads of backward.
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
