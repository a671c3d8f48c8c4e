// The parameters and buffers of TorchScript modules: tch reaches parameters only. And saving a module to any writer.

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/types.h>

#include <ostream>
#include <streambuf>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using Module = torch::jit::Module;

// A buffer's place in its module, and the tensor that whoever asked for it knows.
struct Buffer {
  c10::intrusive_ptr<c10::ivalue::Object> owner;
  size_t slot;
  at::Tensor kept;
  std::string name;
};

struct Script {
  std::vector<Buffer> buffers;
};

// Hands all bytes to a function of the Rust side, which returns whether they could be written.
class Sink : public std::streambuf {
 public:
  using Write = int (*)(void*, const char*, size_t);
  Sink(void* data, Write write) : data_(data), write_(write) {}

 protected:
  std::streamsize xsputn(const char* bytes, std::streamsize count) override {
    return write_(data_, bytes, static_cast<size_t>(count)) != 0 ? count : 0;
  }
  int_type overflow(int_type byte) override {
    const char one = traits_type::to_char_type(byte);
    return xsputn(&one, 1) == 1 ? byte : traits_type::eof();
  }

 private:
  void* data_;
  Write write_;
};

}  // namespace

extern "C" {

// Calls `each` with the name, a new torch::Tensor and whether it is a parameter, for all parameters and buffers in the
// order of Python's state_dict().
int tig_script_open(
    const Module* module, void* data, void (*each)(void*, const char*, at::Tensor*, int), Script** made, char** error) {
  return guarded(error, [&] {
    auto script = std::make_unique<Script>();
    for (const auto& inner : module->named_modules()) {
      const auto object = inner.value._ivalue();
      const auto type = object->type();
      for (size_t slot = 0; slot < type->numAttributes(); ++slot) {
        const auto value = object->getSlot(slot);
        const bool is_parameter = type->is_parameter(slot);
        if (!(is_parameter || type->is_buffer(slot)) || !value.isTensor() || !value.toTensor().defined()) continue;
        const auto name = (inner.name.empty() ? "" : inner.name + ".") + type->getAttributeName(slot);
        each(data, name.c_str(), new at::Tensor(value.toTensor()), is_parameter);
        if (!is_parameter) script->buffers.push_back({object, slot, value.toTensor(), name});
      }
    }
    *made = script.release();
  });
}

void tig_script_free(Script* script) { delete script; }

// A module may have put another tensor into a buffer: its value goes into the one that is known, which takes the place.
int tig_script_settle(Script* script, char** error) {
  return guarded(error, [&] {
    at::NoGradGuard no_grad;
    for (auto& buffer : script->buffers) {
      const auto& value = buffer.owner->getSlot(buffer.slot);
      if (value.isTensor() && value.toTensor().is_same(buffer.kept)) continue;
      TORCH_CHECK(
          value.isTensor() && value.toTensor().defined() && value.toTensor().sizes() == buffer.kept.sizes() &&
              value.toTensor().scalar_type() == buffer.kept.scalar_type(),
          "the module gave its buffer '", buffer.name, "' another shape or type");
      buffer.kept.copy_(value.toTensor());
      buffer.owner->setSlot(buffer.slot, buffer.kept);
    }
  });
}

// Whether this thread's calls of modules are optimized after the first; returns what was set before.
int tig_script_set_optimized(int optimized) {
  const bool before = torch::jit::getGraphExecutorOptimize();
  torch::jit::setGraphExecutorOptimize(optimized != 0);
  return before;
}

int tig_script_is_training(const Module* module, int* training, char** error) {
  return guarded(error, [&] { *training = module->is_training(); });
}

int tig_script_save(const Module* module, void* data, Sink::Write write, char** error) {
  return guarded(error, [&] {
    Sink sink(data, write);
    std::ostream out(&sink);
    module->save(out);
    TORCH_CHECK(out.good(), "not all of the module could be written");
  });
}

}  // extern "C"
