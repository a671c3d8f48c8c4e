//! Checkpoints of Lightning.

use super::position::Position;
use super::value::{Dict, Value};
use super::weights::Weights;
use crate::accumulate::Accumulation;
use crate::engine::Engine;
use crate::error::{Error, Result};

/// The version that the file names: its layout is that of Lightning 2.
const VERSION: &str = "2.0.0";
/// Lightning keeps the state of the scaler under the name of the class that has it.
const PRECISION: &str = "MixedPrecision";

/// Whether it is a checkpoint of Lightning.
pub(super) fn is_one(dict: &Dict) -> bool {
    dict.get("pytorch-lightning_version").is_some()
        || dict.get("state_dict").is_some()
            && (dict.get("optimizer_states").is_some() || dict.get("loops").is_some())
}

/// The position in the batches that training has taken. Files without loops have that in the optimizer's steps.
pub(super) fn position(dict: &Dict) -> Position {
    let count =
        |value: Option<&Value>| value.and_then(Value::as_i64).and_then(|n| u64::try_from(n).ok());
    let fit = dict.get("loops").and_then(|loops| loops.get("fit_loop"));
    let progress = |name: &str, over: &str, what: &str| {
        count(fit.and_then(|fit| fit.get(name)?.get(over)?.get(what)))
    };
    let batches = |over: &str| progress("epoch_loop.batch_progress", over, "processed");
    let done = batches("total").or_else(|| count(dict.get("global_step")));
    let within = batches("current").unwrap_or(0);
    let is_last = fit
        .and_then(|fit| fit.get("epoch_loop.batch_progress")?.get("is_last_batch")?.as_bool())
        .unwrap_or(false);
    let epochs = progress("epoch_progress", "current", "processed");
    // The number of batches in an epoch is written nowhere.
    let epoch_length = match (is_last, done, epochs) {
        (true, ..) if within > 0 => Some(within),
        (false, Some(done), Some(epochs)) if epochs > 0 && done > within => {
            Some((done - within) / epochs).filter(|length| length * epochs == done - within)
        }
        _ => None,
    };
    Position {
        iteration: done,
        epoch: count(dict.get("epoch")),
        epoch_length,
        ..Position::default()
    }
}

/// Makes a checkpoint in Lightning's layout, for `trainer.fit(model, ckpt_path=…)`: weights under the names of the
/// `LightningModule`, the states of its optimizers and of its schedulers in their order, and the engine's position.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("last.ckpt");
/// use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::optim::Optimizer;
/// use tch_ignite::pytorch::{self, LightningCheckpoint, Names, Weights};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// # let optimizer = Optimizer::adam(&vs).build()?;
/// # let mut trainer = Engine::new(|_: &mut (), _engine, _batch: i32| Ok(()));
/// # trainer.run(&mut (), vec![0; 4], Until::epochs(2))?;
/// let weights = Weights::of_store(&vs)?.rename(&Names::new().add_prefix("net."))?;
/// let optimizer = pytorch::optimizer_value(&optimizer, &[])?;
/// let checkpoint = LightningCheckpoint::new(&weights).optimizers([optimizer]).value(&trainer)?;
/// pytorch::write(&path, &checkpoint)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is made by `value`"]
pub struct LightningCheckpoint<'w> {
    weights: &'w Weights,
    optimizers: Vec<Value>,
    schedulers: Vec<Value>,
    grad_scaler: Option<Value>,
    accumulate: u64,
}

impl<'w> LightningCheckpoint<'w> {
    /// A checkpoint with these weights, without optimizers and schedulers.
    pub fn new(weights: &'w Weights) -> Self {
        let (optimizers, schedulers) = (vec![], vec![]);
        Self { weights, optimizers, schedulers, grad_scaler: None, accumulate: 1 }
    }

    /// Adds the states of optimizers: [`optimizer_value`](super::optimizer_value). A list of states, of an optimizer whose
    /// groups have several algorithms, is one of as many optimizers in Lightning.
    pub fn optimizers(mut self, values: impl IntoIterator<Item = Value>) -> Self {
        for value in values {
            match value.as_slice() {
                Some(states) => self.optimizers.extend_from_slice(states),
                None => self.optimizers.push(value),
            }
        }
        self
    }

    /// Adds the states of schedulers: [`scheduler_value`](super::scheduler_value) or
    /// [`plateau_value`](super::plateau_value).
    pub fn schedulers(mut self, values: impl IntoIterator<Item = Value>) -> Self {
        self.schedulers.extend(values);
        self
    }

    /// Sets the state of the scaler, [`grad_scaler_value`](super::grad_scaler_value), for `precision="16-mixed"`.
    pub fn grad_scaler(mut self, value: Value) -> Self {
        self.grad_scaler = Some(value);
        self
    }

    /// Sets how many batches share a step of the optimizers, 1 unless given: `accumulate_grad_batches` of Lightning's
    /// trainer. Lightning saves no gradients, so from a checkpoint within a window it goes on with those of the
    /// batches that are left.
    pub fn accumulate(mut self, steps: u64) -> Self {
        self.accumulate = steps;
        self
    }

    /// The checkpoint at the engine's position, which [`write()`](super::write()) puts into a file. Each optimizer counts
    /// as having made a step at the end of each window of batches.
    ///
    /// # Errors
    /// An engine that does not know the length of its epochs; no batches that share a step, or 2^63 and more.
    pub fn value<C, B, O>(&self, engine: &Engine<'_, C, B, O>) -> Result<Value> {
        let done = engine.state.iteration as i64;
        let length = match engine.state.epoch_length {
            Some(length) => (length as i64).max(1),
            None if done == 0 => 1,
            None => {
                return Err(Error::State(
                    "the engine does not know the length of its epochs".into(),
                ));
            }
        };
        let window = i64::try_from(Accumulation::new(self.accumulate)?.steps()).map_err(|_| {
            Error::invalid(format!("{} batches cannot share a step of Lightning", self.accumulate))
        })?;
        // After the last batch of an epoch it is not begun anew.
        let (whole, rest) = (done / length, done % length);
        let is_last = done > 0 && rest == 0;
        let within = if is_last { length } else { rest };
        let begun = whole + i64::from(rest > 0);
        // The last window of an epoch may be shorter.
        let opened = |batches: i64| batches / window + i64::from(batches % window > 0);
        let ended =
            |batches: i64| if batches == length { opened(length) } else { batches / window };
        let before = whole * opened(length);
        let (steps, steps_within) = (before + ended(rest), ended(within));
        let (zeroed, zeroed_within) = (before + opened(rest), opened(within));

        let mut fit = Dict::new();
        fit.insert("state_dict", Dict::new());
        fit.insert("epoch_loop.state_dict", of([("_batches_that_stepped", steps)]));
        fit.insert("epoch_loop.batch_progress", batches(done, within, is_last));
        let stepped = |times: i64| {
            let both = |count: i64| of([("ready", count), ("completed", count)]);
            progress(both(steps * times), both(steps_within * times))
        };
        fit.insert("epoch_loop.scheduler_progress", stepped(self.schedulers.len() as i64));
        fit.insert("epoch_loop.automatic_optimization.state_dict", Dict::new());
        let cleared = |count: i64| of([("ready", count), ("completed", count), ("started", count)]);
        let mut optimizer = Dict::new();
        optimizer.insert("step", stepped(self.optimizers.len() as i64));
        optimizer.insert("zero_grad", progress(cleared(zeroed), cleared(zeroed_within)));
        let mut progress_of = Dict::new();
        progress_of.insert("optimizer", optimizer);
        fit.insert("epoch_loop.automatic_optimization.optim_progress", progress_of);
        fit.insert("epoch_loop.manual_optimization.state_dict", Dict::new());
        fit.insert("epoch_loop.manual_optimization.optim_step_progress", {
            let none = || of([("ready", 0), ("completed", 0)]);
            progress(none(), none())
        });
        fit.insert("epoch_loop.val_loop.state_dict", Dict::new());
        fit.insert("epoch_loop.val_loop.batch_progress", batches(0, 0, false));
        let epochs = || {
            of([("ready", begun), ("completed", whole), ("started", begun), ("processed", whole)])
        };
        fit.insert("epoch_progress", progress(epochs(), epochs()));

        let mut loops = Dict::new();
        loops.insert("fit_loop", fit);
        for name in ["validate_loop", "test_loop", "predict_loop"] {
            let mut idle = Dict::new();
            idle.insert("state_dict", Dict::new());
            let mut progress = batches(0, 0, false);
            if name == "predict_loop" {
                progress.entries.retain(|(key, _)| key.as_str() != Some("is_last_batch"));
            }
            idle.insert("batch_progress", progress);
            loops.insert(name, idle);
        }

        let mut checkpoint = Dict::new();
        checkpoint.insert("epoch", whole);
        checkpoint.insert("global_step", steps * (self.optimizers.len() as i64).max(1));
        checkpoint.insert("pytorch-lightning_version", VERSION);
        checkpoint.insert("state_dict", self.weights.to_value());
        checkpoint.insert("loops", loops);
        checkpoint.insert("callbacks", Dict::new());
        checkpoint.insert("optimizer_states", Value::list(self.optimizers.iter().cloned()));
        checkpoint.insert("lr_schedulers", Value::list(self.schedulers.iter().cloned()));
        if let Some(scaler) = &self.grad_scaler {
            checkpoint.insert(PRECISION, scaler.clone());
        }
        Ok(checkpoint.into())
    }
}

fn of<const N: usize>(counts: [(&str, i64); N]) -> Dict {
    let mut dict = Dict::new();
    counts.into_iter().for_each(|(key, count)| dict.insert(key, count));
    dict
}

fn progress(total: Dict, current: Dict) -> Dict {
    let mut progress = Dict::new();
    progress.insert("total", total);
    progress.insert("current", current);
    progress
}

fn batches(done: i64, within: i64, is_last: bool) -> Dict {
    let all = |count: i64| {
        of([("ready", count), ("completed", count), ("started", count), ("processed", count)])
    };
    let mut progress = progress(all(done), all(within));
    progress.insert("is_last_batch", is_last);
    progress
}
