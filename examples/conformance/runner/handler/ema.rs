//! Runs cases of `EMA`, which say the averages of a weight and a buffer after each iteration.

use std::cell::RefCell;

use anyhow::Result;
use serde_json::Value;
use tch::nn::VarStore;
use tch::{Device, Tensor};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::handlers::{Buffers, EMAHandler};

use super::super::Outcome;
use super::super::json::{array, count, events, float, floats, text};

/// The tolerance that tests/golden/README.md gives under "Tolerances".
const RELATIVE: f64 = 1e-12;

const WARMUP_NAME: &str =
    "the warm-up of an EMA attached under another name writes to an attribute that nobody reads";
const SHARED_BUFFER: &str = "copied buffers of an EMA share the model's memory";

/// The error of making an EMA with these arguments, if they are refused.
pub fn refused(args: &Value) -> Result<Option<tch_ignite::Error>> {
    if let Some(buffers) = args["handle_buffers"].as_str() {
        return Ok(buffers.parse::<Buffers>().err());
    }
    let momentum = float(&args["momentum"])?;
    Ok(EMAHandler::new(&VarStore::new(Device::Cpu), momentum).err())
}

#[derive(Default)]
struct Seen {
    weights: Vec<f64>,
    buffers: Vec<f64>,
    momentum: Vec<f64>,
}

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let row = |value: &Value| Ok::<_, anyhow::Error>(Tensor::from_slice(&floats(value)?));
    let vs = VarStore::new(Device::Cpu);
    let mut model = [
        vs.root().add("w", row(&config["initial"])?, true),
        vs.root().add("b", row(&config["initial_buffer"])?, false),
    ];
    let name = text(&config["name"])?;
    let handle_buffers = text(&config["handle_buffers"])?;
    let mut ema = EMAHandler::new(&vs, float(&config["momentum"])?)?
        .handle_buffers(handle_buffers.parse()?)
        .named(name)
        .on(events(&config["event"])?);
    let warmup = count(&config["warmup_iters"])?;
    if let Some(updates) = warmup {
        ema = ema.warmup(float(&config["momentum_warmup"])?, updates)?;
    }

    let rows = array(&config["weights"])?.iter().zip(array(&config["buffers"])?);
    let batches = rows.map(|(w, b)| Ok([row(w)?, row(b)?])).collect::<Result<Vec<_>>>()?;
    let mut seen = Seen::default();
    // Each update notes how many batches the model has seen and how many iterations are recorded.
    let (updates, done, recorded) = (RefCell::new(vec![]), RefCell::new(0), RefCell::new(0));
    let mut trainer = Engine::new(|model: &mut [Tensor; 2], _, index: usize| {
        let _guard = tch::no_grad_guard();
        for (variable, value) in model.iter_mut().zip(&batches[index]) {
            anyhow::ensure!(variable.size() == value.size(), "values of another length");
            variable.copy_(value);
        }
        *done.borrow_mut() += 1;
        Ok(())
    });
    trainer.attach(ema.clone());
    trainer.add_event_handler(events(&config["event"])?, |_, _| {
        updates.borrow_mut().push(Update { done: *done.borrow(), recorded: *recorded.borrow() });
        Ok(())
    })?;
    trainer.on(Event::IterationCompleted, |_, _| {
        *recorded.borrow_mut() += 1;
        for (name, average) in ema.averages() {
            let values: Vec<f64> = average.try_into()?;
            match name.as_str() {
                "w" => seen.weights.extend(values),
                _ => seen.buffers.extend(values),
            }
        }
        seen.momentum.push(ema.momentum());
        Ok(())
    });
    trainer.run(&mut model, (0..batches.len()).collect::<Vec<_>>(), Until::epochs(1))?;
    drop(trainer);
    let updates = updates.into_inner();

    let flat = |key: &str| -> Result<Vec<f64>> {
        let rows = array(&expect[key])?.iter().map(floats).collect::<Result<Vec<_>>>()?;
        Ok(rows.concat())
    };
    let (mut weights, mut buffers) = (flat("ema_w")?, flat("ema_b")?);
    let mut momentum = floats(&expect["momentum"])?;
    if warmup.is_some() && name != "ema_momentum" {
        *defect = Some(WARMUP_NAME);
        // Before the first update, ignite's engine does not have the attribute.
        for (own, written) in momentum.iter_mut().zip(array(&expect["state_ema_momentum"])?) {
            if !written.is_null() {
                *own = float(written)?;
            }
        }
        let rule = Rule::Average(&momentum);
        weights = after_updates(&config["initial"], &config["weights"], &updates, rule)?;
        if handle_buffers == "update" {
            buffers = after_updates(&config["initial_buffer"], &config["buffers"], &updates, rule)?;
        }
    }
    if handle_buffers == "copy" {
        let copied =
            after_updates(&config["initial_buffer"], &config["buffers"], &updates, Rule::Copy)?;
        if copied != buffers {
            *defect = Some(SHARED_BUFFER);
            buffers = copied;
        }
    }
    let result = near("momentum", &seen.momentum, &momentum)
        .and(near("ema_w", &seen.weights, &weights))
        .and(near("ema_b", &seen.buffers, &buffers));
    Ok(result.into())
}

/// An update of the averages.
struct Update {
    /// How many batches the model has seen before the update.
    done: usize,
    /// How many iterations were recorded before the update.
    recorded: usize,
}

/// An update averages, with the momentum of the iteration that is recorded next, or copies.
#[derive(Clone, Copy)]
enum Rule<'m> {
    Average(&'m [f64]),
    Copy,
}

/// Computes the averages that must be recorded after each iteration.
fn after_updates(
    initial: &Value,
    values: &Value,
    updates: &[Update],
    rule: Rule<'_>,
) -> Result<Vec<f64>> {
    let initial = floats(initial)?;
    let values = array(values)?.iter().map(floats).collect::<Result<Vec<_>>>()?;
    let mut average = initial.clone();
    let mut all = vec![];
    for recorded in 0..values.len() {
        for update in updates.iter().filter(|update| update.recorded == recorded) {
            let now = update.done.checked_sub(1).map_or(&initial, |last| &values[last]);
            for (average, now) in average.iter_mut().zip(now) {
                *average = match rule {
                    Rule::Average(momentum) => {
                        *average * (1. - momentum[recorded]) + now * momentum[recorded]
                    }
                    Rule::Copy => *now,
                };
            }
        }
        all.extend(&average);
    }
    Ok(all)
}

fn near(what: &str, ours: &[f64], theirs: &[f64]) -> Result<(), String> {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} values instead of {}", ours.len(), theirs.len()));
    }
    let far =
        ours.iter().zip(theirs).position(|(a, b)| (a - b).abs() > (RELATIVE * b.abs()).max(1e-15));
    match far {
        Some(i) => Err(format!("{what}[{i}]: {:e} instead of {:e}", ours[i], theirs[i])),
        None => Ok(()),
    }
}
