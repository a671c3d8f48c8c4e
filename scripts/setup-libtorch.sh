#!/usr/bin/env bash
# Leaves a ready CPU libtorch in .libtorch/, where .cargo/config.toml points cargo. It is quick and
# silent when it is already there. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${TORCH_VERSION:-2.13.0}   # tch 0.26, which Cargo.lock has, expects this version; tch 0.24 wants 2.11.0
source=${TORCH_SOURCE:-auto}
dest=${LIBTORCH_DIR:-.libtorch}

usage() {
  cat <<'EOF'
usage: scripts/setup-libtorch.sh [--help]

Puts a CPU libtorch into .libtorch/ (about 450 MB). Does nothing when LIBTORCH or
LIBTORCH_USE_PYTORCH is set, or when the wanted version is already there.

environment:
  TORCH_VERSION   version to set up            (default 2.13.0, what tch 0.26 needs)
  TORCH_SOURCE    archive | wheel | auto       (default auto: the official archive,
                  and the torch wheel of PyPI where the archive cannot be reached)
  LIBTORCH_DIR    where to put it              (default .libtorch)
EOF
}
say() { printf 'setup-libtorch: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

case "${1:-}" in
  "") ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument '$1'" ;;
esac
case "$source" in auto|archive|wheel) ;; *) die "TORCH_SOURCE is '$source'; use archive, wheel or auto" ;; esac

have() { command -v "$1" >/dev/null 2>&1; }
have "${CXX:-c++}" || have g++ || have clang++ ||
  die "no C++ compiler found. Install one (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install) or set CXX."

if [ -n "${LIBTORCH:-}" ]; then
  [ -d "$LIBTORCH/lib" ] || die "LIBTORCH is '$LIBTORCH', which has no lib folder. Correct it, or unset it to let this script set one up."
  if [ -f "$LIBTORCH/build-version" ]; then
    given=$(cut -d+ -f1 "$LIBTORCH/build-version")
    [ "$given" = "$version" ] || [ -n "${LIBTORCH_BYPASS_VERSION_CHECK:-}" ] ||
      die "LIBTORCH holds version $given, but $version is needed. Use that version, or unset LIBTORCH."
  fi
  say "using LIBTORCH=$LIBTORCH"
  exit 0
fi
if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then
  have python3 || die "LIBTORCH_USE_PYTORCH is set, but there is no python3"
  given=$(python3 -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null) ||
    die "LIBTORCH_USE_PYTORCH is set, but python3 cannot import torch. Install torch==$version, or unset it."
  [ "$given" = "$version" ] || [ -n "${LIBTORCH_BYPASS_VERSION_CHECK:-}" ] ||
    die "Python's torch is version $given, but $version is needed. Install that version, or unset LIBTORCH_USE_PYTORCH."
  say "using Python's torch $given"
  exit 0
fi

# Models that PyTorch compiled (docs/COMPILED.md) are linked with libtorch.so, which is empty but for what it needs. The
# wheel's recipe leaves it out, and earlier ones left a linker script of that name.
make_libtorch_so() {
  local lib=$1 cxx=${CXX:-}
  [ "$(uname -s)" = Linux ] || return 0
  [ "$(head -c 4 "$lib/libtorch.so" 2>/dev/null)" != "$(printf '\177ELF')" ] || return 0
  for name in c++ g++ clang++; do [ -n "$cxx" ] || ! have "$name" || cxx=$name; done
  # CXX may be a command with arguments.
  # shellcheck disable=SC2086
  $cxx -shared -fPIC -x c++ /dev/null -x none -o "$lib/libtorch.so.part" -Wl,-soname,libtorch.so -Wl,--no-as-needed \
    -L"$lib" -ltorch_cpu -lc10 || die "libtorch.so cannot be linked"
  mv "$lib/libtorch.so.part" "$lib/libtorch.so"
}

# `.complete` is written last, in the folder that is then renamed into place.
if [ -f "$dest/.complete" ] && [ "$(cut -d+ -f1 "$dest/build-version")" = "$version" ]; then
  make_libtorch_so "$dest/lib"
  exit 0
fi

have unzip || die "unzip is needed (Debian/Ubuntu: apt-get install unzip)"
free_kb=$(df -Pk . | awk 'NR==2 {print $4}')
[ "$free_kb" -ge 2500000 ] || die "about 2.5 GB of free disk are needed here while unpacking, $((free_kb / 1000)) MB are free"

work="$dest.part.$$"
trap 'rm -rf "$work"' EXIT
rm -rf "$work"; mkdir -p "$work/lib"

from_archive() {
  local system url
  have curl || { say "no curl"; return 1; }
  case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) system="shared-with-deps-$version%2Bcpu" ;;
    Darwin-arm64) system="macos-arm64-$version" ;;
    *) say "no official archive for $(uname -s) $(uname -m)"; return 1 ;;
  esac
  url="https://download.pytorch.org/libtorch/cpu/libtorch-$system.zip"
  say "fetching the official archive of libtorch $version"
  curl -fsSL --connect-timeout 10 --retry 2 -o "$work/archive.zip" "$url" || { say "the official archive cannot be had"; return 1; }
  unzip -tq "$work/archive.zip" >/dev/null || { say "the archive is damaged"; return 1; }
  unzip -q "$work/archive.zip" -d "$work/unpacked"
  rm -rf "${work:?}/lib" "$work/archive.zip"
  mv "$work"/unpacked/libtorch/* "$work"/
  rm -rf "$work/unpacked"
}

# On Linux the wheel is a CUDA build. Its CPU half needs two small CUDA libraries (profiling
# hooks of the CPU library) and nothing else of the CUDA stack.
from_wheel() {
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    { say "the wheel recipe is for Linux x86_64; install torch==$version with pip and set LIBTORCH_USE_PYTORCH=1"; return 1; }
  python3 -m pip --version >/dev/null 2>&1 || { say "python3 with pip is needed to fetch the torch wheel"; return 1; }
  say "fetching torch $version from PyPI (about 530 MB)"
  local get=(python3 -m pip download --quiet --no-deps --only-binary=:all: --disable-pip-version-check --dest "$work/wheels")
  "${get[@]}" --python-version 3.12 --implementation cp --abi cp312 --platform manylinux_2_28_x86_64 "torch==$version" ||
    { say "pip cannot fetch torch==$version"; return 1; }
  "${get[@]}" "nvidia-cuda-cupti==13.0.*" "nvidia-cuda-runtime==13.0.*" || { say "pip cannot fetch the CUDA run-time libraries"; return 1; }
  unzip -q "$work"/wheels/torch-*.whl 'torch/include/*' torch/lib/libtorch_cpu.so torch/lib/libc10.so torch/lib/libgomp.so.1 -d "$work/unpacked"
  unzip -qj "$work"/wheels/nvidia_cuda_cupti-*.whl '*/libcupti.so.13' -d "$work/lib"
  unzip -qj "$work"/wheels/nvidia_cuda_runtime-*.whl '*/libcudart.so.13' -d "$work/lib"
  mv "$work"/unpacked/torch/lib/* "$work/lib/"
  mv "$work/unpacked/torch/include" "$work/include"
  rm -rf "$work/unpacked" "$work/wheels"
  make_libtorch_so "$work/lib"
  echo "$version+cpu" > "$work/build-version"
}

case "$source" in
  archive) from_archive || die "could not set up libtorch $version from the official archive" ;;
  wheel) from_wheel || die "could not set up libtorch $version from the torch wheel" ;;
  auto) from_archive || { rm -rf "$work"; mkdir -p "$work/lib"; from_wheel; } ||
    die "could not set up libtorch $version. Install it yourself and set LIBTORCH to its folder (or LIBTORCH_USE_PYTORCH=1)." ;;
esac

if [ "$(uname -s)" = Linux ] && have ldd; then
  missing=$(LD_LIBRARY_PATH="$work/lib" ldd "$work/lib/libtorch_cpu.so" | awk '/not found/ {print $1}')
  [ -z "$missing" ] || die "libtorch_cpu.so of version $version misses: $missing"
fi
touch "$work/.complete"
rm -rf "$dest"
mv "$work" "$dest"
trap - EXIT
say "libtorch $version is ready in $dest"
