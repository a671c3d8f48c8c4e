#!/usr/bin/env bash
# Steps, clipping and averages against tch's own, or processes against torch's: Markdown tables.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/bench.sh [--help] [--table] [distributed]

Sets up libtorch (.libtorch/) where it is missing, runs `cargo bench --bench steps` and prints
a Markdown table: for each benchmark the median, and how many times as fast it is as
tch's own. --table prints that of the last run again. Needs Python 3 for the table.

`distributed` measures all-reduce and a step of data-parallel training instead, in turns
with torch's own where TORCH_PYTHON (default python3) is a Python that has torch.

environment: OMP_NUM_THREADS, the number of threads (default 1), and what
scripts/setup-libtorch.sh names in its --help.
EOF
}

table=no
case "${1:-}" in
  "") ;;
  --table) table=yes ;;
  distributed)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    scripts/setup-libtorch.sh
    exec cargo bench --features distributed --bench distributed
    ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; printf "scripts/bench.sh: error: unknown argument '%s'\n" "$1" >&2; exit 1 ;;
esac

if [ "$table" = no ]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  scripts/setup-libtorch.sh
  cargo bench --bench steps -- --noplot
fi

python3 - "${CARGO_TARGET_DIR:-target}/criterion" <<'EOF'
import json, pathlib, sys

groups = {}
for file in pathlib.Path(sys.argv[1]).glob("*/*/new/benchmark.json"):
    names = json.loads(file.read_text())
    median = json.loads((file.parent / "estimates.json").read_text())["median"]["point_estimate"]
    groups.setdefault(names["group_id"], []).append((names["function_id"], median))

def theirs(ours, rows):
    """What a line is compared with: tch's of the same operation."""
    operation = ours.rsplit(", ", 1)[0] if ", " in ours else None
    for name, median in rows:
        if "tch" in name and (operation is None or name.startswith(operation)):
            if operation is not None or ", " not in name or "loop" in name:
                return median
    return None

print("| | | µs | times as fast as tch |\n|---|---|---|---|")
for group, rows in sorted(groups.items()):
    if group != "floor" and not any("tch" in name for name, _ in rows):
        continue
    for name, median in sorted(rows):
        other = None if "tch" in name else theirs(name, rows)
        ratio = f"{other / median:.1f}" if other else ""
        print(f"| {group} | {name} | {median / 1e3:,.1f} | {ratio} |")
EOF
