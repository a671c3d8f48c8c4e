use tch::Tensor;

use super::{Grouped, SelectionRate, SubgroupMetric};
use crate::error::Result;
use crate::metrics::MetricValue;
use crate::metrics::{Accumulated, Accuracy, Metric, Usage, pair};

/// The largest difference of a metric between two groups of samples: ignite's `SubgroupDifference`.
///
/// For a metric whose value is a vector, this is the largest difference of an element. Computing is an error where
/// fewer than two groups have samples. `update` costs the same as that of [`SubgroupMetric`].
pub struct SubgroupDifference<M, F>(SubgroupMetric<M, F>);

crate::debug::opaque_debug!(SubgroupDifference<M, F>);

impl<M, F> SubgroupDifference<M, F> {
    /// Makes the metric: `metric` makes a metric for each of the groups, and `parts` takes `y_pred`, `y` and the
    /// groups out of the output.
    pub fn of<O>(groups: impl IntoIterator<Item = i64>, metric: impl Fn() -> M, parts: F) -> Self
    where
        M: Metric<(Tensor, Tensor)>,
        F: for<'o> Fn(&'o O) -> Grouped<'o>,
    {
        Self(SubgroupMetric::of(groups, metric, parts))
    }
}

impl<O, M, F> Metric<O> for SubgroupDifference<M, F>
where
    M: Metric<(Tensor, Tensor)>,
    F: for<'o> Fn(&'o O) -> Grouped<'o>,
{
    fn reset(&mut self) {
        Metric::<O>::reset(&mut self.0);
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        self.0.update(output)
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        let values = self.0.values()?;
        anyhow::ensure!(
            !values.is_empty(),
            "Fairness metrics must have at least one example before it can be computed."
        );
        anyhow::ensure!(
            values.len() > 1,
            "Fairness metrics require at least two unique subgroups to compute a disparity."
        );
        let values = values.iter().map(|(_, value)| value.tensor()).collect::<Result<Vec<_>>>()?;
        let values = Tensor::f_stack(&values, 0)?;
        let (largest, smallest) = (values.f_amax([0i64], false)?, values.f_amin([0i64], false)?);
        Ok(largest.f_sub(&smallest)?.f_max()?.into())
    }

    fn observe(&mut self, output: &O) -> anyhow::Result<()> {
        self.0.observe(output)
    }

    fn usage(&self) -> Usage {
        Metric::<O>::usage(&self.0)
    }

    fn validate(&self) -> Result<()> {
        Metric::<O>::validate(&self.0)
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        Metric::<O>::state(&self.0)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        Metric::<O>::load_state(&mut self.0, state)
    }
}

macro_rules! difference {
    ($name:ident, $metric:ident, $(#[$doc:meta])*) => {
        $(#[$doc])*
        pub struct $name;

        crate::debug::opaque_debug!($name);

        impl $name {
            /// Makes the metric for these groups; `parts` takes `y_pred`, `y` and the groups out of the output.
            pub fn of<O, F>(
                groups: impl IntoIterator<Item = i64>,
                parts: F,
            ) -> SubgroupDifference<impl Metric<(Tensor, Tensor)>, F>
            where
                F: for<'o> Fn(&'o O) -> Grouped<'o>,
            {
                SubgroupDifference::of(groups, || $metric::of(pair), parts)
            }

            /// Makes the metric for labels, where `y_pred` and `y` are both (N, C, …): ignite's `is_multilabel=True`.
            pub fn multilabel<O, F>(
                groups: impl IntoIterator<Item = i64>,
                parts: F,
            ) -> SubgroupDifference<impl Metric<(Tensor, Tensor)>, F>
            where
                F: for<'o> Fn(&'o O) -> Grouped<'o>,
            {
                SubgroupDifference::of(groups, || $metric::of(pair).is_multilabel(true), parts)
            }
        }
    };
}

difference!(
    SubgroupAccuracyDifference,
    Accuracy,
    /// The largest difference in accuracy between two groups: ignite's `SubgroupAccuracyDifference`.
);

difference!(
    DemographicParityDifference,
    SelectionRate,
    /// The largest difference between two groups in how often a class or label is predicted: ignite's
    /// `DemographicParityDifference`.
);
