// What the C++ files of `distributed` share.
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

// The numbers of the enum in dist.rs.
enum Cause : int { OTHER = 0, TIMED_OUT = 1, STORE = 2, NETWORK = 3 };

// As `guarded`, and says which of c10d's exceptions it was.
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
  // The same with the prefix of this attempt, where a launcher keeps one store over restarts.
  c10::intrusive_ptr<c10d::Store> attempt;
};

struct DistGroup {
  int rank;
  int world;
  // For tensors.
  c10::intrusive_ptr<c10d::ProcessGroup> tensors;
  // For small messages; null where there is none.
  c10::intrusive_ptr<c10d::ProcessGroupGloo> control;
  // All gloo groups, to be hung up.
  std::vector<c10::intrusive_ptr<c10d::ProcessGroupGloo>> lines;
};

// Makes NCCL the backend of CUDA tensors; throws where the header at build time is not libtorch's version.
void use_nccl(DistGroup& group, const c10::intrusive_ptr<c10d::Store>& store, std::chrono::milliseconds timeout);
