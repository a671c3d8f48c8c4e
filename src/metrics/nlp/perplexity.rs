use tch::{Kind, Tensor};

use super::{double, of_pair};
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce};

/// The exponential of the mean negative log-likelihood of a token: ignite's `Perplexity`.
///
/// `y_pred` are logits, (N, C, …); `y` are class numbers, (N, …). Tokens that are `ignore_index` do not
/// count; the value is NaN where no token counts. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, nlp::Perplexity, pair};
/// let mut metric = Perplexity::of(pair);
/// let logits = Tensor::from_slice2(&[[0., 0.], [0., 0.]]);
/// metric.update(&(logits, Tensor::from_slice(&[1i64, -100])))?;
/// assert!((metric.compute()?.read()? - 2.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct Perplexity {
    ignore_index: i64,
}

impl Default for Perplexity {
    fn default() -> Self {
        Self { ignore_index: -100 }
    }
}

of_pair!(Perplexity);

impl<F> Of<Perplexity, F> {
    /// Sets the class number of tokens that do not count, -100 unless given.
    pub fn ignore_index(self, ignore_index: i64) -> Self {
        self.with(|metric| metric.ignore_index = ignore_index)
    }
}

impl Pairwise for Perplexity {
    const NAME: &'static str = "Perplexity";

    fn parts(&self) -> Parts {
        &[("nll", Reduce::Sum), ("tokens", Reduce::Sum)]
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let (pred, shape) = (y_pred.size(), y.size());
        anyhow::ensure!(
            pred.len() > 1
                && pred.len() == shape.len() + 1
                && pred[0] == shape[0]
                && pred[2..] == shape[1..],
            "y_pred and y have incompatible shapes: y_pred={pred:?}, y={shape:?} (expected (N, C, …) and (N, …))"
        );
        // Compared with a number beyond its kind, a tensor of bytes would wrap that number around.
        let y = &y.f_to_kind(Kind::Int64)?;
        let counted = y.f_ne(self.ignore_index)?;
        let outside = y.f_lt(0)?.f_logical_or(&y.f_ge(pred[1])?)?;
        let wrong = outside.f_logical_and(&counted)?.f_any()?;
        let reason = format!("y has a class outside of [0, {})", pred[1]);
        // Tokens that do not count are looked up as class 0, and masked below.
        let classes = y.f_masked_fill(&outside, 0)?.f_unsqueeze(1)?;
        let log = double(y_pred)?
            .f_log_softmax(1, None)?
            .f_gather(1, &classes, false)?
            .f_squeeze_dim(1)?;
        let nll = log.f_masked_fill(&counted.f_logical_not()?, 0.)?.f_sum(None)?.f_neg()?;
        let parts = [nll, counted.f_sum(Kind::Int64)?];
        Ok(Contribution::new(parts, shape[0] as u64).wrong(vec![(wrong, reason)]))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div(&double(&parts[1])?)?.f_exp()?.into())
    }
}
