// Programs that PyTorch compiled ahead of time: a training step that returns a loss with the gradients of all parameters,
// and an evaluation.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>
#include <torch/version.h>

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <memory>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// The numbers of the roles are those of compiled.rs.
enum class Role { Frozen = 0, Trained = 1, Unused = 2, Buffer = 3, Updated = 4 };

// A parameter or buffer, which the store has too, and how it was when the program was made.
struct Bound {
  at::Tensor tensor;
  Role role;
  std::string name;
  std::vector<int64_t> sizes;
  at::ScalarType type;
  at::Device device;
};

struct Program {
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
  std::vector<Bound> bound;
  size_t trained = 0;
  size_t updated = 0;
};

// The backward of a training step: hands out the gradients that the step computed, times that of the loss.
struct StepBackward : Node {
  std::vector<at::Tensor> gradients;

  std::string name() const override { return "CompiledStepBackward"; }

  variable_list apply(variable_list&& of_loss) override {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "a compiled step has no second derivative: its gradients are numbers without a graph. Leave create_graph out");
    TORCH_CHECK(!gradients.empty(), "backward ran through a compiled step a second time; its gradients are handed out once");
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    auto& factor = of_loss.at(0);
    variable_list all(gradients.size());
    if (!factor.defined()) return all;
    at::NoGradGuard no_grad;
    // A value on the CPU is read at once; on another device the product costs less than waiting for it.
    const bool is_one = factor.is_cpu() && factor.item<double>() == 1.0;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!task_should_compute_output(i)) continue;
      if (keep) {
        all[i] = is_one ? gradients[i].clone() : gradients[i].mul(factor.to(gradients[i].scalar_type()));
      } else {
        if (!is_one) gradients[i].mul_(factor);
        all[i] = std::move(gradients[i]);
      }
    }
    if (!keep) gradients.clear();
    return all;
  }

  void release_variables() override { gradients.clear(); }
};

// libtorch 2.13 has its own pointers for nodes, and the releases before have std's.
template <typename Made, typename N>
Made* make_node(c10::intrusive_ptr<N>& node) {
  auto made = c10::make_intrusive<Made>();
  auto* raw = made.get();
  node = std::move(made);
  return raw;
}
template <typename Made, typename N>
Made* make_node(std::shared_ptr<N>& node) {
  auto made = std::make_shared<Made>();
  node = made;
  return made.get();
}

void check(const Bound& bound) {
  const auto& now = bound.tensor;
  TORCH_CHECK(
      now.sizes() == bound.sizes && now.scalar_type() == bound.type && now.device() == bound.device &&
          now.is_contiguous(),
      "'", bound.name, "' is now ", now.toString(), now.sizes(), " on ", now.device(),
      now.is_contiguous() ? "" : ", not contiguous", "; the program was made for ", bound.type, at::IntArrayRef(bound.sizes), " on ",
      bound.device, ". Keep it as it was loaded, or export the model anew");
  TORCH_CHECK(
      bound.role != Role::Frozen || !now.requires_grad(), "'", bound.name,
      "' is to be trained now, but was frozen when the model was exported. Export it with this parameter needing a gradient");
}

std::vector<at::Tensor> run(const Program& program, const at::Tensor* const* inputs, size_t count) {
  std::vector<at::Tensor> all;
  all.reserve(count + program.bound.size());
  for (size_t i = 0; i < count; ++i) {
    auto input = inputs[i]->detach().contiguous();
    // Kernels for GPUs read 16 bytes at once.
    if (!input.is_cpu() && reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 != 0) input = input.clone();
    all.push_back(std::move(input));
  }
  for (const auto& bound : program.bound) {
    check(bound);
    all.push_back(bound.tensor);
  }
  const auto device = program.bound.empty() ? at::kCPU : program.bound.front().device.type();
  TORCH_CHECK(
      !at::autocast::is_autocast_enabled(device),
      "a compiled program runs in the types that it was exported with: leave autocast out here, and give it to the export");
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
  return program.loader->run(all);
}

// Compares the results of a step with its parameters and buffers, before anything is changed.
void check_results(const Program& program, const std::vector<at::Tensor>& results, size_t updated) {
  TORCH_CHECK(results[0].dim() == 0, "the step returned a loss of shape ", results[0].sizes());
  size_t gradient = 1;
  for (const auto& bound : program.bound) {
    if (bound.role != Role::Trained && bound.role != Role::Updated) continue;
    const bool trained = bound.role == Role::Trained;
    const auto& result = results[trained ? gradient++ : updated++];
    TORCH_CHECK(
        result.sizes() == bound.sizes && result.scalar_type() == bound.type, "the step returned ",
        trained ? "a gradient" : "a new value", " of ", result.scalar_type(), result.sizes(), " for '", bound.name,
        "'. Export the model anew");
  }
}

// A program may return one tensor several times, and tensors that share their memory.
bool is_shared(const at::Tensor& result) { return result.use_count() > 1 || result.storage().use_count() > 1; }

using Each = void (*)(void*, at::Tensor*);

// Packages need libtorch.so by that name. The loader of the system does not look for it where a program's own rpath
// points, but takes one that is in memory already. If it is missing, loading a package says so.
void load_libtorch() {
#ifdef __linux__
  static const bool loaded = [] {
    Dl_info where;
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_device_type_cpu");
    if (!symbol || !dladdr(symbol, &where) || !where.dli_fname) return false;
    const std::string file = where.dli_fname;
    const auto beside = file.substr(0, file.rfind('/') + 1) + "libtorch.so";
    return dlopen(beside.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
  }();
  (void)loaded;
#endif
}

}  // namespace

extern "C" {

const char* tig_libtorch_version() { return TORCH_VERSION; }

// Loads a program for these parameters and buffers, which it gets after its inputs, in this order.
int tig_compiled_load(
    const char* path,
    int device,
    const at::Tensor* const* tensors,
    const char* const* names,
    const int* roles,
    size_t count,
    Program** made,
    char** error) {
  return guarded(error, [&] {
    load_libtorch();
    auto program = std::make_unique<Program>();
    program->loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
        path, "model", false, 1, static_cast<c10::DeviceIndex>(device));
    for (size_t i = 0; i < count; ++i) {
      if (roles[i] < 0 || roles[i] > static_cast<int>(Role::Updated)) unknown("role", roles[i]);
      const auto role = static_cast<Role>(roles[i]);
      const auto& tensor = *tensors[i];
      program->bound.push_back({tensor, role, names[i], tensor.sizes().vec(), tensor.scalar_type(), tensor.device()});
      program->trained += role == Role::Trained;
      program->updated += role == Role::Updated;
    }
    *made = program.release();
  });
}

void tig_compiled_free(Program* program) { delete program; }

// Runs an evaluation and calls `each` with a new torch::Tensor for each output.
int tig_compiled_run(
    const Program* program, const at::Tensor* const* inputs, size_t count, void* data, Each each, char** error) {
  return guarded(error, [&] {
    // An output may be a parameter itself.
    for (const auto& output : run(*program, inputs, count)) each(data, new at::Tensor(output.detach()));
  });
}

// Runs a training step: buffers are updated, and `each` is called with the loss, whose backward gives the parameters their
// gradients, and with the step's `outputs` further outputs.
int tig_compiled_step(
    const Program* program,
    const at::Tensor* const* inputs,
    size_t count,
    size_t outputs,
    void* data,
    Each each,
    char** error) {
  return guarded(error, [&] {
    auto results = run(*program, inputs, count);
    const auto gradients = 1 + program->trained, expected = gradients + outputs + program->updated;
    TORCH_CHECK(
        results.size() == expected, "the step returned ", results.size(), " tensors, and the manifest describes ", expected);
    check_results(*program, results, gradients + outputs);
    auto loss = std::move(results[0]);
    {
      at::NoGradGuard no_grad;
      size_t from = gradients + outputs;
      for (const auto& bound : program->bound) {
        if (bound.role != Role::Updated) continue;
        at::Tensor(bound.tensor).copy_(results[from++]);
      }
    }
    if (torch::GradMode::is_enabled()) {
      decltype(torch::autograd::Edge::function) node;
      auto* backward = make_node<StepBackward>(node);
      size_t from = 1;
      bool any = false;
      for (const auto& bound : program->bound) {
        if (bound.role != Role::Trained) continue;
        auto& gradient = results[from++];
        // Gradients are multiplied and kept where they are, so none may share its memory with another.
        if (is_shared(gradient)) gradient = gradient.clone();
        any |= bound.tensor.requires_grad();
        backward->add_next_edge(
            bound.tensor.requires_grad() ? torch::autograd::impl::gradient_edge(bound.tensor) : torch::autograd::Edge());
        backward->gradients.push_back(std::move(gradient));
      }
      if (any) {
        if (is_shared(loss)) loss = loss.clone();
        torch::autograd::set_history(loss, node);
      }
    }
    each(data, new at::Tensor(std::move(loss)));
    for (size_t i = 0; i < outputs; ++i) each(data, new at::Tensor(results[gradients + i].detach()));
  });
}

}  // extern "C"
