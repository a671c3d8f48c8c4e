#!/usr/bin/env bash
# Looks at the package as crates.io would have it. See --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'USAGE'
usage: scripts/package.sh [--all-targets] [--help]

Packs the crate, unpacks it, and looks with cargo that
  * the package's library passes `cargo check` without default features, and with each
    feature alone;
  * with --all-targets: its examples and benches do too, with all features that need no CUDA
    and with none;
  * a crate which depends on the unpacked package builds, and trains a little. This is the
    verifying build of `cargo publish`, which needs crates.io besides.

The checks are made with the feature doc-only, because C++ would be compiled anew for each set
of features; the crate has all of it. Everything is built in the usual target folder, and the
crate has the features that scripts/test.sh has, so that no dependency is compiled twice. The
package's own C++ takes minutes, but with ccache (as .ci/run has it) seconds. Cargo asks crates.io
for its index.

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
target=${CARGO_TARGET_DIR:-$PWD/target}
version=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"name":"tch-ignite","version":"\([^"]*\)".*/\1/')

say "packing $version"
# The build that `cargo package` would make is the ones below.
cargo package --no-verify --allow-dirty --target-dir "$target" --quiet
package=$target/package/tch-ignite-$version
rm -rf "$package"
tar -xzf "$target/package/tch-ignite-$version.crate" -C "$target/package"
cp Cargo.lock "$package/"
export CARGO_TARGET_DIR=$target

check() { (cd "$package" && cargo check --release --quiet --no-default-features "$@"); }

say "the library without default features"
check --lib --features doc-only
for feature in $features; do
  say "the library with $feature alone"
  check --lib --features "doc-only,$feature"
done
if [ -n "$all_targets" ]; then
  say "examples and benches, without default features and with all"
  check --all-targets --features doc-only
  check --all-targets --features "doc-only,${features// /,}"
fi

say "a crate that depends on it"
crate=$target/package/dependant
rm -rf "$crate"
mkdir -p "$crate/src"
# Cargo chooses features of dependencies for all crates of a build, so this crate has those of our tests: with others,
# torch-sys would be compiled anew.
cat > "$crate/Cargo.toml" <<TOML
[package]
name = "dependant"
version = "0.0.0"
edition = "2024"

[dependencies]
tch-ignite = { path = "../tch-ignite-$version", features = ["distributed", "mlflow"] }
anyhow = "1"

$(sed -n '/^\[dev-dependencies\]/,/^$/p' Cargo.toml)

[workspace]
TOML
cp Cargo.lock "$crate/"
cat > "$crate/src/lib.rs" <<'RUST'
#[test]
fn trains() -> anyhow::Result<()> {
    use tch_ignite::prelude::*;
    use tch_ignite::tch::{Device, Kind, Reduction, Tensor, nn};

    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 3, 1, Default::default());
    let optimizer = Optimizer::adam(&vs).lr(0.1).build()?;
    let x = Tensor::rand([64, 3], (Kind::Float, Device::Cpu));
    let data = Loader::new(&x, &x.sum_dim_intlist(1, true, Kind::Float), 8)?.shuffle(1);
    let mut trainer = create_supervised_trainer();
    trainer.metric("loss", RunningAverage::new().alpha(0.5));
    let mut cx = Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, Reduction::Mean));
    println!("{}", trainer.run(&mut cx, &data, Until::epochs(100))?);
    let loss = trainer.state.metrics.get("loss")?;
    anyhow::ensure!(loss < 0.01, "the loss is {loss}");
    Ok(())
}
RUST
cargo test --release --lib --manifest-path "$crate/Cargo.toml" --quiet

say "the package is whole"
