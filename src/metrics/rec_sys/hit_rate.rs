use tch::{Kind, TchError, Tensor};

use super::{check, check_top_k, double};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// The share of users with a relevant item among the `k` with the highest scores: ignite's `HitRate`.
///
/// `y_pred` are scores, (N, items); `y` of the same shape is above 0 where an item is relevant. The value is a vector
/// with one element for each `k`. Users without a relevant item do not count unless
/// [`ignore_zero_hits`](Of::ignore_zero_hits) is off; the value is NaN where no user counts. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, rec_sys::HitRate, pair};
/// let mut metric = HitRate::of([1, 2], pair);
/// let scores = Tensor::from_slice2(&[[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]);
/// metric.update(&(scores, Tensor::from_slice2(&[[1i64, 0, 0], [0, 1, 0]])))?;
/// assert_eq!(metric.compute()?.tensor()?, Tensor::from_slice(&[0.5, 1.]));
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct HitRate {
    top_k: Vec<i64>,
    ignore_zero_hits: bool,
}

impl HitRate {
    /// Makes the metric for the `k` items with the highest scores, for each `k` in `top_k`; the value has them in
    /// ascending order. `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(top_k: impl Into<Vec<i64>>, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        let mut top_k = top_k.into();
        top_k.sort_unstable();
        Of::new(Self { top_k, ignore_zero_hits: true }, parts)
    }
}

impl<F> Of<HitRate, F> {
    /// Whether users without a relevant item are left out, which is the default.
    pub fn ignore_zero_hits(self, on: bool) -> Self {
        self.with(|metric| metric.ignore_zero_hits = on)
    }
}

impl Pairwise for HitRate {
    const NAME: &'static str = "HitRate";

    fn parts(&self) -> Parts {
        &[("hits", Reduce::Sum), ("users", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        check_top_k(&self.top_k)
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let largest = self.top_k.last().copied().unwrap_or(1);
        check(y_pred, y, largest)?;
        let users = y.size()[0] as u64;
        let counted = match self.ignore_zero_hits {
            true => y.f_gt(0)?.f_any_dim(-1, false)?,
            false => Tensor::f_ones([users as i64], (Kind::Bool, y.device()))?,
        };
        let (_, best) = y_pred.f_topk(largest, -1, true, true)?;
        let relevant = y.f_gather(-1, &best, false)?.f_gt(0)?;
        let hits = self.top_k.iter().map(|k| {
            let hit = relevant.f_narrow(-1, 0, *k)?.f_any_dim(-1, false)?;
            hit.f_logical_and(&counted)?.f_sum(Kind::Int64)
        });
        let hits = Tensor::f_stack(&hits.collect::<Result<Vec<_>, TchError>>()?, 0)?;
        Ok(Contribution::new([hits, counted.f_sum(Kind::Int64)?], users))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(double(&parts[0])?.f_div(&double(&parts[1])?)?.into())
    }
}
