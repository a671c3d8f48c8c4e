//! Differences of a metric between groups of samples: ignite's `ignite.metrics.fairness`.
//!
//! A third tensor in the output, (N,) of whole numbers, tells the group of each sample.

mod subgroup_difference;
mod subgroup_metric;

pub use super::classification::SelectionRate;
pub use subgroup_difference::{
    DemographicParityDifference, SubgroupAccuracyDifference, SubgroupDifference,
};
pub use subgroup_metric::{Grouped, SubgroupMetric};
