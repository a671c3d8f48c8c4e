// Declarations that the C++ files of the feature `distributed` share.
#pragma once

#define USE_C10D_GLOO 1

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/exception.h>

#include <chrono>
#include <vector>

#include "abi.h"
#include "guarded.h"

// Does the same as `guarded`, and writes which of c10d's exceptions was caught to *cause, as an abi::Cause.
template <typename F>
int dist_guarded(int* cause, char** error, F&& f) {
  const auto note = [&](abi::Cause caught) { *cause = static_cast<int>(caught); };
  note(abi::Cause::Other);
  return guarded(error, [&] {
    try {
      f();
    } catch (const c10d::TimeoutError&) {
      note(abi::Cause::TimedOut);
      throw;
    } catch (const c10::DistStoreError&) {
      note(abi::Cause::Store);
      throw;
    } catch (const c10::DistNetworkError&) {
      note(abi::Cause::Network);
      throw;
    } catch (const c10::DistBackendError&) {
      note(abi::Cause::Network);
      throw;
    }
  });
}

struct DistStore {
  c10::intrusive_ptr<c10d::TCPStore> tcp;
  // `tcp`, with a prefix for its keys if the launcher has restarted the ranks and kept its store.
  c10::intrusive_ptr<c10d::Store> attempt;
};

struct DistGroup {
  int rank;
  int world;
  // The group for tensors.
  c10::intrusive_ptr<c10d::ProcessGroup> tensors;
  // The group for small messages; null if this process has none.
  c10::intrusive_ptr<c10d::ProcessGroupGloo> control;
  // All gloo groups, whose connections tig_dist_hang_up closes.
  std::vector<c10::intrusive_ptr<c10d::ProcessGroupGloo>> lines;
};

// Makes NCCL the backend of CUDA tensors. Throws if nccl.h at build time had another version than libtorch's NCCL.
void use_nccl(DistGroup& group, const c10::intrusive_ptr<c10d::Store>& store, std::chrono::milliseconds timeout);
