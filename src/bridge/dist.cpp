// libtorch's process groups: processes find each other through its TCPStore, and its gloo does the collectives. Names
// and prefixes of keys are those of torch.distributed, so that a Python process can be a member of the same group.

#include "dist.h"

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/ProcessGroupWrapper.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/debug.h>

#include <mutex>
#include <string>

using at::Tensor;
using c10::intrusive_ptr;
using c10::make_intrusive;
using c10d::PrefixStore;
using c10d::ProcessGroup;
using c10d::ProcessGroupGloo;
using c10d::Store;
using std::chrono::milliseconds;

namespace {

// Makes libtorch read TORCH_CPP_LOG_LEVEL and TORCH_DISTRIBUTED_DEBUG. In Python, importing torch does this.
void read_environment() {
  static std::once_flag once;
  std::call_once(once, [] {
    c10::initLogging();
    c10d::setDebugLevelFromEnvironment();
  });
}

intrusive_ptr<ProcessGroupGloo> open_line(DistGroup& group, const intrusive_ptr<Store>& store, milliseconds timeout,
                                          const char* name) {
  // The default options follow GLOO_SOCKET_IFNAME.
  auto options = ProcessGroupGloo::Options::create_default(timeout);
  options->group_name = name;
  group.lines.push_back(make_intrusive<ProcessGroupGloo>(store, group.rank, group.world, options));
  return group.lines.back();
}

intrusive_ptr<ProcessGroup> tensor_group(DistGroup& group, const intrusive_ptr<Store>& store, milliseconds timeout,
                                         bool nccl) {
  intrusive_ptr<Store> numbered = make_intrusive<PrefixStore>("0/", make_intrusive<PrefixStore>("default_pg", store));
  auto all = make_intrusive<ProcessGroup>(numbered, group.rank, group.world);
  all->setDefaultBackend(nccl ? ProcessGroup::BackendType::NCCL : ProcessGroup::BackendType::GLOO);
  intrusive_ptr<Store> cpu = make_intrusive<PrefixStore>("cpu/", numbered);
  auto plain = open_line(group, cpu, timeout, "0");
  plain->setSequenceNumberForGroup();
  intrusive_ptr<c10d::Backend> backend = plain;
  if (c10d::debug_level() == c10d::DebugLevel::Detail) {
    auto checks = open_line(group, make_intrusive<PrefixStore>("pg_wrapper:0", cpu), timeout, "pg_wrapper");
    backend = make_intrusive<c10d::ProcessGroupWrapper>(backend, checks);
  }
  all->setBackend(c10::DeviceType::CPU, ProcessGroup::BackendType::GLOO, backend);
  group.tensors = all;
  if (nccl) {
#ifdef TCH_IGNITE_NCCL
    use_nccl(group, numbered, timeout);
#else
    TORCH_CHECK(false, "this program was built without the feature `nccl` of tch-ignite");
#endif
  } else {
    // As in Python, gloo sends tensors on a GPU through the host's memory.
    all->setBackend(c10::DeviceType::CUDA, ProcessGroup::BackendType::GLOO, backend);
  }
  all->setGroupName("0");
  return all;
}

c10d::ReduceOp reduce_op(int op) {
  switch (abi::of<abi::Reduction>(op)) {
    case abi::Reduction::Sum: return c10d::ReduceOp::SUM;
    case abi::Reduction::Avg: return c10d::ReduceOp::AVG;
    case abi::Reduction::Product: return c10d::ReduceOp::PRODUCT;
    case abi::Reduction::Min: return c10d::ReduceOp::MIN;
    case abi::Reduction::Max: return c10d::ReduceOp::MAX;
  }
  unknown("reduction", op);
}

void finish(const intrusive_ptr<c10d::Work>& work) { TORCH_CHECK(work->wait(), "the collective was aborted"); }

// Detached, contiguous tensors, which gloo needs. A tensor that is not contiguous is copied.
std::vector<Tensor> plain(const Tensor* const* tensors, size_t count) {
  std::vector<Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) list.push_back(tensors[i]->detach().contiguous());
  return list;
}

// Copies the results back into the tensors that `plain` had to copy.
void put_back(const std::vector<Tensor>& list, const Tensor* const* tensors) {
  for (size_t i = 0; i < list.size(); ++i)
    if (list[i].data_ptr() != tensors[i]->data_ptr()) tensors[i]->detach().copy_(list[i]);
}

}  // namespace

extern "C" {

// Connects to the store; rank 0 serves it unless a launcher does. `listen_fd` is a listening socket, or -1; `attempt`
// counts the restarts of a launcher that keeps the store.
int tig_store_connect(const char* host, uint16_t port, int serve, int listen_fd, size_t world, int64_t attempt,
                      int64_t timeout_ms, DistStore** store, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    read_environment();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serve != 0;
    options.numWorkers = world;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    options.multiTenant = true;
    if (listen_fd >= 0) options.masterListenFd = listen_fd;
    auto tcp = make_intrusive<c10d::TCPStore>(host, options);
    intrusive_ptr<Store> prefixed = tcp;
    if (attempt > 0) prefixed = make_intrusive<PrefixStore>("attempt_" + std::to_string(attempt), prefixed);
    *store = new DistStore{tcp, prefixed};
  });
}

// Waits until all ranks have connected, on the rank that serves the store. Returns at once on other ranks.
int tig_store_wait_for_workers(DistStore* store, int* cause, char** error) {
  return dist_guarded(cause, error, [&] { store->tcp->waitForWorkers(); });
}

int tig_store_set(DistStore* store, const char* key, const char* value, int* cause, char** error) {
  return dist_guarded(cause, error, [&] { store->attempt->set(std::string("tch_ignite/") + key, std::string(value)); });
}

int tig_store_has(DistStore* store, const char* key, int* has, int* cause, char** error) {
  return dist_guarded(cause, error, [&] { *has = store->attempt->check({std::string("tch_ignite/") + key}); });
}

// Gives the value of a key; waits until the key is set.
int tig_store_get(DistStore* store, const char* key, char** value, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    *value = strdup(store->attempt->get_to_str(std::string("tch_ignite/") + key).c_str());
  });
}

void tig_store_free(DistStore* store) { delete store; }

// Connects all ranks: makes the group for tensors and, unless `control_timeout_ms` is below 0, the control group.
int tig_dist_new(DistStore* store, int rank, int world, int nccl, int64_t timeout_ms, int64_t control_timeout_ms,
                 DistGroup** made, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    auto group = std::make_unique<DistGroup>();
    group->rank = rank;
    group->world = world;
    tensor_group(*group, store->attempt, milliseconds(timeout_ms), nccl != 0);
    if (control_timeout_ms >= 0) {
      auto ours = make_intrusive<PrefixStore>("tch_ignite/control", store->attempt);
      group->control = open_line(*group, ours, milliseconds(control_timeout_ms), "control");
    }
    *made = group.release();
  });
}

void tig_dist_free(DistGroup* group) { delete group; }

// Reduces the tensors in place. They have one type and are on one device.
int tig_dist_all_reduce(DistGroup* group, const Tensor* const* tensors, size_t count, int op, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    at::NoGradGuard no_grad;
    auto list = plain(tensors, count);
    if (count == 1) {
      c10d::AllreduceOptions options;
      options.reduceOp = reduce_op(op);
      finish(group->tensors->allreduce(list, options));
    } else {
      c10d::AllreduceCoalescedOptions options;
      options.reduceOp = reduce_op(op);
      finish(group->tensors->allreduce_coalesced(list, options));
    }
    put_back(list, tensors);
  });
}

// Gives the tensors of all ranks the values of rank `root`, in place. They may have different types.
int tig_dist_broadcast(DistGroup* group, const Tensor* const* tensors, size_t count, int root, int* cause,
                       char** error) {
  return dist_guarded(cause, error, [&] {
    at::NoGradGuard no_grad;
    auto list = plain(tensors, count);
    c10d::broadcast_coalesced(group->tensors, list, size_t{250} << 20, root);
    put_back(list, tensors);
  });
}

// Gives the tensor of every rank. `gathered` has room for one of each; they all have the shape and type of `tensor`.
int tig_dist_all_gather(DistGroup* group, const Tensor* tensor, Tensor** gathered, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    at::NoGradGuard no_grad;
    auto input = plain(&tensor, 1);
    std::vector<std::vector<Tensor>> outputs(1);
    for (int i = 0; i < group->world; ++i) outputs[0].push_back(at::empty_like(input[0]));
    finish(group->tensors->allgather(outputs, input));
    for (int i = 0; i < group->world; ++i) gathered[i] = new Tensor(outputs[0][i]);
  });
}

// Sends `size` bytes to all ranks over the control group, and writes the bytes of all ranks, in their order, to `all`.
int tig_dist_exchange(DistGroup* group, const uint8_t* own, size_t size, uint8_t* all, int* cause, char** error) {
  return dist_guarded(cause, error, [&] {
    const auto bytes = static_cast<int64_t>(size);
    Tensor input = at::empty({bytes}, at::kByte);
    memcpy(input.data_ptr(), own, size);
    Tensor output = at::empty({bytes * group->world}, at::kByte);
    finish(group->control->_allgather_base(output, input));
    memcpy(all, output.data_ptr(), size * group->world);
  });
}

// Closes all connections, so that a rank that waits for this one fails now and not after its time-out. gloo closes a
// connection when a wait on it times out, so each connection waits 1 ms for a message that never comes.
void tig_dist_hang_up(DistGroup* group) {
  for (auto& line : group->lines) {
    for (int rank = 0; rank < group->world; ++rank) {
      if (rank == group->rank) continue;
      try {
        std::vector<Tensor> nothing{at::empty({1}, at::kByte)};
        line->recv(nothing, rank, 1 << 30)->wait(milliseconds(1));
      } catch (...) {
      }
    }
  }
}

}  // extern "C"
