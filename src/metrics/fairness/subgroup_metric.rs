use std::collections::HashSet;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::metrics::MetricValue;
use crate::metrics::{Accumulated, Metric, Usage};

/// The `y_pred`, the `y` and the group of each sample, (N,), in an output.
pub type Grouped<'o> = (&'o Tensor, &'o Tensor, &'o Tensor);

/// A metric for each group of samples: ignite's `SubgroupMetric`. The values are in `state.metrics` under
/// `name/group`; groups without samples are left out, and so are samples of other groups.
///
/// `update` picks the samples of each group, which takes a host sync for each group where they are on a GPU.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::fairness::{Grouped, SubgroupMetric};
/// use tch_ignite::metrics::{Accuracy, Metric, pair};
/// let ints = |numbers: &[i64]| Tensor::from_slice(numbers);
/// fn parts(output: &[Tensor; 3]) -> Grouped<'_> {
///     (&output[0], &output[1], &output[2])
/// }
/// let mut metric = SubgroupMetric::of([0, 1], || Accuracy::of(pair), parts);
/// metric.update(&[ints(&[1, 0, 1, 1]), ints(&[1, 0, 0, 1]), ints(&[0, 0, 1, 1])])?;
/// let values = metric.compute()?.flatten("accuracy")?;
/// assert_eq!(values, [("accuracy/0".to_owned(), 1.0), ("accuracy/1".to_owned(), 0.5)]);
/// # anyhow::Ok(())
/// ```
pub struct SubgroupMetric<M, F> {
    groups: Vec<Group<M>>,
    parts: F,
}

crate::debug::opaque_debug!(SubgroupMetric<M, F>);

struct Group<M> {
    label: i64,
    metric: M,
    /// Set once the group has had samples since the last reset.
    seen: bool,
}

impl<M, F> SubgroupMetric<M, F> {
    /// Makes the metric: `metric` makes a metric for each of the groups, and `parts` takes `y_pred`, `y` and the
    /// groups out of the output.
    pub fn of<O>(groups: impl IntoIterator<Item = i64>, metric: impl Fn() -> M, parts: F) -> Self
    where
        M: Metric<(Tensor, Tensor)>,
        F: for<'o> Fn(&'o O) -> Grouped<'o>,
    {
        let group = |label| Group { label, metric: metric(), seen: false };
        Self { groups: groups.into_iter().map(group).collect(), parts }
    }
}

impl<M: Metric<(Tensor, Tensor)>, F> SubgroupMetric<M, F> {
    /// Computes the values of the groups that have had samples since the last reset.
    pub(super) fn values(&self) -> anyhow::Result<Vec<(String, MetricValue)>> {
        let seen = self.groups.iter().filter(|group| group.seen);
        seen.map(|group| Ok((group.label.to_string(), group.metric.compute()?))).collect()
    }
}

impl<M, F> SubgroupMetric<M, F> {
    /// Hands each group its samples, if it has any in this output.
    fn take_in<O>(
        &mut self,
        output: &O,
        take: impl Fn(&mut Group<M>, &(Tensor, Tensor)) -> anyhow::Result<()>,
    ) -> anyhow::Result<()>
    where
        F: for<'o> Fn(&'o O) -> Grouped<'o>,
    {
        let (y_pred, y, labels) = (self.parts)(output);
        let samples = |tensor: &Tensor| tensor.size().first().copied();
        anyhow::ensure!(
            samples(y_pred) == samples(y) && samples(y) == samples(labels) && labels.dim() == 1,
            "y_pred, y, and group_labels must have the same batch size, the latter shape (N,); they are {:?}, {:?} and {:?}",
            y_pred.size(),
            y.size(),
            labels.size()
        );
        let labels = labels.f_to_kind(Kind::Int64)?;
        for group in &mut self.groups {
            let indices = labels.f_eq(group.label)?.f_nonzero()?.f_squeeze_dim(1)?;
            if indices.numel() > 0 {
                let of_group =
                    (y_pred.f_index_select(0, &indices)?, y.f_index_select(0, &indices)?);
                take(group, &of_group)?;
            }
        }
        Ok(())
    }
}

impl<O, M, F> Metric<O> for SubgroupMetric<M, F>
where
    M: Metric<(Tensor, Tensor)>,
    F: for<'o> Fn(&'o O) -> Grouped<'o>,
{
    fn reset(&mut self) {
        for group in &mut self.groups {
            group.metric.reset();
            group.seen = false;
        }
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        self.take_in(output, |group, of_group| {
            group.metric.update(of_group)?;
            group.seen = true;
            Ok(())
        })
    }

    fn observe(&mut self, output: &O) -> anyhow::Result<()> {
        self.take_in(output, |group, of_group| group.metric.observe(of_group))
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        Ok(MetricValue::Named(self.values()?))
    }

    fn usage(&self) -> Usage {
        self.groups.first().map_or(Usage::EpochWise, |group| group.metric.usage())
    }

    fn validate(&self) -> Result<()> {
        let mut labels = HashSet::new();
        if let Some(twice) = self.groups.iter().find(|group| !labels.insert(group.label)) {
            return Err(Error::invalid(format!(
                "the group {} is named twice: give each group a label of its own",
                twice.label
            )));
        }
        self.groups.iter().try_for_each(|group| group.metric.validate())
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = vec![];
        for group in &self.groups {
            for part in group.metric.state()? {
                state.push(Accumulated { name: format!("{}/{}", group.label, part.name), ..part });
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        let labels: Vec<_> = self.groups.iter().map(|group| group.label.to_string()).collect();
        Accumulated::check_prefixes(state, &labels)?;
        for group in &mut self.groups {
            let parts = Accumulated::within(state, &group.label.to_string());
            group.metric.load_state(&parts)?;
            group.seen = !parts.is_empty();
        }
        Ok(())
    }
}
