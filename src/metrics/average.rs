use tch::Tensor;

use super::accumulator::Accumulator;
use super::to_value::double;
use super::{Accumulated, Metric, Parts, Reduce, ToValue};
use crate::metrics::MetricValue;

const PARTS: Parts = &[("sum", Reduce::Sum)];

/// Turns a value into the tensor that an average sums, in the accumulator's type, and the number of samples in it.
fn batch(value: MetricValue) -> anyhow::Result<(Tensor, u64)> {
    let tensor = double(&value.tensor()?.f_detach()?)?;
    let samples = match tensor.dim() {
        _ if tensor.numel() == 0 => 0,
        0 | 1 => 1,
        _ => tensor.size()[0],
    };
    Ok((tensor, samples as u64))
}

macro_rules! average {
    ($name:ident, $label:literal, $before:expr, $after:expr, $(#[$doc:meta])*) => {
        $(#[$doc])*
        pub struct $name<F> {
            value: F,
            sum: Accumulator,
        }

        crate::debug::opaque_debug!($name<F>);

        impl<O: ToValue> $name<fn(&O) -> MetricValue> {
            /// Averages the step's output itself.
            pub fn new() -> Self {
                Self { value: O::to_value, sum: Accumulator::new(PARTS) }
            }
        }

        impl<O: ToValue> Default for $name<fn(&O) -> MetricValue> {
            fn default() -> Self {
                Self::new()
            }
        }

        impl<F> $name<F> {
            /// Averages a value that `value` takes out of the output: a number or a tensor.
            pub fn of<O, V: Into<MetricValue>>(value: F) -> Self
            where
                F: Fn(&O) -> V,
            {
                Self { value, sum: Accumulator::new(PARTS) }
            }
        }

        impl<O, V: Into<MetricValue>, F: Fn(&O) -> V> Metric<O> for $name<F> {
            fn reset(&mut self) {
                self.sum.reset();
            }

            fn update(&mut self, output: &O) -> anyhow::Result<()> {
                let (value, samples) = batch((self.value)(output).into())?;
                if samples == 0 {
                    return Ok(());
                }
                let before: fn(&Tensor) -> Result<Tensor, tch::TchError> = $before;
                let value = before(&value)?;
                let sum = match value.dim() {
                    0 | 1 => value.f_to_dtype(value.kind(), false, true)?,
                    _ => value.f_sum_dim_intlist(0i64, false, None)?,
                };
                self.sum.add(vec![sum], samples)
            }

            fn compute(&self) -> anyhow::Result<MetricValue> {
                let samples = self.sum.samples();
                anyhow::ensure!(
                    samples > 0,
                    concat!($label, " must have at least one example before it can be computed.")
                );
                let after: fn(&Tensor) -> Result<Tensor, tch::TchError> = $after;
                let mean = self.sum.tensors()?[0].f_div_scalar(samples as f64)?;
                Ok(after(&mean)?.into())
            }

            fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
                self.sum.state()
            }

            fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
                self.sum.load_state(state)
            }
        }
    };
}

average!(
    Average,
    "Average",
    |value| Ok(value.shallow_clone()),
    |mean| Ok(mean.shallow_clone()),
    /// The mean of numbers or tensors: ignite's `Average`.
    ///
    /// A tensor of two or more dimensions (N, …) counts as N samples, and the mean has the shape of one of them.
    /// Other values count as one sample each, averaged element by element. All must have the same shape but for N.
    /// The sum is kept in f64 on the device; no host sync.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::metrics::{Average, Metric};
    /// let mut metric = Average::of(|features: &Tensor| features.shallow_clone());
    /// metric.update(&Tensor::from_slice2(&[[1., 2.], [3., 4.], [5., 9.]]))?;
    /// assert_eq!(metric.compute()?.tensor()?, Tensor::from_slice(&[3., 5.]));
    /// # anyhow::Ok(())
    /// ```
);

average!(
    GeometricAverage,
    "GeometricAverage",
    |value| value.f_log(),
    |mean| mean.f_exp(),
    /// The geometric mean of numbers or tensors, which is the exponential of their mean logarithm: ignite's
    /// `GeometricAverage`.
    ///
    /// Values must be positive; shapes are those of [`Average`]. The sum is kept in f64 on the device; no host sync.
    ///
    /// ```
    /// use tch_ignite::metrics::{GeometricAverage, Metric};
    /// let mut metric = GeometricAverage::of(|x: &f64| *x);
    /// for x in [1., 4.] {
    ///     metric.update(&x)?;
    /// }
    /// assert!((metric.compute()?.read()? - 2.).abs() < 1e-12);
    /// # anyhow::Ok(())
    /// ```
);
