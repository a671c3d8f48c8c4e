//! How much a metric differs between groups of samples: ignite's `ignite.metrics.fairness`.
//!
//! Groups are told by a third tensor in the output, (N,) of whole numbers.

mod subgroup_difference;
mod subgroup_metric;

pub use super::classification::SelectionRate;
pub use subgroup_difference::{
    DemographicParityDifference, SubgroupAccuracyDifference, SubgroupDifference,
};
pub use subgroup_metric::{Grouped, SubgroupMetric};
