#!/usr/bin/env bash
# Sets up what is needed and runs every check. All in the release profile: torch-sys, by far
# the longest to compile, is then compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/test.sh [--help]

Sets up libtorch (.libtorch/) and MNIST (data/mnist/) where they are missing, then runs
the format check, clippy, all tests, the documentation build and the examples in smoke
mode. Stops at the first failure.

environment: OMP_NUM_THREADS (default 1), MNIST_DIR, TORCH_PYTHON (a Python with torch, for
the tests with processes in Python), and what scripts/setup-libtorch.sh
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

features=(--features distributed)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

say "format"
cargo fmt --all -- --check

say "set-up"
scripts/setup-libtorch.sh
scripts/fetch-mnist.sh

# Everything that follows with the feature `distributed`, so that there is one build; without it only this check.
say "library without default features"
cargo check --release --no-default-features --lib

say "clippy"
cargo clippy --release --all-targets "${features[@]}" -- -D warnings

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps "${features[@]}"

say "tests"
cargo test --release "${features[@]}"

say "MNIST example in smoke mode"
cargo run --release "${features[@]}" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out"

say "a run that is killed, resumed and compared"
cargo run --release "${features[@]}" --example resume -- --smoke --out "$out/resume"

say "schedules of a file, previewed and trained with"
cargo run --release "${features[@]}" --example preview -- examples/schedules/mnist.toml --epoch-length 16 --epochs 2 --out "$out/preview.svg"
cargo run --release "${features[@]}" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out" --schedule examples/schedules/mnist.toml

say "fine-tuning and GAN examples in smoke mode"
cargo run --release "${features[@]}" --example finetune -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/finetune"
cargo run --release "${features[@]}" --example gan -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/gan"

say "all checks passed"
