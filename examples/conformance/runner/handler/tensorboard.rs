//! Runs cases of the handlers that write to loggers, which say tags, values and steps.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_ignite::engine::{Engine, Event, Events, Until};
use tch_ignite::loggers::{
    GradsScalarHandler, Logger, OptimizerParamsHandler, OutputHandler, WeightsScalarHandler,
};
use tch_ignite::optim::Knob;

use super::super::Outcome;
use super::super::json::{array, count, events, float, floats, text};
use super::super::optimizer::{optimizer, store};

/// The largest relative difference. Norms are sums, whose order is not fixed.
const TOLERANCE: f64 = 1e-12;
/// D9 of docs/DIFFERENCES.md: values that have no order of their own are logged in the order of their names.
const ORDER: &str =
    "metric_names=\"all\" are in the order of their first values, not of their names";

type Call = (String, f64, u64);

#[derive(Clone, Default)]
struct Recorder(Rc<RefCell<Vec<Call>>>);

impl Logger for Recorder {
    fn scalar(&self, tag: &str, value: f64, step: u64) -> tch_ignite::Result<()> {
        self.0.borrow_mut().push((tag.to_owned(), value, step));
        Ok(())
    }
}

type Trainer<'a> = Engine<'a, (), (), Value>;

/// Lists the numbers in a value with the names that they are logged under: `name/part` for the parts of a nested value.
/// Texts are left out, because nothing logs them.
fn numbers(name: &str, value: &Value) -> Vec<(String, f64)> {
    let within = |part: String, value: &Value| match name {
        "" => numbers(&part, value),
        _ => numbers(&format!("{name}/{part}"), value),
    };
    match value {
        Value::Object(parts) => {
            parts.iter().flat_map(|(part, value)| within(part.clone(), value)).collect()
        }
        Value::Array(parts) => {
            let parts = parts.iter().enumerate();
            parts.flat_map(|(part, value)| within(part.to_string(), value)).collect()
        }
        number => float(number).into_iter().map(|number| (name.to_owned(), number)).collect(),
    }
}

/// Makes the handler of a case that logs metrics, outputs and attributes of the state.
fn outputs(
    config: &Value,
    log: &Recorder,
    tag: &str,
    events: Events,
) -> Result<OutputHandler<(), Value>> {
    let mut handler = OutputHandler::new(log, tag, events);
    handler = match &config["metric_names"] {
        Value::String(_) => handler.all_metrics(),
        Value::Null => handler,
        names => {
            for name in array(names)? {
                let name = text(name)?;
                // The parts of a metric are metrics of their own here.
                let parts = match &config["metrics"][name] {
                    Value::Null => vec![(name.to_owned(), 0.)],
                    value => numbers(name, value),
                };
                handler =
                    parts.into_iter().fold(handler, |handler, (name, _)| handler.metric(name));
            }
            handler
        }
    };
    let output = &config["output"];
    for (name, value) in numbers(if output.is_object() { "" } else { "output" }, output) {
        handler = handler.output(name, move |_| value);
    }
    for name in config["state_attributes"].as_array().into_iter().flatten() {
        handler = handler.knob(text(name)?, Knob::new("alpha", || 0.25, |_| {}));
    }
    Ok(match count(&config["global_step"])? {
        Some(step) => handler.global_step(move |_| step),
        None => handler,
    })
}

/// One linear layer, with a gradient of half the weight and none of the bias.
fn layer(config: &Value) -> Result<VarStore> {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let fc = vs.root() / "fc";
    let rows = array(&config["weight"])?.iter().map(floats).collect::<Result<Vec<_>>>()?;
    let columns = rows.first().context("a weight")?.len() as i64;
    let weight = Tensor::from_slice(&rows.concat()).view([rows.len() as i64, columns]);
    let weight = fc.var_copy("weight", &weight);
    let _bias = fc.var_copy("bias", &Tensor::from_slice(&floats(&config["bias"])?));
    (&weight * &weight * 0.25).sum(Kind::Double).backward();
    Ok(vs)
}

/// Whether a name begins with one of the case's prefixes; all names do if the case has none.
fn whitelist(config: &Value) -> Result<impl Fn(&str) -> bool + use<>> {
    let prefixes = match &config["whitelist"] {
        Value::Null => vec![String::new()],
        list => {
            array(list)?.iter().map(|name| Ok(text(name)?.to_owned())).collect::<Result<_>>()?
        }
    };
    Ok(move |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix)))
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let log = Recorder::default();
    let output = config["output"].clone();
    let mut engine: Trainer = Engine::new(move |_, _, _| Ok(output.clone()));
    let metrics = config["metrics"].as_object().cloned().unwrap_or_default();
    engine.on(Event::Started, move |_, engine| {
        for (name, value) in metrics.iter().flat_map(|(name, value)| numbers(name, value)) {
            engine.state.metrics.set(&name, value);
        }
        Ok(())
    });
    let tag = config["tag"].as_str().unwrap_or_default();
    let events = events(&config["event"])?;
    match text(&config["what"])? {
        "output" => engine.attach(outputs(config, &log, tag, events)?),
        "opt" => {
            let groups: Vec<_> =
                array(&config["lrs"])?.iter().map(|lr| json!({"lr": lr})).collect();
            let spec = json!({"type": "SGD", "groups": groups});
            let vs = store(&spec)?;
            engine.attach(OptimizerParamsHandler::new(&log, tag, &optimizer(&spec, &vs)?, events))
        }
        "weights" => {
            let handler = WeightsScalarHandler::new(&log, tag, &layer(config)?, events);
            engine.attach(handler.whitelist(whitelist(config)?))
        }
        "grads" => {
            let handler = GradsScalarHandler::new(&log, tag, &layer(config)?, events);
            engine.attach(handler.whitelist(whitelist(config)?))
        }
        other => bail!("nothing logs {other}"),
    };
    let (length, epochs) = (count(&config["epoch_length"])?, count(&config["max_epochs"])?);
    let (length, epochs) = length.zip(epochs).context("a run with a length is expected")?;
    engine.run(&mut (), vec![(); length as usize], Until::epochs(epochs))?;

    let mut ours = log.0.take();
    let mut theirs = array(&expect["calls"])?.iter().map(call).collect::<Result<Vec<_>>>()?;
    if config["metric_names"] == "all" {
        *defect = Some(ORDER);
    }
    // JSON objects here are sorted by name, so the calls are compared in that order.
    let has_objects = config["output"].is_object() || config["metrics"].is_object();
    if config["metric_names"] == "all" || has_objects {
        for calls in [&mut ours, &mut theirs] {
            calls.sort_by(|a, b| (a.2, &a.0).cmp(&(b.2, &b.0)));
        }
    }
    Ok(same(&ours, &theirs).into())
}

fn call(value: &Value) -> Result<Call> {
    let step = value[2].as_u64().context("a step")?;
    Ok((text(&value[0])?.to_owned(), float(&value[1])?, step))
}

fn same(ours: &[Call], theirs: &[Call]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{} calls instead of {}: {ours:?}", ours.len(), theirs.len()));
    }
    let near = |a: f64, b: f64| match b.is_finite() {
        true => (a - b).abs() <= TOLERANCE * b.abs(),
        false => a == b || a.is_nan() && b.is_nan(),
    };
    let close = |a: &Call, b: &Call| a.0 == b.0 && a.2 == b.2 && near(a.1, b.1);
    match ours.iter().zip(theirs).find(|(a, b)| !close(a, b)) {
        Some((a, b)) => Err(format!("{a:?} instead of {b:?}")),
        None => Ok(()),
    }
}
