#!/usr/bin/env bash
# Compiles the kernels of src/bridge/one_pass.cpp with every C++ compiler there is, gcc's and clang's, and looks
# for vector instructions in each of them: a compiler that does not know an attribute drops it without an error.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF2'
usage: scripts/check-kernels.sh [--help]

Says SKIPPED where there is no objdump, no compiler or another processor than x86-64; fails where a kernel for
AVX2 or AVX-512 has no vector instruction, or computes with 512 bits where it should with 256.

environment: LIBTORCH (default .libtorch), CXX_COMPILERS (default "g++ clang++").
EOF2
}
say() { printf 'scripts/check-kernels.sh: %s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

case "${1:-}" in
  "") ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument '$1'" ;;
esac
[ "$(uname -m)" = x86_64 ] || { say "SKIPPED: the kernels for AVX are for x86-64"; exit 0; }
command -v objdump >/dev/null 2>&1 || { say "SKIPPED: there is no objdump"; exit 0; }
include=${LIBTORCH:-.libtorch}/include
[ -d "$include" ] || die "no libtorch headers at $include. Run scripts/setup-libtorch.sh, or set LIBTORCH."

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# These are the flags that build.rs gives for this file.
flags=(-std=c++17 -fPIC -O3 -w -ffp-contract=off -fno-math-errno -fno-trapping-math -D_GLIBCXX_USE_CXX11_ABI=1
  -I"$include" -I"$include/torch/csrc/api/include")

for compiler in ${CXX_COMPILERS:-g++ clang++}; do
  if ! command -v "$compiler" >/dev/null 2>&1; then
    say "SKIPPED: there is no $compiler"
    continue
  fi
  "$compiler" "${flags[@]}" -c src/bridge/one_pass.cpp -o "$out/kernels.o"
  objdump --disassemble --demangle --no-show-raw-insn "$out/kernels.o" | awk -v compiler="$compiler" '
    # This line begins a kernel, a function that is compiled for one instruction set. Parts that gcc
    # splits off are not looked at.
    /^[0-9a-f]+ </ {
      kernel = ""
      if (/\[clone/ || !/(avx2|avx512vl|avx512)::(run|load_all|store_all|read_low|write_low|reduce_as)</) next
      kernel = $0
      sub(/^[0-9a-f]+ </, "", kernel)
      sub(/>:$/, "", kernel)
      set = /avx512::/ ? "avx512" : /avx512vl::/ ? "avx512vl" : "avx2"
      wide = set == "avx512" ? "%zmm" : "%ymm"
      count[set]++
      found[kernel] = 0
    }
    kernel != "" && index($0, wide) { found[kernel]++ }
    # gcc copies and clears arrays by 512 bits, before the loop.
    kernel != "" && set == "avx512vl" && /\tv(fn?m|p?mul|p?add|p?sub|div|sqrt|cvt).*%zmm/ { wider[kernel] = 1 }
    kernel != "" && /call.*<fmaf?[@>]/ { called[kernel] = 1 }
    # Where two kernels have the same code, the compiler may make one of them a jump to the other.
    kernel != "" && /jmp .*::(run|load_all|store_all|read_low|write_low|reduce_as)</ {
      target = $0
      sub(/^[^<]*</, "", target)
      sub(/>$/, "", target)
      same[kernel] = target
    }
    END {
      for (kernel in found) {
        if (found[kernel] == 0 && !(kernel in same && found[same[kernel]] > 0)) { printf "no vector instruction: %s\n", kernel; bad++ }
        if (kernel in wider) { printf "vectors of 512 bits: %s\n", kernel; bad++ }
        if (kernel in called) { printf "calls a function for a * b + c: %s\n", kernel; bad++ }
      }
      # There are kernels for 29 rules, with decay and without, in f32 and f64, for loads and stores of
      # 2 types, for reads and writes of their storages of low precision, and for reductions of 4.
      split("avx2 avx512vl avx512", sets)
      for (i in sets) if (count[sets[i]] < 128) { printf "only %d kernels for %s were found\n", count[sets[i]], sets[i]; bad++ }
      printf "scripts/check-kernels.sh: %s: %d kernels for AVX2, %d and %d for AVX-512 in 256 and 512 bits, %d faults\n",
        compiler, count["avx2"], count["avx512vl"], count["avx512"], bad
      exit bad > 0
    }' || die "$compiler does not vectorise all kernels"
done
