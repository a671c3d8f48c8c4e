#!/usr/bin/env bash
# Leaves in .python/ the Python packages that tests read our files with and compare us with.
# It is quick when they are already there. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=${TORCH_VERSION:-2.13.0}   # the version of our libtorch, because torch's processes join ours in one group
ignite=0.5.5                     # the version of tests/golden
# Libraries whose files and optimizers tests compare with ours; tests/golden names the versions of the last two.
libraries=(transformers==5.24.0 timm==1.0.31 pytorch-lightning==2.6.6 schedulefree==1.4.1 lion-pytorch==0.2.5)
dest=${PYTHON_DIR:-.python}

usage() {
  cat <<'EOT'
usage: scripts/setup-python.sh [--torch] [--help]

Installs TensorBoard, safetensors and NumPy into .python/ (about 150 MB), and makes
.python/bin/python3, which runs python3 with them. Nothing outside .python/ changes.
Does nothing when they are already there.

  --torch   torch and pytorch-ignite too, and Transformers, timm, Lightning, schedulefree and
            lion-pytorch (150 MB of it): 1.7 GB where download.pytorch.org has the CPU build,
            else 5 GB from PyPI (two to four minutes)

environment:
  TORCH_VERSION   version of torch         (default 2.13.0, as scripts/setup-libtorch.sh)
  PYTHON_DIR      where to put it all      (default .python)
EOT
}
say() { printf 'setup-python: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

with_torch=
while [ $# -gt 0 ]; do
  case "$1" in
    --torch) with_torch=1 ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; die "unknown argument '$1'" ;;
  esac
  shift
done
command -v python3 >/dev/null 2>&1 || die "no python3 found (Debian/Ubuntu: apt-get install python3 python3-pip)"

# Checks that the Python of a folder imports everything that is asked for, in the right versions.
# The script checks each time, because python3 itself may have been replaced since.
ready() {
  [ -x "$1/bin/python3" ] || return 1
  "$1/bin/python3" - "${with_torch:+$torch}" "pytorch-ignite==$ignite" "${libraries[@]}" >/dev/null 2>&1 <<'EOT'
import importlib.metadata, sys
import numpy, safetensors.numpy, tensorboard
torch_wanted, *wanted = sys.argv[1:]
if torch_wanted:
    import ignite, sklearn, scipy, tensorboardX, torch, tqdm
    assert torch.__version__.split("+")[0] == torch_wanted, torch.__version__
    for name, version in (requirement.split("==") for requirement in wanted):
        assert importlib.metadata.version(name) == version, name
EOT
}
if ready "$dest"; then exit 0; fi

python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip (Debian/Ubuntu: apt-get install python3-pip)"
for stale in "$dest".part.*; do   # folders that killed runs left behind
  [ ! -d "$stale" ] || kill -0 "${stale##*.}" 2>/dev/null || rm -rf "$stale"
done
work="$dest.part.$$"
trap 'rm -rf "$work"' EXIT
rm -rf "$work"; mkdir -p "$work/bin" "$work/tmp" "$work/packages"

# Installs into a folder of packages and not into a venv, because Debian's Python may lack the
# module venv. pip unpacks beside the folder, because the system's temporary folder may be small.
pip_install() {
  TMPDIR="$PWD/$work/tmp" PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --no-input \
    --no-cache-dir --upgrade --target "$work/packages" "$@"
}
packages=(tensorboard safetensors numpy)
if [ -n "$with_torch" ]; then
  # Each torch has its torchvision, which timm needs: 0.28 belongs to 2.13.
  IFS=. read -r _ minor patch <<< "$torch"
  vision="0.$((minor + 15)).$patch"
  packages+=("torch==$torch" "torchvision==$vision" "pytorch-ignite==$ignite" scikit-learn scipy tqdm tensorboardX "${libraries[@]}")
  cpu=https://download.pytorch.org/whl/cpu
  if command -v curl >/dev/null 2>&1 && curl -fsI --connect-timeout 5 --max-time 20 -o /dev/null "$cpu/torch/"; then
    say "fetching torch $torch for the CPU, and the readers"
    packages=("${packages[@]/#torch==$torch/torch==$torch+cpu}")
    packages=(--extra-index-url "$cpu" "${packages[@]/#torchvision==$vision/torchvision==$vision+cpu}")
  else
    free_kb=$(df -Pk . | awk 'NR==2 {print $4}')
    [ "$free_kb" -ge 9000000 ] || die "about 9 GB of free disk are needed here while unpacking PyPI's torch, $((free_kb / 1000)) MB are free"
    say "fetching torch $torch from PyPI (about 3 GB), and the readers"
  fi
else
  say "fetching TensorBoard, safetensors and NumPy"
fi
pip_install "${packages[@]}" || die "pip cannot install ${packages[*]}"
rm -rf "$work/tmp"
cat > "$work/bin/python3" <<'EOT'
#!/bin/sh
# Starts python3 with the packages beside this file.
packages=$(cd "$(dirname "$0")/../packages" && pwd) || exit 1
PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec python3 "$@"
EOT
chmod +x "$work/bin/python3"
ready "$work" || die "python3 cannot import what pip installed"
rm -rf "$dest"
mv "$work" "$dest"
trap - EXIT
say "$dest/bin/python3 is ready"
