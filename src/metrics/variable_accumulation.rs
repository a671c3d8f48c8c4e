use tch::Tensor;

use super::to_value::double;
use super::{Accumulated, Metric, Reduce};
use crate::metrics::MetricValue;

/// Joins a value of each iteration to those before it with a function of yours: ignite's `VariableAccumulation`. The
/// values are in `state.metrics` under `name/accumulator` and `name/num_examples`.
///
/// The accumulator begins as a scalar 0. A tensor of two or more dimensions (N, …) counts as N examples, anything
/// else as one. The values are in f64 on their device; no host sync unless the function makes one. Several
/// processes add their results.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, VariableAccumulation};
/// let largest = |so_far: &Tensor, x: &Tensor| Ok(so_far.f_maximum(x)?);
/// let mut metric = VariableAccumulation::of(largest, |x: &f64| *x);
/// for x in [1., 3., 2.] {
///     metric.update(&x)?;
/// }
/// let values = metric.compute()?.flatten("x")?;
/// assert_eq!(values, [("x/accumulator".to_owned(), 3.), ("x/num_examples".to_owned(), 3.)]);
/// # anyhow::Ok(())
/// ```
pub struct VariableAccumulation<P, F> {
    op: P,
    value: F,
    accumulator: Option<Tensor>,
    num_examples: u64,
}

crate::debug::opaque_debug!(VariableAccumulation<P, F>);

impl<P: Fn(&Tensor, &Tensor) -> anyhow::Result<Tensor>, F> VariableAccumulation<P, F> {
    /// Makes the metric: `op(accumulator, value)` gives the next accumulator; `value` takes a number or tensor out
    /// of the output.
    pub fn of<O, V: Into<MetricValue>>(op: P, value: F) -> Self
    where
        F: Fn(&O) -> V,
    {
        Self { op, value, accumulator: None, num_examples: 0 }
    }
}

impl<O, P, V, F> Metric<O> for VariableAccumulation<P, F>
where
    P: Fn(&Tensor, &Tensor) -> anyhow::Result<Tensor>,
    V: Into<MetricValue>,
    F: Fn(&O) -> V,
{
    fn reset(&mut self) {
        self.accumulator = None;
        self.num_examples = 0;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        let value = double(&(self.value)(output).into().tensor()?.f_detach()?)?;
        let accumulator = match &self.accumulator {
            Some(accumulator) => accumulator.f_to_device(value.device())?,
            None => Tensor::f_zeros([0i64; 0], (value.kind(), value.device()))?,
        };
        if value.numel() == 0 {
            return Ok(());
        }
        // The copy stays as it is when the step writes into a tensor that the operation returned.
        let accumulator = (self.op)(&accumulator, &value)?;
        self.accumulator = Some(accumulator.f_to_dtype(accumulator.kind(), false, true)?);
        self.num_examples += if value.dim() > 1 { value.size()[0] as u64 } else { 1 };
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let accumulator = match &self.accumulator {
            Some(accumulator) => accumulator.shallow_clone().into(),
            None => 0f64.into(),
        };
        Ok(MetricValue::Named(vec![
            ("accumulator".into(), accumulator),
            ("num_examples".into(), (self.num_examples as f64).into()),
        ]))
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let Some(accumulator) = &self.accumulator else { return Ok(vec![]) };
        let count = Tensor::from(self.num_examples as i64);
        Ok(vec![
            Accumulated::new("accumulator", accumulator.shallow_clone(), Reduce::Sum),
            Accumulated::new("num_examples", count, Reduce::Sum),
        ])
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        (self.accumulator, self.num_examples) = match state {
            [] => (None, 0),
            state => {
                let count = Accumulated::find(state, "num_examples")?.f_int64_value(&[])?;
                (Some(Accumulated::find(state, "accumulator")?), u64::try_from(count)?)
            }
        };
        Ok(())
    }
}
