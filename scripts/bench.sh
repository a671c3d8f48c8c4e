#!/usr/bin/env bash
# Steps, clipping and averages against tch's own and PyTorch's: Markdown tables of medians and ratios.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/bench.sh [--help] [--table]

Sets up libtorch (.libtorch/) where it is missing and runs `cargo bench --bench steps`, then
benches/steps.py where a Python with torch is found, and prints a Markdown table for each number of
threads. --table prints those of the last run again. Takes about ten minutes for each number of
threads, wants 6 GB of memory, and needs Python 3 for the table.

environment:
  BENCH_THREADS  the numbers of threads (default "1 2")
  PYTHON         a Python with torch to compare with (default python3)
and what scripts/setup-libtorch.sh names in its --help.
EOF
}

table=no
case "${1:-}" in
  "") ;;
  --table) table=yes ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; printf "scripts/bench.sh: error: unknown argument '%s'\n" "$1" >&2; exit 1 ;;
esac

python=${PYTHON:-python3}
out="${CARGO_TARGET_DIR:-target}/criterion"
[ "$table" = yes ] || scripts/setup-libtorch.sh
for threads in ${BENCH_THREADS:-1 2}; do
  peer="$out/torch-$threads.jsonl"
  if [ "$table" = no ]; then
    export OMP_NUM_THREADS="$threads"
    cargo bench --bench steps -- --noplot --save-baseline "threads-$threads"
    rm -f "$peer"
    if "$python" -c 'import torch' 2>/dev/null; then
      "$python" benches/steps.py --threads "$threads" --out "$peer"
    else
      echo "scripts/bench.sh: $python has no torch (PYTHON=...): nothing to compare with but tch" >&2
    fi
  fi
  printf '\n%s thread(s)\n\n' "$threads"
  if [ -f "$peer" ]; then
    python3 scripts/bench-table.py "$out" "threads-$threads" "$peer"
  else
    python3 scripts/bench-table.py "$out" "threads-$threads"
  fi
done
