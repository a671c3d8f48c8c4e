use tch::{Kind, Tensor};

use super::Metric;
use crate::engine::MetricValue;

/// The share of right predictions: ignite's `Accuracy`.
///
/// * classes: `y_pred` of shape (N, C, …), scores or probabilities of floating point; `y` of shape
///   (N, …), class numbers
/// * binary: `y_pred` and `y` of the same shape (N, …), both 0 or 1
/// * [`multilabel`](Self::multilabel): both of shape (N, C, …), 0 or 1; a sample is right if all its
///   labels are
///
/// Right answers are counted in i64 on the device (three small kernels an iteration); no host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::metrics::Accuracy;
/// let mut engine = Engine::new(|_: &mut (), _, scores: [f64; 2]| {
///     Ok((Tensor::from_slice(&scores).unsqueeze(0), Tensor::from_slice(&[1i64])))
/// });
/// engine.metric("accuracy", Accuracy::of(|output: &(Tensor, Tensor)| (&output.0, &output.1)));
/// engine.run(&mut (), vec![[0.2, 0.8], [0.9, 0.1]], Until::epochs(1))?;
/// assert_eq!(engine.state.metrics.get("accuracy")?, 0.5);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
pub struct Accuracy<F> {
    parts: F,
    multilabel: bool,
    right: Option<Tensor>,
    samples: u64,
}

impl<F> Accuracy<F> {
    /// `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O>(parts: F) -> Self
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        Self { parts, multilabel: false, right: None, samples: 0 }
    }

    /// Counts a sample as right if all its labels are.
    pub fn multilabel(mut self, on: bool) -> Self {
        self.multilabel = on;
        self
    }

    /// How many are right, as a tensor, and of how many.
    fn count(&self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<(Tensor, u64)> {
        let (pred_shape, shape) = (y_pred.size(), y.size());
        let classes = !self.multilabel
            && pred_shape.len() == shape.len() + 1
            && pred_shape.first() == shape.first()
            && pred_shape.get(2..) == shape.get(1..);
        anyhow::ensure!(
            classes || (pred_shape == shape && (!self.multilabel || shape.len() > 1)),
            "y_pred must be (N, C, …) and y (N, …), or both of the same shape (N, …){}; they are {pred_shape:?} and {shape:?}",
            if self.multilabel { "; for multilabel both (N, C, …)" } else { "" }
        );
        let right = if classes && pred_shape.get(1) == Some(&1) {
            // One column is no choice between classes: binary, as in ignite.
            y_pred.f_squeeze_dim(1)?.f_eq_tensor(y)?
        } else if classes {
            y_pred.f_argmax(1, false)?.f_eq_tensor(y)?
        } else {
            y_pred.f_eq_tensor(y)?
        };
        // Labels of a sample lie along dimension 1: bring it last and ask for all of them.
        let right = match self.multilabel {
            true => right.f_transpose(1, -1)?.f_all_dim(-1, false)?,
            false => right,
        };
        let samples = right.numel() as u64;
        Ok((right.f_sum(Kind::Int64)?, samples))
    }
}

impl<O, F> Metric<O> for Accuracy<F>
where
    F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
{
    fn reset(&mut self) {
        self.right = None;
        self.samples = 0;
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        let (y_pred, y) = (self.parts)(output);
        let (right, samples) = self.count(y_pred, y)?;
        self.right = Some(match self.right.take() {
            Some(sum) => sum.f_add(&right)?,
            None => right,
        });
        self.samples += samples;
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        match &self.right {
            Some(right) => {
                let kind = super::accumulator_kind(right.device());
                Ok(right.f_to_kind(kind)?.f_div_scalar(self.samples as f64)?.into())
            }
            None => {
                anyhow::bail!("Accuracy must have at least one example before it can be computed.")
            }
        }
    }
}
