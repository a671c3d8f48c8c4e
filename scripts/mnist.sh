#!/usr/bin/env bash
# Trains the MNIST example: sets up libtorch and the digits, then builds and runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/mnist.sh [--help] [options of the example]

Sets up libtorch (.libtorch/) and MNIST (data/mnist/) where they are missing, builds
examples/mnist.rs in release mode and runs it with the given options. Paths among them
are relative to the repository. For the list of options, after the first run:
  cargo run --release --example mnist -- --help

--ranks N trains on N processes of this machine.

environment: MNIST_DIR and what scripts/setup-libtorch.sh and scripts/fetch-mnist.sh
name in their --help.
EOF
}
die() { printf 'mnist: error: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in -h|--help) usage; exit 0 ;; esac
command -v cargo >/dev/null 2>&1 || die "no cargo found. Install Rust 1.89 or newer (https://rustup.rs), or add its bin folder to PATH."

scripts/setup-libtorch.sh
scripts/fetch-mnist.sh
features=()
case " $* " in *" --ranks"*) features=(--features distributed) ;; esac
exec cargo run --release --quiet ${features[@]+"${features[@]}"} --example mnist -- --data "${MNIST_DIR:-data/mnist}" "$@"
