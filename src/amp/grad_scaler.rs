use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use tch::{Device, Kind, TchError, Tensor};

use crate::error::{Error, Result};
use crate::optim::Optimizer;
use crate::state::{IntoStateful, StateDict, Stateful};

/// Scales the loss, so that f16 gradients do not vanish, and skips steps whose gradients are not finite:
/// torch's `GradScaler`, with torch's defaults. Clones share one scale.
///
/// Call [`scale`](Self::scale), backward, [`step`](Self::step) and [`update`](Self::update) in this order. The check of
/// the gradients, the skipping and the growth of the scale stay on the device: no host sync, except where a method says
/// so.
///
/// ```
/// # use tch::{Device, Kind, nn};
/// # use tch_ignite::{amp::GradScaler, optim::Optimizer};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().ones("w", &[1]);
/// let optimizer = Optimizer::sgd(&vs).lr(0.5).build()?;
/// let scaler = GradScaler::new();
/// for factor in [1.0, f64::INFINITY] {
///     optimizer.zero_grad()?;
///     let loss = (&w * factor).sum(Kind::Float);
///     scaler.scale(&loss)?.backward();
///     scaler.step(&optimizer)?; // the second is skipped
///     scaler.update()?;
/// }
/// assert_eq!(w.double_value(&[0]), 0.5);
/// assert_eq!((scaler.get_scale()?, scaler.skipped()?), (32768.0, 1));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Clone)]
pub struct GradScaler {
    shared: Arc<Mutex<Scaler>>,
}

struct Scaler {
    settings: Settings,
    /// One f32 element. This tensor, `growth_tracker` and `skipped` move to the device of the first loss.
    scale: Tensor,
    /// The number of steps in a row without an overflow: one i32 element.
    growth_tracker: Tensor,
    /// The number of skipped steps: one i64 element.
    skipped: Tensor,
    /// The optimizers whose gradients were checked since the last update.
    optimizers: Vec<Optimized>,
    /// One f32 element, not 0 if a step before the last update was skipped; `None` before the first update.
    last_found: Option<Tensor>,
}

#[derive(Clone, Copy)]
struct Settings {
    growth_factor: f64,
    backoff_factor: f64,
    growth_interval: i64,
}

/// The state of one optimizer between two updates.
struct Optimized {
    optimizer: Optimizer,
    /// One f32 element: 1 if a gradient is not finite, else 0.
    found_inf: Tensor,
    /// Whether `unscale` has divided the gradients.
    unscaled: bool,
    stepped: bool,
}

impl Default for GradScaler {
    fn default() -> Self {
        Self::new()
    }
}

fn failed(error: TchError) -> Error {
    Error::libtorch("scaling gradients", error)
}

impl Scaler {
    /// Moves the tensors to the device of the loss.
    fn to(&mut self, device: Device) -> Result<(), TchError> {
        if self.scale.device() != device {
            self.scale = self.scale.f_to_device(device)?;
            self.growth_tracker = self.growth_tracker.f_to_device(device)?;
            self.skipped = self.skipped.f_to_device(device)?;
        }
        Ok(())
    }

    /// Checks the gradients of an optimizer, once between two updates.
    fn checked(&mut self, optimizer: &Optimizer) -> Result<&mut Optimized> {
        let known = self.optimizers.iter().position(|known| known.optimizer.is(optimizer));
        let index = match known {
            Some(index) => index,
            None => {
                let found_inf = optimizer.gradients()?.found_inf()?;
                let optimizer = optimizer.clone();
                let new = Optimized { optimizer, found_inf, unscaled: false, stepped: false };
                self.optimizers.push(new);
                self.optimizers.len() - 1
            }
        };
        Ok(&mut self.optimizers[index])
    }

    /// Forgets what it knows about an optimizer's gradients, so that those of the next batch are checked anew.
    fn forget(&mut self, optimizer: &Optimizer) {
        self.optimizers.retain(|known| !known.optimizer.is(optimizer));
    }

    /// 1 / scale, as one f32 element.
    fn inverse(&self) -> Result<Tensor> {
        // Computed in f64, as torch does. Devices without f64 are not supported.
        let inverse = self.scale.f_to_kind(Kind::Double).and_then(|scale| scale.f_reciprocal());
        inverse.and_then(|inverse| inverse.f_to_kind(Kind::Float)).map_err(failed)
    }

    fn step(
        &mut self,
        optimizer: &Optimizer,
        clip: impl FnOnce(Option<Tensor>) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let inverse = self.inverse()?;
        let optimized = self.checked(optimizer)?;
        if optimized.stepped {
            return Err(Error::invalid(
                "step() has already been called since the last update() of this GradScaler: call update() once, after the steps of all optimizers",
            ));
        }
        let unscaled = optimized.unscaled;
        let stepped = clip((!unscaled).then_some(inverse))
            .and_then(|factor| optimizer.update(factor.as_ref(), Some(&optimized.found_inf)));
        optimized.stepped = stepped.is_ok();
        if stepped.is_err() && !unscaled {
            // The caller may try again with other gradients, which have to be checked anew.
            self.forget(optimizer);
        }
        stepped
    }
}

impl GradScaler {
    /// A scaler that starts with a scale of 65,536, doubles it after 2,000 steps in a row without an overflow, and
    /// halves it after a step with one.
    pub fn new() -> Self {
        let options = |kind| (kind, Device::Cpu);
        let scaler = Scaler {
            settings: Settings { growth_factor: 2., backoff_factor: 0.5, growth_interval: 2000 },
            scale: Tensor::full([1], 65536., options(Kind::Float)),
            growth_tracker: Tensor::zeros([1], options(Kind::Int)),
            skipped: Tensor::zeros([1], options(Kind::Int64)),
            optimizers: vec![],
            last_found: None,
        };
        Self { shared: Arc::new(Mutex::new(scaler)) }
    }

    /// Starts with this scale instead.
    ///
    /// # Errors
    /// The scale is not finite and above 0.
    pub fn init_scale(self, scale: f64) -> Result<Self> {
        // The scale and its inverse are kept in f32.
        if !(scale > 0. && (scale as f32).is_finite() && (1. / scale as f32).is_finite()) {
            return Err(Error::invalid(format!(
                "the scale must be above 0, and it and its inverse must be within f32, but {scale} was given"
            )));
        }
        let _ = self.locked().scale.f_fill_(scale).map_err(failed)?;
        Ok(self)
    }

    /// Multiplies the scale by `growth` after `interval` steps in a row without an overflow, and by `backoff` after a
    /// step with one.
    ///
    /// # Errors
    /// `growth` is not finite and above 1, `backoff` is not between 0 and 1, or `interval` is 0.
    pub fn growth(self, growth: f64, backoff: f64, interval: u32) -> Result<Self> {
        if !(growth > 1. && growth.is_finite() && backoff > 0. && backoff < 1. && interval > 0) {
            return Err(Error::invalid(format!(
                "growth must be above 1, backoff above 0 and below 1, and the interval positive, but {growth}, {backoff} and {interval} were given"
            )));
        }
        self.locked().settings = Settings {
            growth_factor: growth,
            backoff_factor: backoff,
            growth_interval: i64::from(interval),
        };
        Ok(self)
    }

    fn locked(&self) -> MutexGuard<'_, Scaler> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loss times the scale, with its graph, for backward. The scaler's tensors move to the loss's device.
    ///
    /// # Errors
    /// The loss is an undefined tensor.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        if !loss.defined() {
            return Err(Error::invalid("the loss to scale is an undefined tensor"));
        }
        let mut scaler = self.locked();
        scaler.to(loss.device()).map_err(failed)?;
        let scale = scaler.scale.f_reshape([0i64; 0]).map_err(failed)?;
        loss.f_mul(&scale).map_err(failed)
    }

    /// Divides the optimizer's gradients by the scale, in place. Call this to read or change the gradients before the
    /// step.
    ///
    /// # Errors
    /// Since the last update the gradients were unscaled, or the step was made.
    pub fn unscale(&self, optimizer: &Optimizer) -> Result<()> {
        let mut scaler = self.locked();
        let inverse = scaler.inverse()?;
        let optimized = scaler.checked(optimizer)?;
        if optimized.unscaled || optimized.stepped {
            return Err(Error::invalid(
                "unscale() has already been called on this optimizer, or step(), since the last update() of this GradScaler: call unscale() once before the step, and update() once after the steps of all optimizers",
            ));
        }
        let scaled = optimizer.gradients().and_then(|gradients| gradients.scale(&inverse));
        optimized.unscaled = scaled.is_ok();
        if scaled.is_err() {
            scaler.forget(optimizer);
        }
        scaled
    }

    /// Forgets an optimizer whose step is given up, so that its next batch begins anew.
    pub(crate) fn forget(&self, optimizer: &Optimizer) {
        self.locked().forget(optimizer);
    }

    /// Makes a step with the unscaled gradients, or none if one of them is not finite. The step divides the gradients
    /// as it reads them. On the CPU they stay scaled in memory, except those of parameters that go through libtorch's
    /// loop, unless [`unscale`](Self::unscale) was called; on CUDA the step overwrites them with the unscaled ones.
    ///
    /// On CUDA the host has to read whether the step is skipped (a host sync) for RMSprop, for the first step of SGD
    /// with dampening, and if the fused kernels cannot step all parameters.
    ///
    /// # Errors
    /// A second step of this optimizer since the last update, and the errors of [`Optimizer::step`]. To give up a batch
    /// whose gradients were unscaled before, call [`update`](Self::update).
    pub fn step(&self, optimizer: &Optimizer) -> Result<()> {
        self.locked().step(optimizer, Ok)
    }

    /// [`step`](Self::step) with the unscaled gradients clipped to a norm of at most `max`, as by
    /// [`Optimizer::step_clipped`]. Returns the norm of the unscaled gradients before clipping, on their device.
    ///
    /// # Errors
    /// `max` is negative or NaN, and the errors of [`step`](Self::step).
    pub fn step_clipped(&self, optimizer: &Optimizer, max: f64) -> Result<Tensor> {
        let mut norm = None;
        self.locked().step(optimizer, |inverse| {
            let (scaled, clip) = optimizer.gradients()?.norm_and_factor(max)?;
            let Some(inverse) = inverse else {
                norm = Some(scaled);
                return Ok(Some(clip));
            };
            let factor = (|| {
                let inverse = inverse.f_reshape([0i64; 0])?.f_to_kind(scaled.kind())?;
                let total = scaled.f_mul(&inverse)?;
                let clip = total.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar_(max)?;
                let factor = clip.f_clamp_max(1.)?.f_mul(&inverse)?;
                norm = Some(total);
                Ok(factor)
            })();
            factor.map(Some).map_err(failed)
        })?;
        norm.ok_or_else(|| Error::invalid("no norm was computed"))
    }

    /// Updates the scale; call this after the steps of all optimizers. The scale shrinks if a step was skipped, and
    /// grows after enough steps in a row without an overflow.
    ///
    /// # Errors
    /// There was no step since the last update.
    pub fn update(&self) -> Result<()> {
        let mut scaler = self.locked();
        if scaler.optimizers.is_empty() {
            return Err(Error::invalid(
                "no step since the last update() of this GradScaler: call step() first",
            ));
        }
        let device = scaler.scale.device();
        let found = scaler.optimizers.iter().map(|optimized| {
            optimized.found_inf.f_to_device(device).and_then(|found| found.f_reshape([1]))
        });
        let found = found.reduce(|a, b| a?.f_maximum(&b?)).transpose().map_err(failed)?;
        let Some(found) = found else { return Ok(()) };
        scaler.optimizers.clear();
        let Settings { growth_factor, backoff_factor, growth_interval } = scaler.settings;
        let updated = (|| {
            let tracker = scaler.growth_tracker.shallow_clone();
            let _ = scaler.scale.f_internal_amp_update_scale_(
                &tracker,
                &found,
                growth_factor,
                backoff_factor,
                growth_interval,
            )?;
            let _ = scaler.skipped.f_add_(&found.f_ne(0.)?.f_to_kind(Kind::Int64)?)?;
            Ok(())
        })();
        scaler.last_found = Some(found);
        updated.map_err(failed)
    }

    /// The current scale. A host sync on CUDA.
    ///
    /// # Errors
    /// libtorch cannot read the tensor.
    pub fn get_scale(&self) -> Result<f64> {
        self.locked().scale.f_double_value(&[0]).map_err(failed)
    }

    /// The number of steps that were skipped since the beginning. A host sync on CUDA.
    ///
    /// # Errors
    /// libtorch cannot read the tensor.
    pub fn skipped(&self) -> Result<u64> {
        let skipped = self.locked().skipped.f_int64_value(&[0]).map_err(failed)?;
        Ok(skipped.unsigned_abs())
    }

    /// Whether a step between the last two updates was skipped; false before the first update. A host sync on CUDA.
    ///
    /// # Errors
    /// libtorch cannot read the tensor.
    pub fn last_skipped(&self) -> Result<bool> {
        let found = self.locked().last_found.as_ref().map(Tensor::shallow_clone);
        let found = found.map(|found| found.f_double_value(&[0])).transpose().map_err(failed)?;
        Ok(found.is_some_and(|found| found != 0.))
    }

    /// The state under torch's names, and `"skipped"`. A host sync on CUDA.
    ///
    /// # Errors
    /// libtorch cannot read a tensor.
    pub fn state_dict(&self) -> Result<Map<String, Value>> {
        let (scale, skipped) = (self.get_scale()?, self.skipped()?);
        let scaler = self.locked();
        let tracker = scaler.growth_tracker.f_int64_value(&[0]).map_err(failed)?;
        let mut state = Map::new();
        state.insert("scale".into(), scale.into());
        state.insert("growth_factor".into(), scaler.settings.growth_factor.into());
        state.insert("backoff_factor".into(), scaler.settings.backoff_factor.into());
        state.insert("growth_interval".into(), scaler.settings.growth_interval.into());
        state.insert("_growth_tracker".into(), tracker.into());
        state.insert("skipped".into(), skipped.into());
        Ok(state)
    }

    /// Loads a saved state. `"skipped"` may be absent, as in torch's states.
    ///
    /// # Errors
    /// A key is absent, or its value is not possible; nothing is changed then.
    pub fn load_state_dict(&self, state: &Map<String, Value>) -> Result<()> {
        self.load(Saved::read(state)?)
    }

    /// Takes over a state that was read.
    pub(crate) fn load(&self, saved: Saved) -> Result<()> {
        let mut scaler = self.locked();
        scaler.settings = saved.settings;
        let Scaler { scale: ours, growth_tracker, skipped, .. } = &mut *scaler;
        let values =
            [(ours, saved.scale), (growth_tracker, saved.tracker), (skipped, saved.skipped)];
        for (tensor, value) in values {
            let _ = tensor.f_fill_(value).map_err(failed)?;
        }
        scaler.optimizers.clear();
        let last = saved.last_skipped.map(|last| Tensor::from_slice(&[f32::from(u8::from(last))]));
        scaler.last_found = last;
        Ok(())
    }
}

/// A saved state of a scaler, read and checked.
pub(crate) struct Saved {
    settings: Settings,
    scale: f64,
    tracker: f64,
    skipped: f64,
    last_skipped: Option<bool>,
}

impl Saved {
    fn read(state: &Map<String, Value>) -> Result<Self> {
        let number = |key: &str, possible: &dyn Fn(f64) -> bool| {
            let value = state.get(key).ok_or_else(|| {
                Error::State(format!(
                    "Required state attribute '{key}' is absent in provided state_dict"
                ))
            })?;
            value
                .as_f64()
                .filter(|value| *value >= 0. && value.is_finite() && possible(*value))
                .ok_or_else(|| Error::State(format!("the GradScaler's '{key}' cannot be {value}")))
        };
        let any = |_: f64| true;
        let up_to = |limit: f64| move |value: f64| value.fract() == 0. && value <= limit;
        let scale = number("scale", &any)?;
        // The tracker is an i32 on the device.
        let tracker = number("_growth_tracker", &up_to(f64::from(i32::MAX)))?;
        let interval = number("growth_interval", &up_to(f64::from(u32::MAX)))? as u32;
        let (growth, backoff) = (number("growth_factor", &any)?, number("backoff_factor", &any)?);
        let skipped = match state.contains_key("skipped") {
            true => number("skipped", &up_to((1u64 << 53) as f64))?,
            false => 0.,
        };
        // A new scaler refuses values that are not possible.
        let fresh = GradScaler::new().init_scale(scale)?.growth(growth, backoff, interval)?;
        let settings = fresh.locked().settings;
        Ok(Self { settings, scale, tracker, skipped, last_skipped: None })
    }

    /// Reads the state that a checkpoint has.
    pub(crate) fn of(state: &StateDict) -> Result<Self> {
        let last_skipped = Some(state.value("last_skipped")?);
        Ok(Self { last_skipped, ..Self::read(state.values())? })
    }
}

/// Saving costs host syncs on CUDA.
impl Stateful for GradScaler {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::from(Self::state_dict(self)?);
        state.set_value("last_skipped", self.last_skipped()?)?;
        Ok(state)
    }

    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        self.load(Saved::of(&state)?)
    }
}

impl fmt::Debug for GradScaler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The scale is left out, because reading it may cost a host sync.
        let Settings { growth_factor, backoff_factor, growth_interval } = self.locked().settings;
        f.debug_struct("GradScaler")
            .field("growth_factor", &growth_factor)
            .field("backoff_factor", &backoff_factor)
            .field("growth_interval", &growth_interval)
            .finish_non_exhaustive()
    }
}

impl<'a> IntoStateful<'a> for &GradScaler {
    fn into_stateful(self) -> Box<dyn Stateful + 'a> {
        Box::new(self.clone())
    }
}
