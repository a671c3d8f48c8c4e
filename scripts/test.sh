#!/usr/bin/env bash
# Sets up what is needed and runs every check. All in the release profile: torch-sys, by far
# the longest to compile, is then compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/test.sh [--help]

Sets up libtorch (.libtorch/) and MNIST (data/mnist/) where they are missing, and Python's
readers of the files we write (.python/), then runs the format check, clippy, all tests,
the documentation build and the examples in smoke mode. Stops at the first failure.

Tests that need what is not there say SKIPPED: clang and objdump (scripts/check-kernels.sh) look
for vector code in the kernels; Chromium (CHROMIUM, or on the PATH) looks
at reports.

environment: OMP_NUM_THREADS (default 1), MNIST_DIR and what scripts/setup-libtorch.sh
and scripts/fetch-mnist.sh name in their --help.
EOF
}
say() { printf 'scripts/test.sh: %s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

case "${1:-}" in
  "") ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument '$1'" ;;
esac
command -v cargo >/dev/null 2>&1 || die "no cargo found. Install Rust 1.89 or newer (https://rustup.rs), or add its bin folder to PATH."
cargo fmt --version >/dev/null 2>&1 || die "no rustfmt found. Install it (rustup component add rustfmt)."
cargo clippy --version >/dev/null 2>&1 || die "no clippy found. Install it (rustup component add clippy)."

# The tests are many small networks side by side: more threads each would only spin.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# All that can be built without CUDA; one set for everything, so that nothing is compiled twice.
features=distributed,mlflow

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

say "format"
cargo fmt --all -- --check

say "set-up"
scripts/setup-libtorch.sh
scripts/fetch-mnist.sh

# For tests that read with them what we wrote. As a folder, because Debian's Python has no venv.
readers() { PYTHONPATH=$1 python3 -c 'import tensorboard, safetensors.numpy, numpy' 2>/dev/null; }
if command -v python3 >/dev/null 2>&1; then
  if ! readers "$PWD/.python"; then
    say "Python's readers"
    rm -rf .python
    timeout 300 python3 -m pip install --quiet --disable-pip-version-check --no-input \
      --target .python tensorboard safetensors numpy || rm -rf .python
  fi
  if readers "$PWD/.python"; then
    export PYTHONPATH=$PWD/.python${PYTHONPATH:+:$PYTHONPATH} TENSORBOARD_PYTHON=${TENSORBOARD_PYTHON:-python3}
  else
    say "SKIPPED: TensorBoard's and safetensors' own readers: pip could not install them"
  fi
else
  say "SKIPPED: TensorBoard's and safetensors' own readers: no python3"
fi

say "library without default features"
cargo check --release --no-default-features --lib

say "clippy"
cargo clippy --release --all-targets -- -D warnings
cargo clippy --release --features "$features" --all-targets -- -D warnings

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --release --features "$features" --no-deps

say "kernels, by gcc and by clang"
scripts/check-kernels.sh

say "tests"
cargo test --release --features "$features"

say "MNIST example in smoke mode"
cargo run --release --features "$features" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out"

say "a run that is killed, resumed and compared"
cargo run --release --features "$features" --example resume -- --smoke --out "$out/resume"

say "schedules of a file, previewed and trained with"
cargo run --release --features "$features" --example preview -- examples/schedules/mnist.toml --epoch-length 16 --epochs 2 --out "$out/preview.svg"
cargo run --release --features "$features" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out" --schedule examples/schedules/mnist.toml

say "fine-tuning and GAN examples in smoke mode"
cargo run --release --features "$features" --example finetune -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/finetune"
cargo run --release --features "$features" --example gan -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/gan"

say "all checks passed"
