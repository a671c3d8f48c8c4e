//! The data set that `examples/mnist1d` makes is that of the package `mnist1d`, sample by sample.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde::Deserialize;
use tch::{Kind, Tensor};

use super::common;

#[path = "../../examples/mnist1d/data.rs"]
mod data;

/// Prints the data set of the package with this many samples and this seed. `tests/golden/mnist1d.json` is what it prints
/// for 10 and 42.
const PACKAGE: &str = r#"
import json, sys
from mnist1d.data import get_dataset_args, make_dataset
args = get_dataset_args()
args.num_samples, args.seed = map(int, sys.argv[1:])
data = make_dataset(args)
print(json.dumps({name: data[name].tolist() for name in ("x", "y", "x_test", "y_test")}))
"#;

#[derive(Deserialize)]
struct Package {
    x: Vec<Vec<f64>>,
    y: Vec<i64>,
    x_test: Vec<Vec<f64>>,
    y_test: Vec<i64>,
}

fn compare(samples: usize, seed: u32, text: &str) -> Result<()> {
    let theirs: Package = serde_json::from_str(text)?;
    let ours = data::Mnist1d::new(samples, seed);
    ensure!(theirs.x.len() + theirs.x_test.len() == samples, "{} samples", theirs.x.len());
    for ((x, y), rows, digits) in
        [(ours.train, theirs.x, theirs.y), (ours.test, theirs.x_test, theirs.y_test)]
    {
        ensure!(Vec::<i64>::try_from(y)? == digits);
        let rows = Tensor::from_slice2(&rows);
        ensure!(x.size() == rows.size() && x.kind() == Kind::Double, "{x:?}");
        let apart = (x - rows).abs().max().double_value(&[]);
        ensure!(apart < 1e-12, "samples of seed {seed} are {apart} apart");
    }
    Ok(())
}

#[test]
fn ten_samples_are_those_of_the_package() -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mnist1d.json");
    compare(10, 42, &std::fs::read_to_string(golden)?)
}

#[test]
fn all_samples_are_those_of_the_package() -> Result<()> {
    let Ok(python) = common::find_python("TORCH_PYTHON", "mnist1d") else {
        // CI has ten samples to compare with, and does not install the package, so the line does not name Python.
        common::skipped("no package mnist1d: ten of its 5,000 samples are compared");
        return Ok(());
    };
    for (samples, seed) in [(5000, 42), (5000, 7), (130, 0)] {
        let arguments = ["-c", PACKAGE, &samples.to_string(), &seed.to_string()];
        let output = Command::new(&python).args(arguments).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "Python: {errors}");
        compare(samples, seed, &String::from_utf8(output.stdout)?)?;
    }
    Ok(())
}
