use tch::Tensor;

use super::to_value::Scalar;
use super::{Contribution, Of, Pairwise, Parts, Reduce, References};
use crate::metrics::MetricValue;

/// The mean loss over samples: ignite's `Loss`. Each batch counts by its size, which is the first dimension of
/// the targets. The sum is kept in f64 on the device; no host sync.
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
pub struct Loss<L> {
    loss: L,
}

crate::debug::opaque_debug!(Loss<L>);

impl<L: Fn(&Tensor, &Tensor) -> Tensor> Loss<L> {
    /// Makes the metric: `loss(y_pred, y)` gives the mean over the batch, a tensor of one element; `parts` takes
    /// `y_pred` and `y` out of the output.
    pub fn of<O, F>(loss: L, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Of::new(Self { loss }, parts)
    }
}

impl<L: Fn(&Tensor, &Tensor) -> Tensor> Pairwise for Loss<L> {
    const NAME: &'static str = "Loss";

    fn parts(&self) -> Parts {
        &[("sum", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let samples = y.size().first().copied().unwrap_or(1);
        let loss = Scalar::of((self.loss)(y_pred, y).into())?.tensor();
        Ok(Contribution::new([loss.f_mul_scalar(samples as f64)?], samples as u64))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div_scalar(samples)?.into())
    }
}
