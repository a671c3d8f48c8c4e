//! The state of torch's `AveragedModel`, both ways.

use std::sync::Arc;

use tch::Tensor;

use super::names::Names;
use super::prefixes;
use super::tensor::StoredTensor;
use super::value::{Dict, Value};
use super::weights::{Loaded, Weights};
use crate::engine::Handler;
use crate::error::{Error, Result};
use crate::handlers::{EMAHandler, SWAHandler};
use crate::state::StateDict;

/// The number of updates in the state of an `AveragedModel`.
pub(super) const COUNT: &str = "n_averaged";

/// Goes on with the averages of torch's `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))`: `saved` is its
/// `state_dict()`, and `names` map the names of its parameters, without the prefixes of wrappers, to the store's. The
/// decay is in no file. A warm-up of the handler counts torch's updates, also the first one, which copied the model there.
///
/// ```
/// use tch::{Device, nn};
/// use tch_ignite::handlers::EMAHandler;
/// use tch_ignite::pytorch::{self, Names};
/// let vs = nn::VarStore::new(Device::Cpu);
/// let fc = nn::linear(vs.root() / "fc", 2, 3, Default::default());
/// let ema = EMAHandler::decay(&vs, 0.99)?;
/// // For Python: averaged.load_state_dict(checkpoint["ema"])
/// let saved = pytorch::ema_value(&ema, &Names::new())?;
/// // Of Python: averaged.state_dict()
/// println!("{}", pytorch::load_ema(&ema, &saved, &Names::new())?);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// A state of anything else, or from before its first update, which copies the model there; names or shapes that do not
/// fit, which are listed; averages that are swapped in. Nothing is changed then. The errors of
/// [`Weights::load`] too.
pub fn load_ema(ema: &EMAHandler, saved: &Value, names: &Names) -> Result<Loaded> {
    match count_of(saved)? {
        0 => Err(fault("it has no averages yet: the first update will copy the model")),
        count => load(ema.clone(), "updates", count, saved, names),
    }
}

/// The state of an exponential average for `averaged.load_state_dict()` of torch's `AveragedModel`. Without an update it
/// counts the copy that the averages began with here as the one that torch would make, so a handler that
/// [loads](load_ema) it again is one update ahead in a warm-up.
///
/// # Errors
/// Averages that are swapped in; the errors of [`Weights::rename`].
pub fn ema_value(ema: &EMAHandler, names: &Names) -> Result<Value> {
    // The averages begin as copies here, and are copied by the first update there.
    value(ema, ema.updates().max(1), names)
}

/// Goes on with the means of torch's `AveragedModel(model)`: see [`load_ema`].
///
/// # Errors
/// As [`load_ema`], but a state from before its first update is no error.
pub fn load_swa(swa: &SWAHandler, saved: &Value, names: &Names) -> Result<Loaded> {
    load(swa.clone(), "n_averaged", count_of(saved)?, saved, names)
}

/// The state of means for `averaged.load_state_dict()` of torch's `AveragedModel`.
///
/// # Errors
/// Averages that are swapped in; the errors of [`Weights::rename`].
pub fn swa_value(swa: &SWAHandler, names: &Names) -> Result<Value> {
    value(swa, swa.n_averaged(), names)
}

fn fault(why: &str) -> Error {
    Error::State(format!("the state of averages: {why}"))
}

fn count_of(saved: &Value) -> Result<u64> {
    let stored = saved.get(COUNT).and_then(Value::as_tensor).filter(|stored| stored.numel() == 1);
    let stored = stored.ok_or_else(|| fault("it has no n_averaged, as an AveragedModel has"))?;
    let count = f64::try_from(stored.tensor()?.reshape([]))
        .map_err(|error| Error::libtorch("reading n_averaged", error))?;
    let is_count = count >= 0. && count.fract() == 0. && count < (1u64 << 53) as f64;
    is_count.then_some(count as u64).ok_or_else(|| fault(&format!("n_averaged is {count}")))
}

fn state_of(handler: &impl Handler<(), (), ()>) -> Result<StateDict> {
    handler.save_state()?.ok_or_else(|| fault("the handler has none"))
}

fn load(
    mut handler: impl Handler<(), (), ()>,
    key: &str,
    count: u64,
    saved: &Value,
    names: &Names,
) -> Result<Loaded> {
    let (weights, _) = prefixes::without(Weights::of(saved)?)?;
    let mut state = state_of(&handler)?;
    // These are the handler's own tensors.
    let averages = state.part("averages")?.tensors();
    let averages = averages.map(|(name, average)| (name.to_owned(), average.shallow_clone()));
    let loaded = weights.rename(names)?.load_into(averages.collect())?;
    state.set_value(key, count)?;
    handler.load_state(state)?;
    Ok(loaded)
}

fn value(handler: &impl Handler<(), (), ()>, count: u64, names: &Names) -> Result<Value> {
    let mut tensors = vec![];
    for (name, average) in state_of(handler)?.part("averages")?.tensors() {
        tensors.push((name.to_owned(), StoredTensor::new(average).map(Arc::new)?));
    }
    let names = names.clone().add_prefix(prefixes::WRAPPED);
    let weights = Weights::new(tensors, vec![]).rename(&names)?;
    let mut saved = Dict::ordered();
    saved.insert(COUNT, Value::tensor(&Tensor::from(count as i64))?);
    for (name, average) in weights.into_tensors() {
        saved.push(name, Value::Tensor(average));
    }
    Ok(saved.into())
}
