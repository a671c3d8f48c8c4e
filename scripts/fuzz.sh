#!/usr/bin/env bash
# Runs a fuzz target under libFuzzer's instrumentation, with the stable compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF2'
usage: scripts/fuzz.sh [--help] [pytorch | checkpoint] [RUNS]

Builds the target (default pytorch) in fuzz/target, which compiles torch-sys anew the first time, and runs it RUNS
times (default 100,000) on changed files, beginning with those of tests/golden/interop and of fuzz/corpus/TARGET,
where it keeps what it finds. Fails at a panic, more memory than allowed, a run of ten seconds, and a file that was
made. The input that did it is then in fuzz/artifacts/TARGET.

environment: FUZZ_SEED (default 1), and what scripts/setup-libtorch.sh names in its --help.
EOF2
}
say() { printf 'scripts/fuzz.sh: %s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

case "${1:-}" in
  -h|--help) usage; exit 0 ;;
esac
target=${1:-pytorch} runs=${2:-100000}
[ -f "fuzz/fuzz_targets/$target.rs" ] || { usage >&2; die "unknown target '$target'"; }
scripts/setup-libtorch.sh
export LIBTORCH="${LIBTORCH:-$PWD/.libtorch}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# These are the flags of cargo fuzz, without a sanitizer. They are for the target alone: without --target, they would be
# for build scripts too.
host=$(rustc -vV | sed -n 's/^host: //p')
flags="--cfg fuzzing -Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
  flags+=" -Cllvm-args=-sanitizer-coverage-$option"
done
RUSTFLAGS="${RUSTFLAGS:-} $flags" cargo build --release --manifest-path fuzz/Cargo.toml --target "$host" \
  --target-dir fuzz/target --bin "$target"

corpus="$PWD/fuzz/corpus/$target" artifacts="$PWD/fuzz/artifacts/$target" program="$PWD/fuzz/target/$host/release/$target"
mkdir -p "$corpus" "$artifacts"
seeds=()
[ "$target" != pytorch ] || seeds=("$PWD/tests/golden/interop")
# A file that the target makes would be here, or where a temporary file is made.
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
mkdir "$empty/here" "$empty/temporary"
(cd "$empty/here" && TMPDIR="$empty/temporary" LD_LIBRARY_PATH="$LIBTORCH/lib:${LD_LIBRARY_PATH:-}" "$program" "$corpus" "${seeds[@]}" \
  -runs="$runs" -seed="${FUZZ_SEED:-1}" -timeout=10 -rss_limit_mb=3000 -artifact_prefix="$artifacts/" -print_final_stats=1)
made=$(find "$empty" -type f)
[ -z "$made" ] || die "files were made: $made"
say "$target: $runs runs, no panic, no file made"
