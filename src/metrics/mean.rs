use tch::Tensor;

use super::{Metric, ToValue, scalar};
use crate::engine::MetricValue;

/// The mean of a value over iterations, each counting the same: ignite's `Average`.
///
/// The value is a number or a tensor with one element; tensors are summed in f64 on their device
/// (three small kernels an iteration, no host sync).
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
    sum: Option<MetricValue>,
    count: u64,
}

impl<O: ToValue> Mean<fn(&O) -> MetricValue> {
    /// Of the output itself.
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
    /// Of a value in the output: a number, or a tensor with one element.
    pub fn of<O, V: Into<MetricValue>>(value: F) -> Self
    where
        F: Fn(&O) -> V,
    {
        Self { value, sum: None, count: 0 }
    }
}

/// Adds `value * weight`, on the device where the value is.
fn add(sum: &mut Option<MetricValue>, value: MetricValue, weight: f64) -> anyhow::Result<()> {
    let weighted = match scalar(value)? {
        MetricValue::Number(value) => (value * weight).into(),
        MetricValue::Tensor(value) if weight == 1. => value.into(),
        MetricValue::Tensor(value) => value.f_mul_scalar(weight)?.into(),
    };
    *sum = Some(match (sum.take(), weighted) {
        (None, value) => value,
        (Some(MetricValue::Number(a)), MetricValue::Number(b)) => (a + b).into(),
        (Some(MetricValue::Tensor(a)), MetricValue::Tensor(b)) => a.f_add(&b)?.into(),
        (Some(MetricValue::Tensor(t)), MetricValue::Number(n))
        | (Some(MetricValue::Number(n)), MetricValue::Tensor(t)) => t.f_add_scalar(n)?.into(),
    });
    Ok(())
}

fn divided(sum: &Option<MetricValue>, count: u64, who: &str) -> anyhow::Result<MetricValue> {
    match sum {
        Some(MetricValue::Number(sum)) => Ok((sum / count as f64).into()),
        Some(MetricValue::Tensor(sum)) => Ok(sum.f_div_scalar(count as f64)?.into()),
        None => anyhow::bail!("{who} must have at least one example before it can be computed"),
    }
}

impl<O, V: Into<MetricValue>, F: Fn(&O) -> V> Metric<O> for Mean<F> {
    fn reset(&mut self) {
        self.sum = None;
        self.count = 0;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        add(&mut self.sum, (self.value)(output).into(), 1.)?;
        self.count += 1;
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        divided(&self.sum, self.count, "Mean")
    }
}

/// The mean loss over samples: ignite's `Loss`. Each batch counts by its size, the first dimension of
/// the targets. Summed in f64 on the device; no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::Loss;
/// let mut engine = Engine::new(|_: &mut (), _, batch: Vec<f64>| {
///     Ok((Tensor::from_slice(&batch), Tensor::zeros([batch.len() as i64], (tch::Kind::Double, tch::Device::Cpu))))
/// });
/// let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
/// engine.metric("loss", Loss::of(mse, |output: &(Tensor, Tensor)| (&output.0, &output.1)));
/// engine.run(&mut (), vec![vec![1.0, 1.0, 1.0], vec![3.0]], Until::epochs(1))?;
/// assert_eq!(engine.state.metrics.get("loss")?, 3.0);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct Loss<L, F> {
    loss: L,
    parts: F,
    sum: Option<MetricValue>,
    samples: u64,
}

impl<L, F> Loss<L, F>
where
    L: Fn(&Tensor, &Tensor) -> Tensor,
{
    /// `loss(y_pred, y)` gives the mean over the batch; `parts` takes both out of the output.
    pub fn of<O>(loss: L, parts: F) -> Self
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Self { loss, parts, sum: None, samples: 0 }
    }
}

impl<O, L, F> Metric<O> for Loss<L, F>
where
    L: Fn(&Tensor, &Tensor) -> Tensor,
    F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
{
    fn reset(&mut self) {
        self.sum = None;
        self.samples = 0;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        let (y_pred, y) = (self.parts)(output);
        let samples = y.size().first().copied().unwrap_or(1);
        add(&mut self.sum, (self.loss)(y_pred, y).into(), samples as f64)?;
        self.samples += samples as u64;
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        divided(&self.sum, self.samples, "Loss")
    }
}
