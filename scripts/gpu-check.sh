#!/usr/bin/env bash
# Checks this crate on a GPU, and prepares for that on a machine without one. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: scripts/gpu-check.sh --prepare | --cpu [--out FILE] | [--out FILE] | --help

  --prepare  on a machine with Rust and PyPI: builds examples/gpu_check against PyTorch 2.11.0
             with CUDA (tch 0.24, the feature nccl) into gpu-check/: about 3 GB to fetch, ten
             minutes on one core. Copy the repository with that folder (below 60 MB).
  (none)     on a machine with a GPU, PyTorch 2.11 in TORCH_PYTHON (default python3), and
             neither Rust nor a network: runs the kit within four minutes, and writes
             docs/GPU.md. Ends with 1 at any difference.
  --cpu      a dry run on the CPU with the usual libtorch and TORCH_PYTHON's PyTorch 2.13,
             built from this checkout; the page is printed unless FILE is given.

Each part has a time limit and a line of its own: golden training, optimizers and metrics on the
device, fused steps against the loop, norms, clipping, averages, pinned memory, normalising,
mixed precision, exact resume, NCCL with one rank, digits (data/mnist), waits for the device as
PyTorch's profiler counts them, and speeds beside PyTorch's own.

environment:
  TORCH_PYTHON      see above
  GPU_CHECK_TARGET  where --prepare builds, with PyTorch (default target-2.11; 8 GB)
USAGE
}
say() { printf 'scripts/gpu-check.sh: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

prepare() {
  local target=${GPU_CHECK_TARGET:-$PWD/target-2.11}
  mkdir -p "$target" gpu-check
  target=$(cd "$target" && pwd)
  [ -x "$target/python/bin/python3" ] || python3 -m venv "$target/python"
  local python=$target/python/bin/python3
  "$python" -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2>/dev/null || {
    say "fetching PyTorch 2.11.0 with CUDA"
    "$python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.11.0 "nvidia-cuda-crt==13.0.*" \
      "nvidia-cuda-cccl==13.0.*" numpy
  }
  scripts/fetch-mnist.sh
  # Cargo.lock has a newer tch: the lock file of a copy is changed. Its files are as new as the copy, so that cargo looks at
  # them again.
  local source=$target/source
  rm -rf "$source"
  mkdir -p "$source"
  git ls-files -z | tar --null -T - -cf - | tar -xmf - -C "$source"
  local site
  site=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
  (
    cd "$source"
    cargo update --quiet -p tch --precise 0.24.0
    cargo update --quiet -p torch-sys --precise 0.24.0
    unset LIBTORCH
    # The package's configuration would name the usual libtorch.
    rm -rf .cargo
    export LIBTORCH_USE_PYTORCH=1 PATH=$target/python/bin:$PATH CARGO_TARGET_DIR=$target
    export CUDA_INCLUDE=$site/nvidia/cu13/include NCCL_INCLUDE=$site/nvidia/nccl/include
    cargo build --release --features nccl --example gpu_check
  )
  strip -o gpu-check/libgpu_check.so "$target/release/examples/libgpu_check.so"
  rm -rf gpu-check/mnist
  cp -R "${MNIST_DIR:-data/mnist}" gpu-check/mnist
  say "gpu-check/ is ready: $(du -sh gpu-check | cut -f1)"
}

case "${1:-}" in
  -h|--help) usage; exit 0 ;;
  --prepare) prepare; exit 0 ;;
esac
python=${TORCH_PYTHON:-python3}
# Our library takes libtorch from that PyTorch, so it has to be of the version that the library is built for.
needed=2.11.
[ "${1:-}" != --cpu ] || needed=2.13.0
version=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null) || die "$python cannot import torch. Set TORCH_PYTHON to a Python that can."
[[ $version == "$needed"* ]] || die "$python has torch $version, and the library is built for ${needed%.}. Set TORCH_PYTHON to a Python with that."
if [ "${1:-}" = --cpu ]; then
  cargo build --release --features distributed,mlflow --example gpu_check
  page=$(mktemp)
  trap 'rm -f "$page"' EXIT
  "$python" scripts/gpu_check.py "${CARGO_TARGET_DIR:-target}/release/examples/libgpu_check.so" --out "$page" "$@"
  [ $# -gt 1 ] || cat "$page"
else
  [ -f gpu-check/libgpu_check.so ] || die "there is no gpu-check/libgpu_check.so. Run scripts/gpu-check.sh --prepare where Rust is, and copy the folder."
  MNIST_DIR=${MNIST_DIR:-gpu-check/mnist} "$python" scripts/gpu_check.py gpu-check/libgpu_check.so "$@"
fi
