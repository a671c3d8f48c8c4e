use std::collections::{BTreeMap, HashMap};

use tch::{Device, Kind, Tensor};

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::metrics::MetricValue;
use crate::prediction::Prediction;
use crate::state::StateDict;

/// Default number of iterations between two readings of a device's flag.
const PERIOD: u64 = 100;

/// Ends the run when an output holds a NaN or an infinity: ignite's `TerminateOnNan`.
///
/// Numbers and CPU tensors are checked in each iteration, and the run ends with the iteration that went wrong. A tensor
/// on another device is added to a flag there (three small kernels for each tensor). The flag is read every 100
/// iterations ([`every`](Self::every)) and at the end of each epoch, so the run ends at most that much later. Each
/// reading is a host sync.
///
/// ```
/// use tch_ignite::engine::{Engine, Stop, Until};
/// use tch_ignite::handlers::TerminateOnNan;
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok((loss, vec![loss])));
/// trainer.attach(TerminateOnNan::new());
/// let summary = trainer.run(&mut (), vec![1.0, f64::NAN, 1.0], Until::epochs(9))?;
/// assert_eq!((summary.iterations, summary.stop), (2, Stop::Terminated));
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct TerminateOnNan<F> {
    numbers: F,
    every: u64,
    /// A flag on each device: zero, or NaN once a value was not finite.
    flags: Vec<(Device, Tensor)>,
}

crate::debug::opaque_debug!(TerminateOnNan<F>);

/// Values whose numbers can be checked, nested or not.
pub trait Numbers {
    /// Calls `see` with each number and tensor; tensors are shared, not copied.
    fn numbers(&self, see: &mut dyn FnMut(MetricValue));
}

type Output<O> = fn(&O, &mut dyn FnMut(MetricValue));

impl<O: Numbers> TerminateOnNan<Output<O>> {
    /// Checks all numbers of the output.
    pub fn new() -> Self {
        Self { numbers: O::numbers, every: PERIOD, flags: vec![] }
    }
}

impl<O: Numbers> Default for TerminateOnNan<Output<O>> {
    fn default() -> Self {
        Self::new()
    }
}

impl TerminateOnNan<()> {
    /// Checks the part of the output that `part` returns.
    ///
    /// ```
    /// use tch_ignite::handlers::TerminateOnNan;
    /// struct Losses { g: f64, d: f64 }
    /// let handler = TerminateOnNan::of(|losses: &Losses| [losses.g, losses.d]);
    /// # let _ = handler;
    /// ```
    pub fn of<O, N: Numbers>(
        part: impl Fn(&O) -> N,
    ) -> TerminateOnNan<impl Fn(&O, &mut dyn FnMut(MetricValue))> {
        let numbers = move |output: &O, see: &mut dyn FnMut(MetricValue)| part(output).numbers(see);
        TerminateOnNan { numbers, every: PERIOD, flags: vec![] }
    }
}

impl<F> TerminateOnNan<F> {
    /// Reads the flag of a device every so many iterations; the default is 100. 0 counts as 1.
    pub fn every(mut self, iterations: u64) -> Self {
        self.every = iterations.max(1);
        self
    }

    /// Returns false if `value` is known not to be finite. A tensor on a device is added to the device's flag.
    fn take_in(&mut self, value: &MetricValue) -> anyhow::Result<bool> {
        let tensor = match value {
            MetricValue::Tensor(tensor) => tensor,
            MetricValue::Number(number) => return Ok(number.is_finite()),
            MetricValue::Named(parts) => {
                let mut finite = true;
                for (_, part) in parts {
                    finite &= self.take_in(part)?;
                }
                return Ok(finite);
            }
        };
        let kind = tensor.kind();
        let floating = kind == Kind::BFloat16 || tensor.is_floating_point() || tensor.is_complex();
        if !floating || tensor.numel() == 0 {
            return Ok(true);
        }
        let device = tensor.device();
        if device == Device::Cpu && tensor.numel() == 1 && !tensor.is_complex() {
            return Ok(tensor.f_reshape([-1i64])?.f_double_value(&[0])?.is_finite());
        }
        if device == Device::Cpu {
            return Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0);
        }
        // Zero times a finite number is zero; times NaN or an infinity it is NaN, which no addition removes.
        let zero_or_nan = tensor.f_detach()?.f_mul_scalar(0.)?.f_sum(Kind::Float)?;
        match self.flags.iter_mut().find(|(known, _)| *known == device) {
            Some((_, flag)) => drop(flag.f_add_(&zero_or_nan)?),
            None => self.flags.push((device, zero_or_nan)),
        }
        Ok(true)
    }

    /// Whether all values since the last reading were finite. Resets the flags. Waits for the devices.
    fn read_flags(&mut self) -> anyhow::Result<bool> {
        let mut finite = true;
        for (_, flag) in self.flags.drain(..) {
            finite &= flag.f_double_value(&[])?.is_finite();
        }
        Ok(finite)
    }
}

impl<C, B, O, F: Fn(&O, &mut dyn FnMut(MetricValue))> Handler<C, B, O> for TerminateOnNan<F> {
    fn spec(&self) -> Result<HandlerSpec> {
        let events = Event::Started | Event::IterationCompleted | Event::EpochCompleted;
        Ok(HandlerSpec::new("terminate on NaN", events))
    }

    /// Saves the sum of the flags that were not read yet. Waits for the devices.
    fn save_state(&self) -> Result<Option<StateDict>> {
        let flags = self.flags.iter().map(|(_, flag)| flag.f_to_device(Device::Cpu));
        let sum = flags.reduce(|a, b| a?.f_add(&b?)).transpose();
        let mut state = StateDict::new();
        if let Some(sum) = sum.map_err(|error| Error::libtorch("saving the flags", error))? {
            state.set_tensor("flag", sum);
        }
        Ok(Some(state))
    }

    fn load_state(&mut self, mut state: StateDict) -> Result<()> {
        let flag = state.tensors.remove("flag");
        if flag.as_ref().is_some_and(|flag| flag.numel() != 1) {
            return Err(Error::State("'flag' is not one number".into()));
        }
        self.flags = flag.into_iter().map(|flag| (Device::Cpu, flag)).collect();
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let _guard = tch::no_grad_guard();
        if event == Event::Started {
            // A run that failed may have left a flag.
            self.flags.clear();
        }
        let mut finite = true;
        if let (Event::IterationCompleted, Some(output)) = (event, &engine.state.output) {
            let mut values = vec![];
            (self.numbers)(output, &mut |value| values.push(value));
            for value in &values {
                finite &= self.take_in(value)?;
            }
        }
        if event == Event::EpochCompleted || engine.state.iteration.is_multiple_of(self.every) {
            finite &= self.read_flags()?;
        }
        if !finite {
            engine.terminate();
        }
        Ok(())
    }
}

impl Numbers for f64 {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        see((*self).into());
    }
}

impl Numbers for f32 {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        see(f64::from(*self).into());
    }
}

impl Numbers for Tensor {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        see(self.shallow_clone().into());
    }
}

impl Numbers for Prediction {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        (&self.y_pred, &self.y).numbers(see);
    }
}

impl<T: Numbers + ?Sized> Numbers for &T {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        (**self).numbers(see);
    }
}

impl<T: Numbers + ?Sized> Numbers for Box<T> {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        (**self).numbers(see);
    }
}

impl<T: Numbers> Numbers for Option<T> {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.iter().for_each(|part| part.numbers(see));
    }
}

impl<T: Numbers> Numbers for [T] {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.iter().for_each(|part| part.numbers(see));
    }
}

impl<T: Numbers, const N: usize> Numbers for [T; N] {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.as_slice().numbers(see);
    }
}

impl<T: Numbers> Numbers for Vec<T> {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.as_slice().numbers(see);
    }
}

impl<K, T: Numbers> Numbers for BTreeMap<K, T> {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.values().for_each(|part| part.numbers(see));
    }
}

impl<K, T: Numbers, S> Numbers for HashMap<K, T, S> {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.values().for_each(|part| part.numbers(see));
    }
}

impl<A: Numbers, B: Numbers> Numbers for (A, B) {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.0.numbers(see);
        self.1.numbers(see);
    }
}

impl<A: Numbers, B: Numbers, C: Numbers> Numbers for (A, B, C) {
    fn numbers(&self, see: &mut dyn FnMut(MetricValue)) {
        self.0.numbers(see);
        self.1.numbers(see);
        self.2.numbers(see);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Until;

    #[test]
    fn tensors_of_any_kind_are_looked_at() -> anyhow::Result<()> {
        let finite =
            |tensor: Tensor| TerminateOnNan::<Output<Tensor>>::new().take_in(&tensor.into());
        for kind in [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16, Kind::ComplexFloat] {
            let ones = Tensor::ones([2, 3], (kind, Device::Cpu));
            assert!(finite(ones.shallow_clone())?, "{kind:?}");
            assert!(!finite(ones * f64::NAN)?, "{kind:?}");
        }
        assert!(!finite(Tensor::from_slice(&[f32::INFINITY]).view([1, 1]))?);
        assert!(finite(Tensor::from(1.5))?);
        assert!(finite(Tensor::from_slice(&[1i64, 2]))?);
        assert!(finite(Tensor::zeros([0], (Kind::Float, Device::Cpu)))?);
        assert!(!finite(Tensor::from_slice(&[1., f64::NEG_INFINITY]))?);
        Ok(())
    }

    #[test]
    fn an_output_with_gradients_is_left_alone() -> anyhow::Result<()> {
        let w = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(&w * x));
        trainer.attach(TerminateOnNan::new());
        let summary = trainer.run(&mut (), vec![1., 2., f64::INFINITY, 3.], Until::epochs(2))?;
        assert_eq!(summary.iterations, 3);
        Ok(())
    }

    #[test]
    fn a_flag_keeps_what_went_wrong() -> anyhow::Result<()> {
        let mut handler = TerminateOnNan::<Output<Tensor>>::new();
        // The flag is computed as on a device.
        let flag = |x: f64| (Tensor::from_slice(&[x, 1.]) * 0.).sum(Kind::Float);
        handler.flags.push((Device::Cpu, flag(1.) + flag(f64::NAN) + flag(2.)));
        assert!(!handler.read_flags()?);
        assert!(handler.read_flags()?);
        Ok(())
    }

    #[test]
    fn a_flag_that_nobody_read_is_saved() -> anyhow::Result<()> {
        type OfTensor = TerminateOnNan<Output<Tensor>>;
        let save = |handler: &OfTensor| {
            <OfTensor as Handler<(), (), Tensor>>::save_state(handler)
                .map(Option::unwrap_or_default)
        };
        let load = |state| {
            let mut handler = OfTensor::new();
            <OfTensor as Handler<(), (), Tensor>>::load_state(&mut handler, state)?;
            anyhow::Ok(handler)
        };
        for number in [1., f64::NAN] {
            let mut handler = OfTensor::new();
            let flag = || (Tensor::from(number) * 0.).to_kind(Kind::Float);
            handler.flags = vec![(Device::Cpu, flag()), (Device::Cuda(0), Tensor::from(0f32))];
            let mut resumed = load(save(&handler)?)?;
            assert_eq!(resumed.read_flags()?, number.is_finite());
        }
        assert!(load(save(&OfTensor::new())?)?.flags.is_empty());
        let mut odd = StateDict::new();
        odd.set_tensor("flag", Tensor::from_slice(&[1., 2.]));
        assert!(load(odd).is_err());
        Ok(())
    }
}
