#!/usr/bin/env bash
# Makes random training programs and runs each by the engine, with stops and resumes, and by a textbook's
# loop, which must agree (tests/seams).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOT'
usage: scripts/seams.sh [--help] [--seed SEED] [--jobs JOBS] [N]

Runs N programs (1000 unless given), in release: those of the numbers SEED, SEED + 1, … (a
fresh SEED unless given), by JOBS processes (one for each core unless given). Prints each
program that does not do what the textbook's loop does, made small, as a test that can be
pasted into tests/seams/main.rs; then how many there were. A program's number gives the same
program until the generator is changed: `scripts/seams.sh --seed NUMBER 1` runs it again.

Exits with 1 where there is a difference. About 30 ms a program and core.

environment: OMP_NUM_THREADS (default 1) and what scripts/setup-libtorch.sh names in its --help.
EOT
}
die() { printf 'scripts/seams.sh: error: %s\n' "$*" >&2; exit 1; }

count=1000 seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') jobs=$(nproc)
number() { [[ "$2" =~ ^[0-9]+$ ]] || die "$1 must be a number, not '$2'"; }
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) usage; exit 0 ;;
    --seed) [ $# -gt 1 ] || die "--seed needs a number"; seed=$2; shift 2 ;;
    --jobs) [ $# -gt 1 ] || die "--jobs needs a number"; jobs=$2; shift 2 ;;
    -*) usage >&2; die "unknown argument '$1'" ;;
    *) count=$1; shift ;;
  esac
done
number N "$count"; number --seed "$seed"; number --jobs "$jobs"
[ "$jobs" -gt 0 ] || die "--jobs must be at least 1"

scripts/setup-libtorch.sh >&2
# Each process uses one thread. libtorch's warnings are off, because programs do some odd things on
# purpose (such as one tensor under two names).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
SEAMS_PROGRAMS=$count SEAMS_SEED=$seed SEAMS_JOBS=$jobs \
  exec cargo test --quiet --release --features distributed,mlflow --test seams -- \
  --exact more_programs_equal_the_reference --ignored --nocapture
