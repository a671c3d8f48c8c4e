//! Runs a training step that PyTorch compiled, and compares it with the numbers of the JSON beside the package: loss,
//! gradients, and some steps of plain SGD.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::compiled::CompiledModel;
use tch_ignite::optim::Optimizer;

/// The numbers of a JSON file beside a package.
pub struct Expected(Value);

impl Expected {
    /// Reads the file that belongs to a package.
    pub fn beside(package: &Path) -> Result<Self> {
        let file = package.with_extension("json");
        let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
        Ok(Self(serde_json::from_slice(&text)?))
    }

    /// The tensor of a key; `number` is that of an array.
    pub fn tensor(&self, key: &str, number: Option<usize>) -> Result<Tensor> {
        let value = number.map_or(&self.0[key], |number| &self.0[key][number]);
        let shape: Vec<i64> = serde_json::from_value(value["shape"].clone()).context("shape")?;
        let data = value["data"].as_array().context("data")?;
        // Whole numbers are written as such where the tensor's are.
        if data.iter().all(Value::is_i64) && !data.is_empty() {
            let data: Vec<i64> = serde_json::from_value(value["data"].clone())?;
            return Ok(Tensor::from_slice(&data).f_reshape(shape)?);
        }
        let data: Vec<f64> = serde_json::from_value(value["data"].clone())?;
        Ok(Tensor::from_slice(&data).to_kind(Kind::Float).f_reshape(shape)?)
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        self.0[key].as_f64().with_context(|| format!("no number {key}"))
    }

    pub fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        serde_json::from_value(self.0[key].clone()).with_context(|| key.to_owned())
    }

    pub fn names(&self) -> Result<Vec<String>> {
        serde_json::from_value(self.0["names"].clone()).context("names")
    }

    /// Makes a folder as the exporter does, of a package that has no manifest.
    pub fn export(&self, package: &Path, folder: &Path) -> Result<()> {
        std::fs::copy(package, folder.join("train.pt2"))?;
        let (mut parameters, mut weights) = (vec![], vec![]);
        for (number, name) in self.names()?.into_iter().enumerate() {
            let tensor = self.tensor("params", Some(number))?;
            parameters.push(json!({
                "name": name, "shape": tensor.size(), "dtype": "float32", "gradient": "given",
            }));
            weights.push((name, tensor));
        }
        Tensor::write_safetensors(&weights, folder.join("model.safetensors"))?;
        let batch = |key: &str, dtype: &str| -> Result<(Value, i64)> {
            let shape = self.tensor(key, None)?.size();
            let mut described = json!(shape);
            described[0] = Value::Null;
            Ok((json!([{"name": key, "shape": described, "dtype": dtype}]), shape[0]))
        };
        let bytes = std::fs::read(package)?;
        let ((x, size), (y, _)) = (batch("x", "float32")?, batch("y", "int64")?);
        let manifest = json!({
            "format": 1, "torch": "2.13.0", "device": "cpu", "machine": "x86_64", "instructions": [],
            "inputs": x, "targets": y, "parameters": parameters, "buffers": [], "tied": {},
            "outputs": [], "train_outputs": false,
            "programs": [{
                "mode": "train", "file": "train.pt2", "batch": [size, size],
                "length": bytes.len(), "crc32": crc32fast::hash(&bytes),
            }],
        });
        Ok(std::fs::write(folder.join("manifest.json"), manifest.to_string())?)
    }
}

fn close(what: &str, ours: &Tensor, expected: &Tensor) -> Result<()> {
    ensure!(ours.size() == expected.size(), "{what} has shape {:?}", ours.size());
    let difference = (ours - expected).abs().max().double_value(&[]);
    ensure!(difference <= 1e-6, "{what} is {difference:e} away");
    Ok(())
}

/// Compares one package with the file beside it.
pub fn compare(package: &Path) -> Result<()> {
    let expected = Expected::beside(package)?;
    let folder = tempfile::tempdir()?;
    expected.export(package, folder.path())?;
    let vs = VarStore::new(Device::Cpu);
    let net = CompiledModel::load(folder.path(), &vs.root())?;
    let optimizer = Optimizer::sgd(&vs).lr(expected.number("sgd_lr")?).build()?;
    let (x, y) = (expected.tensor("x", None)?, expected.tensor("y", None)?);
    let variables = vs.variables();
    for (step, expected_loss) in expected.numbers("losses")?.into_iter().enumerate() {
        let loss = net.step(&[&x, &y])?.loss;
        optimizer.zero_grad()?;
        loss.f_backward()?;
        let loss = loss.double_value(&[]);
        ensure!((loss - expected_loss).abs() <= 1e-6, "loss {step} is {loss}, not {expected_loss}");
        if step == 0 {
            for (number, name) in expected.names()?.iter().enumerate() {
                let variable = variables.get(name).context("variable")?;
                close(name, &variable.grad(), &expected.tensor("grads", Some(number))?)?;
            }
        }
        optimizer.step()?;
    }
    for (number, name) in expected.names()?.iter().enumerate() {
        let variable = variables.get(name).context("variable")?;
        close(name, &variable.detach(), &expected.tensor("final", Some(number))?)?;
    }
    Ok(())
}
