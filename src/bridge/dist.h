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

#include "guarded.h"

// The exceptions of c10d. The numbers are those that `dist_checked` in dist.rs turns into the enum `Cause`.
enum Cause : int { OTHER = 0, TIMED_OUT = 1, STORE = 2, NETWORK = 3 };

// Does the same as `guarded`, and writes which of c10d's exceptions was caught to *cause.
template <typename F>
int dist_guarded(int* cause, char** error, F&& f) {
  *cause = OTHER;
  return guarded(error, [&] {
    try {
      f();
    } catch (const c10d::TimeoutError&) {
      *cause = TIMED_OUT;
      throw;
    } catch (const c10::DistStoreError&) {
      *cause = STORE;
      throw;
    } catch (const c10::DistNetworkError&) {
      *cause = NETWORK;
      throw;
    } catch (const c10::DistBackendError&) {
      *cause = NETWORK;
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
