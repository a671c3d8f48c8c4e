use tch::{Kind, Tensor};

use super::labels::{Case, Labels, both_binary, rows};
use super::{double, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// The share of right predictions: ignite's `Accuracy`.
///
/// * classes: `y_pred` of shape (N, C, …), scores or probabilities of floating point; `y` of shape
///   (N, …), class numbers
/// * binary: `y_pred` and `y` of the same shape (N, …), or `y_pred` with one column (N, 1, …); both
///   0 or 1
/// * [`is_multilabel`](Of::is_multilabel): both of shape (N, C, …), 0 or 1; a sample is right if all
///   its labels are
///
/// Right answers are counted in i64 on the device (a few small kernels an iteration); no host sync.
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
#[derive(Debug, Default)]
pub struct Accuracy {
    labels: Labels,
}

of_pair!(Accuracy);

impl<F> Of<Accuracy, F> {
    /// Counts a sample as right if all its labels are.
    pub fn is_multilabel(self, on: bool) -> Self {
        self.with(|accuracy| accuracy.labels.multilabel = on)
    }
}

impl Pairwise for Accuracy {
    const NAME: &'static str = "Accuracy";
    fn parts(&self) -> Parts {
        &[("right", Reduce::Sum)]
    }

    fn reset(&mut self) {
        self.labels.reset();
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (case, _) = self.labels.case(y_pred, y)?;
        let (right, wrong) = match case {
            Case::Multiclass => (y_pred.f_argmax(1, false)?.f_eq_tensor(y)?, vec![]),
            Case::Binary => (y_pred.f_reshape_as(y)?.f_eq_tensor(y)?, both_binary(y_pred, y)?),
            Case::Multilabel => {
                let right = rows(y_pred)?.f_eq_tensor(&rows(y)?)?.f_all_dim(-1, false)?;
                (right, both_binary(y_pred, y)?)
            }
        };
        let samples = right.numel() as u64;
        Ok(Contribution::new([right.f_sum(Kind::Int64)?], samples).wrong(wrong))
    }

    fn value(&self, parts: &[Tensor], samples: f64) -> anyhow::Result<MetricValue> {
        Ok(double(&parts[0])?.f_div_scalar(samples)?.into())
    }
}
