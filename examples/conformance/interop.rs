//! Reads files that PyTorch wrote and compares them with JSON files that say what is in them.
//! tests/golden/interop/README.md describes the format.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value as Json};
use tch::{Device, Kind, Tensor, kind, nn};
use tch_ignite::engine::{Trainer, Until};
use tch_ignite::optim::{Optimizer, OptimizerBuilder, lr};
use tch_ignite::pytorch::{self, DType, Layout, Names, StoredTensor, TrainingFile, Value};
use tch_ignite::schedule::{
    AnySchedule, CosineAnnealing, OneCycleLR, ParamScheduler, ReduceLROnPlateauScheduler, Schedule,
};

/// The path of each value, with the difference found there, if any.
pub type Cases = Vec<(String, Result<(), String>)>;

/// How long reading a hostile file may take, and (below) how many bytes of memory.
const MAX_TIME: Duration = Duration::from_secs(5);
const MAX_MEMORY: u64 = 64 << 20;
/// Some hostile files try to make a file of this name.
const PWNED: &str = "pwned";

/// Compares the value at each path of a file with the JSON beside it. A path that only one of the two has is a
/// difference.
pub fn tensors(file: &Path) -> Result<Cases> {
    let text = fs::read_to_string(file.with_extension("json"))?;
    let expected: Map<String, Json> = serde_json::from_str(&text)?;
    let value = pytorch::read(file)?;
    let mut found: BTreeMap<String, &Value> = BTreeMap::new();
    value.walk(&mut |path, value| {
        // `walk` does not visit attributes of dicts, and the JSON has no paths for them either.
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

/// Reads a hostile file. The reader must refuse it or find plain data in it, and must take little time and memory and
/// write no file.
pub fn hostile(file: &Path) -> Result<()> {
    let (begin, before, pwned) = (Instant::now(), memory(), Path::new(PWNED).exists());
    let outcome = match pytorch::read(file) {
        Ok(value) => {
            // If the file can be read, walking over the value and reading its tensors must do no harm either.
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

/// The most memory that this process has had so far, in bytes; `None` where the system does not tell.
fn memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The most by which losses and weights may differ between a run that Python began and we finish, and Python's
/// uninterrupted run.
const MAX_DIFFERENCE: f64 = 1e-12;

/// Goes on with a run that Python saved, and compares losses, learning rates, weights and random numbers with Python's;
/// `None` where there is no such optimizer here. The schedule is what the file says.
pub fn handover(file: &Path) -> Result<Option<Cases>> {
    let text = fs::read_to_string(file.with_extension("json"))?;
    let json: Json = serde_json::from_str(&text)?;
    if json.get("losses_and_lrs").is_some() {
        return with_engine(file, &json).map(Some);
    }
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

    let saved = TrainingFile::read(file)?;
    ensure!(saved.others().is_empty(), "without a place: {:?}", saved.others());
    let weights = saved.weights()?;
    weights.load(&vs)?;
    pytorch::load_optimizer(&mut optimizer, saved.optimizer()?, &weights.names())?;
    pytorch::set_rng_state(saved.rng().context("random numbers")?)?;
    let random: Vec<f64> = Tensor::rand([4], kind::DOUBLE_CPU).try_into()?;
    let expected: Vec<f64> = serde_json::from_value(json["next_random"].clone())?;
    let mut results = vec![(
        "/next_random".into(),
        same(random == expected, format!("{random:?} instead of {expected:?}")),
    )];

    let (batches, losses) = (json["batches"].as_array(), json["losses"].as_array());
    let (batches, losses) = (batches.context("batches")?, losses.context("losses")?);
    let begin = saved.iteration().context("an iteration")? as usize;
    let mut schedulers = schedulers(&saved, &optimizer)?;
    let (mut worst, mut worst_rate) = (0f64, 0f64);
    for (index, batch) in batches.iter().enumerate().skip(begin) {
        let rates: Vec<f64> = serde_json::from_value(json["lrs"][index].clone())?;
        if let Schedulers::Schedules(schedulers) = &mut schedulers {
            schedulers.iter_mut().try_for_each(|scheduler| scheduler.advance().map(drop))?;
        }
        for (group, rate) in optimizer.groups()?.iter().zip(rates) {
            worst_rate = worst_rate.max((group.lr()? - rate).abs());
        }
        // The JSON has no momenta; those of Python's OneCycleLR are cycled too.
        if let (Some("onecycle"), Ok(knob)) = (json["scheduler"].as_str(), optimizer.knob("beta1"))
        {
            let cycle = OneCycleLR::new(0.05, batches.len() as u64).momentum(0.85, 0.95);
            knob.set(cycle.at(index as u64))?;
        }
        let x: Vec<Vec<f64>> = serde_json::from_value(batch["x"].clone())?;
        let y: Vec<i64> = serde_json::from_value(batch["y"].clone())?;
        let x = Tensor::from_slice2(&x);
        // tch's `cross_entropy_for_logits` rounds to float32, so the loss is computed here.
        let (y, mean) = (Tensor::from_slice(&y), tch::Reduction::Mean);
        let logits = x.apply(&base).tanh().apply(&fc);
        let loss = logits.cross_entropy_loss::<Tensor>(&y, None, mean, -100, 0.);
        worst =
            worst.max((f64::try_from(&loss)? - losses[index].as_f64().context("a loss")?).abs());
        optimizer.backward_step(&loss)?;
        if let Schedulers::Plateau(plateau) = &mut schedulers {
            plateau.advance(f64::try_from(&loss)?)?;
        }
    }
    results.push(("/losses".into(), small(worst)));
    results.push(("/lrs".into(), small(worst_rate)));
    results.extend(weights_like(&vs, &json["final"])?);
    Ok(Some(results))
}

fn same(same: bool, what: String) -> Result<(), String> {
    if same { Ok(()) } else { Err(what) }
}

fn small(difference: f64) -> Result<(), String> {
    same(difference <= MAX_DIFFERENCE, format!("they differ by {difference:e}"))
}

fn weights_like(vs: &nn::VarStore, json: &Json) -> Result<Cases> {
    let mut results = vec![];
    for (name, variable) in vs.variables() {
        let expected: Vec<f64> = serde_json::from_value(json[&name]["data"].clone())?;
        let values: Vec<f64> = variable.detach().flatten(0, -1).try_into()?;
        let worst = values.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        let fits = values.len() == expected.len() && worst <= MAX_DIFFERENCE;
        results.push((format!("/final/{name}"), same(fits, format!("it differs by {worst:e}"))));
    }
    Ok(results)
}

/// The schedulers that write the learning rates.
enum Schedulers {
    Schedules(Vec<ParamScheduler<AnySchedule>>),
    Plateau(Box<ReduceLROnPlateauScheduler>),
}

/// The file's scheduler, where it was.
fn schedulers(saved: &TrainingFile, optimizer: &Optimizer) -> Result<Schedulers> {
    let (state, of_optimizer) = (saved.scheduler()?, saved.optimizer()?);
    if state.get("num_bad_epochs").is_some() {
        let lr = optimizer.knob("lr")?;
        let mut plateau =
            ReduceLROnPlateauScheduler::min("lr", lr, "loss")?.factor(0.5).patience(2);
        pytorch::load_plateau(&mut plateau, state)?;
        return Ok(Schedulers::Plateau(Box::new(plateau)));
    }
    let mut schedulers = vec![];
    for (index, group) in optimizer.groups()?.iter().enumerate() {
        let schedule = pytorch::schedule(state, of_optimizer, index)?;
        let mut scheduler = ParamScheduler::new(group.name(), group.knob("lr")?, schedule);
        pytorch::load_scheduler(&mut scheduler, state, of_optimizer)?;
        schedulers.push(scheduler);
    }
    Ok(Schedulers::Schedules(schedulers))
}

/// Goes on with a trainer of ignite or Lightning that Python saved: Linear 2-1, the mean square of its output as loss.
fn with_engine(file: &Path, json: &Json) -> Result<Cases> {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 2, 1, Default::default());
    vs.double();
    let saved = TrainingFile::read(file)?;
    let weights = saved.weights()?.rename(&Names::new().strip_prefix("net."))?;
    weights.load(&vs)?;
    let is_adam = saved.optimizer()?.require("param_groups")?.require("0")?.get("betas").is_some();
    let mut optimizer = match is_adam {
        true => Optimizer::adam(&vs).build()?,
        false => Optimizer::builder(nn::sgd(0.5, 0., 0., false), &vs).build()?,
    };
    pytorch::load_optimizer(&mut optimizer, saved.optimizer()?, &weights.names())?;
    let lr = optimizer.knob("lr")?;
    let schedule = match saved.layout() {
        Layout::Ignite => CosineAnnealing::new(0.1, 0.001, 10).into(),
        _ => pytorch::schedule(saved.scheduler()?, saved.optimizer()?, 0)?,
    };
    let mut scheduler = ParamScheduler::new("lr", lr.clone(), schedule);
    pytorch::load_scheduler(&mut scheduler, saved.scheduler()?, saved.optimizer()?)?;

    let data: Vec<Vec<Vec<f64>>> = serde_json::from_value(json["data"].clone())?;
    let data: Vec<Tensor> = data.iter().map(|batch| Tensor::from_slice2(batch)).collect();
    let mut trainer =
        Trainer::new(|losses: &mut BTreeMap<u64, (f64, f64)>, engine, batch: usize| {
            let loss = data[batch].apply(&net).square().mean(Kind::Double);
            optimizer.backward_step(&loss)?;
            losses.insert(engine.state.iteration, (f64::try_from(loss)?, lr.get()?));
            Ok(())
        });
    saved.load_position(&mut trainer)?;
    trainer.attach(scheduler);
    let mut losses = BTreeMap::new();
    trainer.run(&mut losses, (0..data.len()).collect::<Vec<_>>(), Until::epochs(4))?;
    drop(trainer);

    let expected: BTreeMap<u64, (f64, f64)> =
        serde_json::from_value(json["losses_and_lrs"].clone())?;
    let begin = saved.iteration().context("an iteration")?;
    let expected: BTreeMap<_, _> = expected.into_iter().filter(|(at, _)| *at > begin).collect();
    let iterations: Vec<_> = losses.keys().collect();
    let mut results = vec![(
        "/iterations".into(),
        same(losses.keys().eq(expected.keys()), format!("they are {iterations:?}")),
    )];
    let pairs = losses.values().zip(expected.values());
    let worst = pairs.map(|(a, b)| (a.0 - b.0).abs().max((a.1 - b.1).abs())).fold(0., f64::max);
    results.push(("/losses_and_lrs".into(), small(worst)));
    results.extend(weights_like(&vs, &json["final"])?);
    Ok(results)
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

/// The name of a device as Python's `repr` writes it.
fn device(name: &str) -> String {
    match name.split_once(':') {
        Some((kind, index)) => format!("device(type='{kind}', index={index})"),
        None => format!("device(type='{name}')"),
    }
}

/// The parts of a set's text in sorted order, because sets have no order of their own.
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

/// Converts the bits of a float16 to a float64.
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
