//! Files that PyTorch writes, beside what is in them as JSON; the format is that of tests/golden/interop/README.md.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value as Json};
use tch::{Device, Tensor, kind, nn};
use tch_ignite::optim::{Optimizer, OptimizerBuilder, lr};
use tch_ignite::pytorch::{self, DType, StoredTensor, Value, Weights};
use tch_ignite::schedule::{OneCycleLR, Schedule};

/// Paths, and what was different there.
pub type Cases = Vec<(String, Result<(), String>)>;

/// How long reading a hostile file may take, and how much memory.
const MAX_TIME: Duration = Duration::from_secs(5);
const MAX_MEMORY: u64 = 64 << 20;
/// The file that the first hostile ones would make.
const PWNED: &str = "pwned";

/// Compares each path of a file with what the JSON beside it says, both ways.
pub fn tensors(file: &Path) -> Result<Cases> {
    let text = fs::read_to_string(file.with_extension("json"))?;
    let expected: Map<String, Json> = serde_json::from_str(&text)?;
    let value = pytorch::read(file)?;
    let mut found: BTreeMap<String, &Value> = BTreeMap::new();
    value.walk(&mut |path, value| {
        // Attributes of objects are no paths of the JSON.
        found.insert(path.to_owned(), value);
    });
    let mut results = vec![];
    for (path, expected) in &expected {
        let result = match found.remove(path) {
            Some(value) => compare(value, expected).map_err(|error| format!("{error:#}")),
            None => Err("the path was not found".into()),
        };
        results.push((path.clone(), result));
    }
    for (path, value) in found {
        let inside = |outer: &str| path.starts_with(&format!("{outer}/"));
        let in_other =
            expected.iter().any(|(outer, json)| json.get("other").is_some() && inside(outer));
        if !in_other {
            results.push((
                path,
                Err(format!("there is a {} that was not expected", value.type_name())),
            ));
        }
    }
    Ok(results)
}

/// Reads a file that must be refused or be plain data, without harm.
pub fn hostile(file: &Path) -> Result<()> {
    let (begin, before, pwned) = (Instant::now(), memory(), Path::new(PWNED).exists());
    let outcome = match pytorch::read(file) {
        Ok(value) => {
            // What can be read can be walked over, and its tensors have no more elements than the file has bytes.
            let mut tensors = vec![];
            value.walk(&mut |_, value| tensors.extend(value.as_tensor()));
            tensors.iter().filter_map(|tensor| tensor.tensor().err()).count();
            format!("read: {}", value.to_string().chars().take(60).collect::<String>())
        }
        Err(error) => format!("refused: {error}"),
    };
    println!("{}: {outcome}", file.file_name().unwrap_or_default().to_string_lossy());
    ensure!(pwned || !Path::new(PWNED).exists(), "the file made the file '{PWNED}'");
    ensure!(begin.elapsed() < MAX_TIME, "it took {:?}", begin.elapsed());
    if let (Some(before), Some(after)) = (before, memory()) {
        ensure!(after.saturating_sub(before) < MAX_MEMORY, "it took {} bytes", after - before);
    }
    Ok(())
}

/// The most memory that this process has had in bytes, where the system tells.
fn memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The most by which losses and weights of a run that goes on may differ from Python's uninterrupted one.
const MAX_DIFFERENCE: f64 = 1e-12;

/// Goes on with a run that Python saved, and compares losses, weights and random numbers with Python's; `None` where
/// there is no such optimizer here. Learning rates are set to what the JSON says.
pub fn handover(file: &Path) -> Result<Option<Cases>> {
    let text = fs::read_to_string(file.with_extension("json"))?;
    let json: Json = serde_json::from_str(&text)?;
    let mut vs = nn::VarStore::new(Device::Cpu);
    let base = nn::linear(vs.root() / "base", 3, 5, Default::default());
    let fc = nn::linear(vs.root() / "fc", 5, 2, Default::default());
    vs.double();
    let mut optimizer = match json["optimizer"].as_str() {
        Some("sgd") => two_groups(Optimizer::sgd(&vs))?,
        Some("adam") => two_groups(Optimizer::adam(&vs))?,
        Some("adamw") => two_groups(Optimizer::adamw(&vs))?,
        Some("rmsprop") => two_groups(Optimizer::rms_prop(&vs))?,
        Some("adagrad") => two_groups(Optimizer::adagrad(&vs))?,
        Some("nadam") => two_groups(Optimizer::nadam(&vs))?,
        _ => return Ok(None),
    };

    let saved = pytorch::read(file)?;
    let weights = Weights::of(saved.require("model")?)?;
    weights.load(&vs)?;
    pytorch::load_optimizer(&mut optimizer, saved.require("optimizer")?, &weights.names())?;
    pytorch::set_rng_state(saved.require("rng")?)?;
    let random: Vec<f64> = Tensor::rand([4], kind::DOUBLE_CPU).try_into()?;
    let expected: Vec<f64> = serde_json::from_value(json["next_random"].clone())?;
    let same = |same: bool, what: String| if same { Ok(()) } else { Err(what) };
    let mut results = vec![(
        "/next_random".into(),
        same(random == expected, format!("{random:?} instead of {expected:?}")),
    )];

    let (batches, losses) = (json["batches"].as_array(), json["losses"].as_array());
    let (batches, losses) = (batches.context("batches")?, losses.context("losses")?);
    let begin = saved.require("iteration")?.as_i64().context("an iteration")? as usize;
    let mut worst = 0f64;
    for (index, batch) in batches.iter().enumerate().skip(begin) {
        let rates: Vec<f64> = serde_json::from_value(json["lrs"][index].clone())?;
        optimizer.groups()?.iter().zip(rates).try_for_each(|(group, rate)| group.set_lr(rate))?;
        // The JSON has no momenta; those of Python's OneCycleLR are cycled too.
        if let (Some("onecycle"), Ok(knob)) = (json["scheduler"].as_str(), optimizer.knob("beta1"))
        {
            let cycle = OneCycleLR::new(0.05, batches.len() as u64).momentum(0.85, 0.95);
            knob.set(cycle.at(index as u64))?;
        }
        let x: Vec<Vec<f64>> = serde_json::from_value(batch["x"].clone())?;
        let y: Vec<i64> = serde_json::from_value(batch["y"].clone())?;
        let x = Tensor::from_slice2(&x);
        // tch's `cross_entropy_for_logits` goes through float32.
        let (y, mean) = (Tensor::from_slice(&y), tch::Reduction::Mean);
        let logits = x.apply(&base).tanh().apply(&fc);
        let loss = logits.cross_entropy_loss::<Tensor>(&y, None, mean, -100, 0.);
        worst =
            worst.max((f64::try_from(&loss)? - losses[index].as_f64().context("a loss")?).abs());
        optimizer.backward_step(&loss)?;
    }
    results.push((
        "/losses".into(),
        same(worst <= MAX_DIFFERENCE, format!("they differ by {worst:e}")),
    ));
    for (name, variable) in vs.variables() {
        let expected: Vec<f64> = serde_json::from_value(json["final"][&name]["data"].clone())?;
        let values: Vec<f64> = variable.detach().flatten(0, -1).try_into()?;
        let worst = values.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        let fits = values.len() == expected.len() && worst <= MAX_DIFFERENCE;
        results.push((format!("/final/{name}"), same(fits, format!("it differs by {worst:e}"))));
    }
    Ok(Some(results))
}

fn two_groups<T: nn::OptimizerConfig>(
    builder: OptimizerBuilder<'_, T>,
) -> tch_ignite::Result<Optimizer> {
    builder
        .group("base", |name| name.starts_with("base"), lr(0.1))
        .group("fc", |name| name.starts_with("fc"), lr(0.1))
        .build()
}

fn compare(value: &Value, expected: &Json) -> Result<()> {
    let expected = expected.as_object().context("the JSON is no object")?;
    let length = |count: &Json, there: Option<usize>, what: &str| {
        ensure!(
            there.map(|there| there as u64) == count.as_u64(),
            "{there:?} {what} instead of {count}"
        );
        Ok(())
    };
    match (value, expected.iter().next().context("the JSON is empty")?) {
        (Value::Tensor(tensor), (key, _)) if key != "other" => compare_tensor(tensor, expected),
        (Value::Dict(dict), (key, keys)) if key == "dict" => {
            let there: Vec<_> = dict.iter().map(|(key, _)| plain(key)).collect();
            let keys = keys.as_array().context("keys are a list")?;
            let keys: Vec<_> =
                keys.iter().map(|k| k.as_str().map_or(k.to_string(), str::to_owned)).collect();
            ensure!(there == keys, "keys {there:?} instead of {keys:?}");
            Ok(())
        }
        (Value::List(values), (key, count)) if key == "list" => {
            length(count, Some(values.len()), "values in the list")
        }
        (Value::Tuple(values), (key, count)) if key == "tuple" => {
            length(count, Some(values.len()), "values in the tuple")
        }
        (Value::BigInt(int), (key, text)) if key == "int" => {
            ensure!(text.as_str() == Some(&int.to_string()), "{int} instead of {text}");
            Ok(())
        }
        (Value::Int(int), (key, text)) if key == "int" => {
            ensure!(text.as_str() == Some(&int.to_string()), "{int} instead of {text}");
            Ok(())
        }
        (value, (key, json)) if key == "value" => compare_plain(value, json),
        (value, (key, text)) if key == "other" => {
            let (there, text) = (value.to_string(), text.as_str().unwrap_or_default());
            let as_repr = matches!(value, Value::Device(name) if text == device(name));
            let same_set = matches!(value, Value::Set(_)) && sorted(&there) == sorted(text);
            ensure!(there == text || as_repr || same_set, "{there} instead of {text}");
            Ok(())
        }
        (value, (key, json)) => bail!("a {} instead of {{{key:?}: {json}}}", value.type_name()),
    }
}

/// A device as Python's `repr` has it.
fn device(name: &str) -> String {
    match name.split_once(':') {
        Some((kind, index)) => format!("device(type='{kind}', index={index})"),
        None => format!("device(type='{name}')"),
    }
}

/// Sets have no order.
fn sorted(text: &str) -> Vec<&str> {
    let mut parts: Vec<_> = text.trim_matches(['{', '}']).split(", ").collect();
    parts.sort_unstable();
    parts
}

fn plain(key: &Value) -> String {
    key.as_str().map_or_else(|| key.to_string(), str::to_owned)
}

fn compare_plain(value: &Value, json: &Json) -> Result<()> {
    let same = match (value, json) {
        (Value::None, Json::Null) => true,
        (Value::Bool(bool), Json::Bool(expected)) => bool == expected,
        (Value::Int(int), json) => json.as_i64() == Some(*int),
        (Value::Float(float), json) => is_float(*float, json),
        (Value::Str(text), Json::String(expected)) => **text == **expected,
        _ => false,
    };
    ensure!(same, "{value} instead of {json}");
    Ok(())
}

fn is_float(float: f64, json: &Json) -> bool {
    match json.as_str() {
        Some("NaN") => float.is_nan(),
        Some("Infinity") => float == f64::INFINITY,
        Some("-Infinity") => float == f64::NEG_INFINITY,
        Some(_) => false,
        None => json.as_f64() == Some(float),
    }
}

fn compare_tensor(tensor: &StoredTensor, expected: &Map<String, Json>) -> Result<()> {
    let field = |name: &str| expected.get(name).with_context(|| format!("the JSON has no {name}"));
    let dtype = tensor.dtype().name().trim_start_matches("torch.");
    ensure!(field("dtype")?.as_str() == Some(dtype), "type {dtype} instead of {}", field("dtype")?);
    let shape = serde_json::to_value(tensor.size())?;
    ensure!(*field("shape")? == shape, "shape {shape} instead of {}", field("shape")?);
    if let Some(requires_grad) = expected.get("requires_grad") {
        let there = tensor.requires_grad();
        ensure!(requires_grad.as_bool() == Some(there), "requires_grad {there}");
    }
    let data = field("data")?.as_array().context("data is a list")?;
    ensure!(data.len() as i64 == tensor.numel(), "{} elements", tensor.numel());
    let bytes = tensor.to_bytes()?;
    let size = tensor.dtype().size() as usize;
    for (index, (element, expected)) in bytes.chunks_exact(size).zip(data).enumerate() {
        let same = is_element(tensor.dtype(), element, expected)?;
        ensure!(same, "element {index} is {element:?} in bytes instead of {expected}");
    }
    if tensor.dtype().kind().is_some() {
        // The tensor that libtorch sees has the same elements, and its strides are kept.
        let seen = tensor.tensor()?;
        ensure!(seen.stride() == tensor.stride(), "strides {:?}", seen.stride());
        ensure!(seen.size() == tensor.size() && seen.requires_grad() == tensor.requires_grad());
        let again = Value::tensor(&seen.contiguous())?;
        let again = again.as_tensor().map(StoredTensor::to_bytes).transpose()?;
        ensure!(again == Some(bytes), "the tensor has other elements than the file");
    }
    Ok(())
}

fn is_element(dtype: DType, bytes: &[u8], expected: &Json) -> Result<bool> {
    fn number<const N: usize>(bytes: &[u8]) -> Result<[u8; N]> {
        Ok(bytes.try_into()?)
    }
    let pair = |float: fn(&[u8]) -> Result<f64>| -> Result<bool> {
        let (real, imaginary) = bytes.split_at(bytes.len() / 2);
        Ok(is_float(float(real)?, &expected[0]) && is_float(float(imaginary)?, &expected[1]))
    };
    let float32 = |bytes: &[u8]| Ok(f32::from_le_bytes(number(bytes)?).into());
    let float64 = |bytes: &[u8]| Ok(f64::from_le_bytes(number(bytes)?));
    let float16 = |bytes: &[u8]| Ok(half(u16::from_le_bytes(number(bytes)?)));
    let int = |int: i64| Ok(expected.as_i64() == Some(int));
    match dtype {
        DType::Float64 => Ok(is_float(float64(bytes)?, expected)),
        DType::Float32 => Ok(is_float(float32(bytes)?, expected)),
        DType::Float16 => Ok(is_float(float16(bytes)?, expected)),
        DType::BFloat16 => Ok(is_float(float32(&[&[0, 0], bytes].concat())?, expected)),
        DType::Complex128 => pair(float64),
        DType::Complex64 => pair(float32),
        DType::Complex32 => pair(float16),
        DType::Int64 => int(i64::from_le_bytes(number(bytes)?)),
        DType::Int32 => int(i32::from_le_bytes(number(bytes)?).into()),
        DType::Int16 => int(i16::from_le_bytes(number(bytes)?).into()),
        DType::Int8 => int(i8::from_le_bytes(number(bytes)?).into()),
        DType::UInt64 => Ok(expected.as_u64() == Some(u64::from_le_bytes(number(bytes)?))),
        DType::UInt32 => int(u32::from_le_bytes(number(bytes)?).into()),
        DType::UInt16 => int(u16::from_le_bytes(number(bytes)?).into()),
        DType::UInt8 => int(bytes[0].into()),
        DType::Bool => {
            Ok(expected.as_bool() == Some(bytes[0] != 0)
                || expected.as_u64() == Some(bytes[0].into()))
        }
        other => bail!("elements of {other} cannot be compared"),
    }
}

/// A float16 as a float64.
fn half(bits: u16) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => mantissa * 2f64.powi(-24),
        31 if mantissa == 0. => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024. + mantissa) * 2f64.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}
