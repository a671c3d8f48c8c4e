// The NCCL backend for tensors on a GPU. Compiled only with the feature `nccl`.

#define USE_C10D_NCCL 1

#include <torch/csrc/cuda/nccl.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "dist.h"

namespace {

std::string dotted(uint64_t version) {
  return c10::str(version >> 32, ".", (version >> 16) & 0xffff, ".", version & 0xffff);
}

}  // namespace

void use_nccl(DistGroup& group, const c10::intrusive_ptr<c10d::Store>& store, std::chrono::milliseconds timeout) {
  // The options contain NCCL's configuration by value, and the size of that struct depends on NCCL's version.
  constexpr uint64_t header = uint64_t{NCCL_MAJOR} << 32 | uint64_t{NCCL_MINOR} << 16 | uint64_t{NCCL_PATCH};
  const uint64_t built_with = torch::cuda::nccl::version();
  TORCH_CHECK(header == built_with, "tch-ignite was compiled with nccl.h of ", dotted(header), ", but libtorch with ",
              dotted(built_with), "; set NCCL_INCLUDE to the header of that version and build again");
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  options->group_name = "0";
  auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(c10::make_intrusive<c10d::PrefixStore>("cuda/", store),
                                                          group.rank, group.world, options);
  nccl->setSequenceNumberForGroup();
  group.tensors->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL,
                            c10::intrusive_ptr<c10d::Backend>(nccl));
}
