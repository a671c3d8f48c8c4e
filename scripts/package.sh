#!/usr/bin/env bash
# Looks at the package as crates.io would have it. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: scripts/package.sh [--all-targets] [--help]

Packs the crate, unpacks it, and checks with cargo that
  * a crate which depends on the unpacked package builds, and runs a little training;
  * the package's library passes without default features, and with each feature alone;
  * with --all-targets: its examples and benches too, with all features that need no CUDA
    and with none.

Everything is built in target/package-check, and libtorch's bindings only once for all of it.

environment:
  FEATURES   features to check alone (default: all that need neither CUDA nor a download)
USAGE
}
say() { printf 'scripts/package.sh: %s\n' "$*"; }
die() { say "error: $*" >&2; exit 1; }

all_targets=
case "${1:-}" in
  "") ;;
  --all-targets) all_targets=1 ;;
  -h|--help) usage; exit 0 ;;
  *) usage >&2; die "unknown argument '$1'" ;;
esac
features=${FEATURES:-progress plots tracing toml signals distributed mlflow mlflow-tls}

scripts/setup-libtorch.sh
export LIBTORCH=${LIBTORCH:-$PWD/.libtorch}
target=$PWD/target/package-check
version=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"name":"tch-ignite","version":"\([^"]*\)".*/\1/')

say "packing $version"
# The build that `cargo package` would make is the ones below.
cargo package --no-verify --allow-dirty --target-dir "$target" --quiet
package=$target/tch-ignite-$version
rm -rf "$package"
tar -xzf "$target/package/tch-ignite-$version.crate" -C "$target"
cp Cargo.lock "$package/"
export CARGO_TARGET_DIR=$target

say "a crate that depends on it"
crate=$target/dependant
rm -rf "$crate"
mkdir -p "$crate/src"
cat > "$crate/Cargo.toml" <<TOML
[package]
name = "dependant"
version = "0.0.0"
edition = "2021"

[dependencies]
tch-ignite = { path = "../tch-ignite-$version" }
anyhow = "1"

[workspace]
TOML
cp Cargo.lock "$crate/"
cat > "$crate/src/main.rs" <<'RUST'
use tch_ignite::prelude::*;
use tch_ignite::tch::{nn, Device, Kind, Reduction, Tensor};

fn main() -> anyhow::Result<()> {
    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 3, 1, Default::default());
    let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    let x = Tensor::rand([64, 3], (Kind::Float, Device::Cpu));
    let data = Loader::new(&x, &x.sum_dim_intlist(1, true, Kind::Float), 8)?.shuffle(1);
    let mut trainer = create_supervised_trainer();
    trainer.metric("loss", RunningAverage::new());
    let mut cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, Reduction::Mean));
    println!("{}", trainer.run(&mut cx, &data, Until::epochs(20))?);
    let loss = trainer.state.metrics.get("loss")?;
    anyhow::ensure!(loss < 0.01, "the loss is {loss}");
    Ok(())
}
RUST
cargo run --release --manifest-path "$crate/Cargo.toml" --quiet

cd "$package"
say "the library without default features"
cargo check --release --lib --no-default-features --quiet
for feature in $features; do
  say "the library with $feature alone"
  cargo check --release --lib --no-default-features --features "$feature" --quiet
done
if [ -n "$all_targets" ]; then
  say "examples and benches, without default features and with all"
  cargo check --release --all-targets --no-default-features --quiet
  cargo check --release --all-targets --features "${features// /,}" --quiet
fi
say "the package is whole"
