//! Averages of a store's variables, shared by the handlers for EMA and SWA.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::nn::VarStore;
use tch::{TchError, Tensor};

use crate::bridge::{Average, Pairs};
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::state::{StateDict, misfits};
use crate::variables::variables;

/// How buffers are treated: variables that are not trained, such as batch-norm statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Buffers {
    /// Buffers are copied: ignite's `"copy"`.
    #[default]
    Copy,
    /// Buffers are averaged like parameters, and integers are copied: ignite's `"update"`.
    Update,
    /// Buffers stay as they are, because the averaged model computes its own: ignite's `"ema_train"`.
    Keep,
}

impl std::str::FromStr for Buffers {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "copy" => Ok(Self::Copy),
            "update" => Ok(Self::Update),
            "ema_train" => Ok(Self::Keep),
            other => Err(Error::invalid(format!(
                "handle_buffers can only be one of 'copy', 'update', 'ema_train', but got {other}"
            ))),
        }
    }
}

/// The averages of a store's variables; clones share them.
#[derive(Clone)]
pub(super) struct WeightAverages(Arc<Mutex<Lists>>);

struct Lists {
    averages: Vec<Averaged>,
    parameters: Pairs,
    buffers: Pairs,
    all: Pairs,
    swapped: bool,
}

/// A variable's average, with all names of the variable.
struct Averaged {
    names: Vec<String>,
    average: Tensor,
}

fn locked(lists: &Mutex<Lists>) -> MutexGuard<'_, Lists> {
    lists.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lists {
    fn of(vs: &VarStore) -> Result<Self> {
        let failed = |error: TchError| Error::libtorch("copying the variables", error);
        let mut sources = variables(&vs.variables_);
        sources.sort_by(|a, b| a.name.cmp(&b.name));
        let mut averages = vec![];
        for source in &sources {
            let detached = source.tensor.f_detach().map_err(failed)?;
            let mut average = detached.f_empty_like().map_err(failed)?;
            average.f_copy_(&detached).map_err(failed)?;
            averages.push(Averaged { names: source.names().map(str::to_owned).collect(), average });
        }
        let pairs = |wanted: &dyn Fn(bool) -> bool| {
            let all = averages.iter().zip(&sources);
            let chosen = all.filter(|(_, source)| wanted(source.trainable));
            Pairs::new(chosen.map(|(averaged, source)| (&averaged.average, &source.tensor)))
                .map_err(|text| Error::libtorch("pairing variables and averages", text))
        };
        let (parameters, buffers) =
            (pairs(&|parameter| parameter)?, pairs(&|parameter| !parameter)?);
        let all = pairs(&|_| true)?;
        Ok(Self { averages, parameters, buffers, all, swapped: false })
    }

    fn update(&mut self, how: Average, buffers: Buffers) -> Result<()> {
        if self.swapped {
            return Err(Error::invalid(
                "the averages are swapped in, so they cannot be updated; drop the guard of `swap` first (if it is gone, swapping back was refused)",
            ));
        }
        let failed = |text| Error::libtorch("averaging variables", text);
        let of_buffers = match buffers {
            Buffers::Copy => Some(Average::Copy),
            Buffers::Update => Some(how),
            Buffers::Keep => None,
        };
        of_buffers.map_or(Ok(()), |how| self.buffers.check(how)).map_err(failed)?;
        self.parameters.update(how).map_err(failed)?;
        of_buffers.map_or(Ok(()), |how| self.buffers.update(how)).map_err(failed)
    }

    fn swap(&mut self, how: Average) -> Result<()> {
        self.all.update(how).map_err(|text| Error::libtorch("swapping averages", text))
    }
}

impl WeightAverages {
    pub(super) fn of(vs: &VarStore) -> Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Lists::of(vs)?))))
    }

    pub(super) fn update(&self, how: Average, buffers: Buffers) -> Result<()> {
        locked(&self.0).update(how, buffers)
    }

    pub(super) fn averages(&self) -> Vec<(String, Tensor)> {
        let lists = locked(&self.0);
        let named = lists.averages.iter().flat_map(|Averaged { names, average }| {
            names.iter().map(|name| (name.clone(), average.shallow_clone()))
        });
        let mut named: Vec<_> = named.collect();
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        named
    }

    /// The averages, by the names of the variables.
    ///
    /// # Errors
    /// The averages are swapped in, so that model and averages would be saved with each other's values.
    pub(super) fn save(&self) -> Result<StateDict> {
        if locked(&self.0).swapped {
            return Err(Error::State(
                "the averages are swapped in, so neither they nor the model can be saved or restored; drop the guard of `swap` first (if it is gone, swapping back was refused)"
                    .into(),
            ));
        }
        let mut state = StateDict::new();
        for (name, average) in self.averages() {
            state.set_tensor(&name, average);
        }
        Ok(state)
    }

    /// Copies saved averages into these. Nothing is changed where they do not fit.
    pub(super) fn load(&self, state: &StateDict) -> Result<()> {
        match misfits(&self.save()?, state).into_values().next() {
            Some(misfit) => Err(Error::State(misfit)),
            None => self.copy(state),
        }
    }

    /// Copies the saved averages that fit. Returns a line for each that does not; these averages keep their values.
    pub(super) fn load_partially(&self, mut state: StateDict) -> Result<Vec<String>> {
        let misfits = misfits(&self.save()?, &state);
        state.tensors.retain(|name, _| !misfits.contains_key(name));
        self.copy(&state)?;
        Ok(misfits.into_values().collect())
    }

    fn copy(&self, state: &StateDict) -> Result<()> {
        let ours = self.save()?;
        let _guard = tch::no_grad_guard();
        for (name, value) in &state.tensors {
            let Some(average) = ours.tensors.get(name) else { continue };
            average.shallow_clone().f_copy_(value).map_err(|error| {
                Error::libtorch(format!("loading the average of '{name}'"), error)
            })?;
        }
        Ok(())
    }

    pub(super) fn swap(&self) -> Result<Swapped> {
        let mut lists = locked(&self.0);
        if lists.swapped {
            return Err(Error::invalid(
                "the averages are swapped in already (if the guard is gone, swapping back was refused)",
            ));
        }
        lists.swap(Average::Swap)?;
        lists.swapped = true;
        Ok(Swapped(self.clone()))
    }
}

impl fmt::Debug for WeightAverages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} variables", locked(&self.0).averages.len())
    }
}

/// While this guard lives, the model's variables have the values of the averages, and the averages those of the
/// variables. When it is dropped, also after an error or a panic, the values are swapped back. Each swap is one pass
/// over both, in place, without an allocation on the CPU.
#[derive(Debug)]
#[must_use = "the values go back when this is dropped"]
pub struct Swapped(WeightAverages);

impl Drop for Swapped {
    fn drop(&mut self) {
        let mut lists = locked(&self.0.0);
        // `drop` cannot return an error. If a variable got another shape since, the averages stay swapped in, and the
        // next update, swap or checkpoint says so.
        lists.swapped = lists.swap(Average::SwapBack).is_err();
    }
}

/// A handler that is called with the averages swapped in, such as an evaluation of the averaged model.
/// [`EMAHandler::with_averages`](super::EMAHandler::with_averages) and
/// [`SWAHandler::with_averages`](super::SWAHandler::with_averages) make it.
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct WithAverages<H> {
    pub(super) averages: WeightAverages,
    pub(super) handler: H,
}

crate::debug::opaque_debug!(WithAverages<H>);

#[deny(clippy::missing_trait_methods)]
impl<C, B, O, H: Handler<C, B, O>> Handler<C, B, O> for WithAverages<H> {
    fn spec(&self) -> Result<HandlerSpec> {
        self.handler.spec()
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        self.handler.save_state()
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.handler.load_state(state)
    }

    fn load_state_partially(&mut self, state: StateDict) -> Result<Vec<String>> {
        self.handler.load_state_partially(state)
    }

    fn param(&self, name: &str) -> Option<Result<f64>> {
        self.handler.param(name)
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        // The averages are of values for evaluation already, so no Schedule-Free optimizer may average them again.
        let _weights = engine.evaluation_weights(cx)?;
        let _swapped = self.averages.swap()?;
        self.handler.call(event, cx, engine)
    }
}
