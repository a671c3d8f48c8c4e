use tch::Tensor;

use super::to_value::Scalar;
use super::{Accumulated, Metric, Reduce, ToValue};
use crate::metrics::MetricValue;

/// The mean of a single value over iterations, where each iteration counts the same. [`Average`](super::Average)
/// takes tensors of any shape.
///
/// The value is a number or a tensor with one element. Tensors are summed in f64 on their device (three small kernels
/// an iteration, no host sync).
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::Mean;
/// let mut engine = Engine::new(|_: &mut (), _, x: f64| Ok((x, "more")));
/// engine.metric("mean", Mean::of(|output: &(f64, &str)| output.0));
/// engine.run(&mut (), vec![1.0, 2.0, 6.0], Until::epochs(1))?;
/// assert_eq!(engine.state.metrics.get("mean")?, 3.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct Mean<F> {
    value: F,
    sum: Option<Scalar>,
    count: u64,
}

crate::debug::opaque_debug!(Mean<F>);

impl<O: ToValue> Mean<fn(&O) -> MetricValue> {
    /// Averages the step's output itself.
    pub fn new() -> Self {
        Self { value: O::to_value, sum: None, count: 0 }
    }
}

impl<O: ToValue> Default for Mean<fn(&O) -> MetricValue> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F> Mean<F> {
    /// Averages a value that `value` takes out of the output: a number, or a tensor with one element.
    pub fn of<O, V: Into<MetricValue>>(value: F) -> Self
    where
        F: Fn(&O) -> V,
    {
        Self { value, sum: None, count: 0 }
    }
}

impl<O, V: Into<MetricValue>, F: Fn(&O) -> V> Metric<O> for Mean<F> {
    fn reset(&mut self) {
        self.sum = None;
        self.count = 0;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        let value = Scalar::of((self.value)(output).into())?;
        self.sum = Some(match &self.sum {
            Some(sum) => sum.plus(&value)?,
            None => value,
        });
        self.count += 1;
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        match &self.sum {
            Some(sum) => Ok(sum.over(self.count as f64)?.value()),
            None => anyhow::bail!("Mean must have at least one example before it can be computed"),
        }
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let Some(sum) = &self.sum else { return Ok(vec![]) };
        Ok(vec![
            Accumulated::new("sum", sum.saved()?, Reduce::Sum),
            Accumulated::new("count", Tensor::from(self.count as i64), Reduce::Sum),
        ])
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        match state {
            [] => <Self as Metric<O>>::reset(self),
            _ => {
                let count = Accumulated::find(state, "count")?.f_int64_value(&[])?;
                self.sum = Some(Scalar::loaded(&Accumulated::find(state, "sum")?)?);
                self.count = u64::try_from(count)?;
            }
        }
        Ok(())
    }
}
