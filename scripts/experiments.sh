#!/usr/bin/env bash
# Repeats an experiment of docs/RESULTS.md, and says how long that took. See --help.
#
# Each experiment is a file scripts/experiments/NAME.sh. Its first line says in a comment what it does and how long it
# takes, and it has one function, `experiment`, which finds set:
#
#   smoke     yes to only try that everything works, in a minute or so; otherwise no
#   out       the folder for what the runs leave, runs/NAME
#   pictures  the folder for pictures: docs, or $out in smoke mode
#
# and the functions say, die, build, torch_python and at_once of this file. Programs are in $programs once they are built.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOT'
usage: scripts/experiments.sh NAME [--smoke] | --help

Sets up what is needed, repeats an experiment of docs/RESULTS.md and prints its table.
With --smoke it only tries that everything works, and changes no picture of docs.

EOT
  for file in scripts/experiments/*.sh; do
    printf '  %-9s %s\n' "$(basename "$file" .sh)" "$(sed -n '1s/^# //p' "$file")"
  done
  cat <<'EOT'

environment:
  EXPERIMENT_JOBS      how many runs at once, each on one thread (default: the number of cores)
  EXPERIMENT_FEATURES  features to build with, where others are built with them (none is needed)
  TORCH_PYTHON         a Python with torch (default: the one of scripts/setup-python.sh --torch)
and what scripts/setup-libtorch.sh, scripts/setup-python.sh and the scripts that fetch data
name in their --help.
EOT
}
say() { printf 'experiments: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Builds examples: build --example NAME...
build() { cargo build --release --quiet ${EXPERIMENT_FEATURES:+--features "$EXPERIMENT_FEATURES"} "$@"; }
programs=${CARGO_TARGET_DIR:-target}/release/examples

# Prints a Python that has torch, and fails where there is none. In smoke mode none is fetched.
torch_python() {
  local python=${TORCH_PYTHON:-.python/bin/python3}
  [ -n "${TORCH_PYTHON:-}" ] || [ "$smoke" = yes ] || scripts/setup-python.sh --torch >&2 || true
  "$python" -c 'import torch' 2>/dev/null || { say "no Python with torch (TORCH_PYTHON=...): the experiment runs without it"; return 1; }
  printf '%s\n' "$python"
}

# Runs the commands, one in each argument, several at once. Fails if one of them does.
at_once() { printf '%s\0' "$@" | xargs -0 -P "${EXPERIMENT_JOBS:-$(nproc)}" -I COMMAND bash -euo pipefail -c COMMAND; }

name= smoke=no
for argument in "$@"; do
  case "$argument" in
    -h|--help) usage; exit 0 ;;
    --smoke) smoke=yes ;;
    -*) usage >&2; die "unknown argument '$argument'" ;;
    *) [ -z "$name" ] || die "one experiment at a time: '$name' or '$argument'"; name=$argument ;;
  esac
done
[ -n "$name" ] || { usage >&2; die "which experiment?"; }
[ -f "scripts/experiments/$name.sh" ] || { usage >&2; die "there is no experiment '$name'"; }
command -v cargo >/dev/null 2>&1 || die "no cargo found. Install Rust 1.89 or newer (https://rustup.rs), or add its bin folder to PATH."

out=runs/$name pictures=docs
if [ "$smoke" = yes ]; then out=runs/$name-smoke pictures=$out; fi
mkdir -p "$out"
export OMP_NUM_THREADS=1
scripts/setup-libtorch.sh
# shellcheck source=/dev/null
source "scripts/experiments/$name.sh"
begun=$SECONDS
experiment
say "$name took $(((SECONDS - begun) / 60)) min $(((SECONDS - begun) % 60)) s with ${EXPERIMENT_JOBS:-$(nproc)} runs at once"
