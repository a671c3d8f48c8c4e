use tch::{Kind, TchError, Tensor};

use super::{check, check_top_k, double};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Contribution, Of, Pairwise, Parts, Reduce, References};

/// Normalised discounted cumulative gain of the `k` items with the highest scores: ignite's `NDCG`.
///
/// `y_pred` are scores, (N, items); `y` of the same shape are relevances. The value is a vector with one element
/// for each `k`: the mean over users of DCG / ideal DCG, with DCG = Σ gain / log₂(rank + 1). Users without a
/// relevant item do not count unless [`ignore_zero_hits`](Of::ignore_zero_hits) is off; the value is NaN where no
/// user counts. Ties keep their order. No host sync.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, rec_sys::NDCG, pair};
/// let mut metric = NDCG::of([2], pair);
/// let scores = Tensor::from_slice2(&[[0.9, 0.5, 0.1]]);
/// metric.update(&(scores, Tensor::from_slice2(&[[0., 1., 0.]])))?;
/// let value = metric.compute()?.flatten("ndcg")?[0].1;
/// assert!((value - 1. / 3f64.log2()).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
#[derive(Debug)]
pub struct NDCG {
    top_k: Vec<i64>,
    ignore_zero_hits: bool,
    relevance_threshold: f64,
    gain: Gain,
}

impl NDCG {
    /// Makes the metric for the `k` items with the highest scores, for each `k` in `top_k`; the value has them in
    /// ascending order. `parts` takes `y_pred` and `y` out of the output.
    pub fn of<O, F>(top_k: impl Into<Vec<i64>>, parts: F) -> Of<Self, References<F, O>>
    where
        F: for<'o> Fn(&'o O) -> (&'o Tensor, &'o Tensor),
    {
        let mut top_k = top_k.into();
        top_k.sort_unstable();
        Of::new(
            Self { top_k, ignore_zero_hits: true, relevance_threshold: 1., gain: Gain::ExpRank },
            parts,
        )
    }
}

/// How [`NDCG`] turns a relevance into a gain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Gain {
    /// 2 to the power of the relevance, minus 1.
    #[default]
    ExpRank,
    /// The relevance itself.
    LinearRank,
}

impl<F> Of<NDCG, F> {
    /// Whether users without a relevant item are left out, which is the default.
    pub fn ignore_zero_hits(self, on: bool) -> Self {
        self.with(|metric| metric.ignore_zero_hits = on)
    }

    /// Sets the least relevance that counts, 1 unless given.
    pub fn relevance_threshold(self, threshold: f64) -> Self {
        self.with(|metric| metric.relevance_threshold = threshold)
    }

    /// Sets how a relevance becomes a gain; [`Gain::ExpRank`] unless given.
    pub fn gain_function(self, gain: Gain) -> Self {
        self.with(|metric| metric.gain = gain)
    }
}

impl NDCG {
    /// Computes the discounted cumulative gain of the first 1, 2, … ranks of each row: (N, ranks).
    fn dcg(&self, relevances: &Tensor, ranks: i64) -> Result<Tensor, TchError> {
        let relevances = relevances.f_narrow(-1, 0, ranks)?;
        let gains = match self.gain {
            Gain::ExpRank => relevances.f_exp2()?.f_sub_scalar(1.)?,
            Gain::LinearRank => relevances,
        };
        let ranks = Tensor::f_arange(ranks, (gains.kind(), gains.device()))?.f_add_scalar(2.)?;
        gains.f_div(&ranks.f_log2()?)?.f_cumsum(-1, None)
    }
}

impl Pairwise for NDCG {
    const NAME: &'static str = "NDCG";

    fn parts(&self) -> Parts {
        &[("ndcg", Reduce::Sum), ("users", Reduce::Sum)]
    }

    fn validate(&self) -> Result<()> {
        check_top_k(&self.top_k)
    }

    fn batch(&mut self, y_pred: &Tensor, y: &Tensor) -> anyhow::Result<Contribution> {
        let largest = self.top_k.last().copied().unwrap_or(1);
        check(y_pred, y, 1)?;
        let shape = y.size();
        let (users, kept) = (shape[0], largest.min(shape[1]));
        let y = double(y)?;
        let relevant = y.f_ge(self.relevance_threshold)?;
        let counted = match self.ignore_zero_hits {
            true => relevant.f_any_dim(-1, false)?,
            false => Tensor::f_ones([users], (Kind::Bool, y.device()))?,
        };
        let y = y.f_masked_fill(&relevant.f_logical_not()?, 0.)?;
        let (_, order) = y_pred.f_sort_stable(true, -1, true)?;
        let (ideal, _) = y.f_sort(-1, true)?;
        let ranked = y.f_gather(-1, &order, false)?;
        let (dcg, ideal) = (self.dcg(&ranked, kept)?, self.dcg(&ideal, kept)?);
        // Column k − 1 holds the share for the first k ranks.
        let share = dcg.f_div(&ideal)?.f_masked_fill(&ideal.f_le(0.)?, 0.)?;
        let share = share.f_masked_fill(&counted.f_logical_not()?.f_unsqueeze(1)?, 0.)?;
        let sums = share.f_sum_dim_intlist(0i64, false, None)?;
        let sums = self.top_k.iter().map(|k| sums.f_select(0, k.min(&kept) - 1));
        let sums = Tensor::f_stack(&sums.collect::<Result<Vec<_>, TchError>>()?, 0)?;
        Ok(Contribution::new([sums, counted.f_sum(Kind::Int64)?], users as u64))
    }

    fn value(&self, parts: &[Tensor], _samples: f64) -> anyhow::Result<MetricValue> {
        Ok(parts[0].f_div(&double(&parts[1])?)?.into())
    }
}
