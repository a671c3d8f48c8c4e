#!/usr/bin/env bash
# Sets up what is needed and runs every check. Everything uses the release profile, so that
# torch-sys, which takes by far the longest to compile, is compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/test.sh [--help]

Sets up libtorch (.libtorch/) and MNIST (data/mnist/) where they are missing, and Python's
readers of the files we write (.python/), then runs the format check, clippy, all tests,
the documentation build and the examples in smoke mode. Stops at the first failure.

Tests that need what is not there say SKIPPED, and are listed again at the end: Chromium
(CHROMIUM, or on the PATH) looks at reports; clang and objdump look for vector code in the
kernels (scripts/check-kernels.sh); Python's torch trains beside ours, where TORCH_PYTHON
names a Python that has it or scripts/setup-python.sh --torch has run; Fashion-MNIST is
trained on where Debian's package dataset-fashion-mnist is installed; all of MNIST-1D is
compared where TORCH_PYTHON has the package mnist1d.

environment:
  CI                  if set, installs Python's torch too; a test skipped for want of a
                      Python package is then a failure
  TORCH_PYTHON        a Python with torch 2.13.0, pytorch-ignite, safetensors and NumPy
  TRANSFORMERS_PYTHON one that has Transformers, timm and Lightning too (default: TORCH_PYTHON)
  TENSORBOARD_PYTHON  a Python with TensorBoard
  OMP_NUM_THREADS     default 1
  MNIST_DIR and what scripts/setup-libtorch.sh, scripts/setup-python.sh and
  scripts/fetch-mnist.sh name in their --help
EOF
}
say() { printf 'scripts/test.sh: %s (after %d s)\n' "$*" "$SECONDS"; }
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

# These are all features that can be built without CUDA. Every command uses the same set, so that
# nothing is compiled twice.
features=distributed,mlflow

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

say "format"
cargo fmt --all -- --check

say "set-up"
scripts/setup-libtorch.sh
scripts/fetch-mnist.sh
if [ -e "${FASHION_MNIST_FROM:-/usr/share/datasets/fashion-mnist}" ]; then scripts/fetch-mnist.sh --fashion; fi

# Without Python, the tests that read our files with it, or train beside it, print SKIPPED.
python=(scripts/setup-python.sh)
[ -z "${CI:-}" ] || python+=(--torch)
if [ -n "${TORCH_PYTHON:-}" ] && [ -n "${TENSORBOARD_PYTHON:-}" ]; then
  say "Python: $TORCH_PYTHON and $TENSORBOARD_PYTHON"
elif "${python[@]}"; then
  export TORCH_PYTHON=${TORCH_PYTHON:-$PWD/.python/bin/python3}
  export TENSORBOARD_PYTHON=${TENSORBOARD_PYTHON:-$PWD/.python/bin/python3}
elif [ -n "${CI:-}" ]; then
  die "CI runs the tests that need Python's packages, and these could not be set up"
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
cargo test --release --features "$features" 2>&1 | tee "$out/tests.log"

if "${TORCH_PYTHON:-python3}" -c 'import ignite, torch' 2>/dev/null; then
  say "golden files, checked against pytorch-ignite"
  "${TORCH_PYTHON:-python3}" tests/golden/regenerate.py
fi

say "MNIST example in smoke mode"
cargo run --release --features "$features" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out"

say "a run that is killed, resumed and compared"
cargo run --release --features "$features" --example resume -- --smoke --out "$out/resume"

say "schedules of a file, previewed and trained with"
cargo run --release --features "$features" --example preview -- examples/schedules/mnist.toml --epoch-length 16 --epochs 2 --out "$out/preview.svg"
cargo run --release --features "$features" --example mnist -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out" --plan examples/schedules/mnist.toml

say "fine-tuning and GAN examples in smoke mode"
cargo run --release --features "$features" --example finetune -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/finetune"
cargo run --release --features "$features" --example gan -- --smoke --data "${MNIST_DIR:-data/mnist}" --out "$out/gan"

# The check runs in the process of Python's torch, whose libtorch has to be of the version that we are built for.
if "${TORCH_PYTHON:-python3}" -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null; then
  say "the check for GPUs, tried on the CPU"
  scripts/gpu-check.sh --cpu
else
  echo "SKIPPED: scripts/gpu-check.sh --cpu: ${TORCH_PYTHON:-python3} is no Python with torch 2.13.0; set TORCH_PYTHON to one" | tee -a "$out/tests.log"
fi

say "a transformer in bf16, with each storage of its parameters"
cargo run --release --features "$features" --example low_precision -- --iterations 20 --out "$out/low-precision.svg"

if "${TORCH_PYTHON:-python3}" -c 'import safetensors, torch' 2>/dev/null; then
  say "a model of Python, compiled and trained"
  "${TORCH_PYTHON:-python3}" scripts/export_step.py examples/compiled/gpt.py:example "$out/gpt"
  cargo run --release --features "$features" --example compiled -- "$out/gpt" --smoke --out "$out/compiled"
fi
say "character transformer on two ranks; one goes on"
chargpt=(cargo run --release --features "$features" --example chargpt -- --smoke --text docs/DIFFERENCES.md --optimizer muon --bf16 --out "$out/chargpt")
"${chargpt[@]}" --accumulate 3 --ranks 2 --stop-after 10
"${chargpt[@]}" --accumulate 3 --resume | tee "$out/chargpt.log"
grep -q 'resumed .* at iteration 30 ' "$out/chargpt.log" || die "it did not go on where the two ranks were"
grep -q '^batch 60: ' "$out/chargpt.log" || die "it did not go on to the end"

say "experiments in smoke mode"
for experiment in scripts/experiments/*.sh; do
  EXPERIMENT_FEATURES=$features scripts/experiments.sh "$(basename "$experiment" .sh)" --smoke
done

skipped=$(grep -a 'SKIPPED' "$out/tests.log" | sort -u || true)
if [ -z "$skipped" ]; then
  say "all checks passed"
  exit 0
fi
printf '\n%s\n\n' "$skipped"
if [ -n "${CI:-}" ] && grep -qiE 'python|torch|tensorboard|safetensors' <<< "$skipped"; then
  die "CI runs every test that needs Python, and the tests above did not run"
fi
say "all checks that could run have passed; THE TESTS ABOVE DID NOT RUN"
! grep -qiE 'python|torch|tensorboard|safetensors' <<< "$skipped" || say "those that need Python run after scripts/setup-python.sh --torch"
