//! Metrics of generated samples: ignite's `ignite.metrics.gan`.
//!
//! Both look at features, which a closure of yours extracts: a network such as Inception, or the identity
//! (`|x| Ok(x.shallow_clone())`) where the step gives features already. Values are comparable only between
//! the same extractor's.

mod fid;
mod inception_score;

pub use fid::FID;
pub use inception_score::InceptionScore;

use tch::Tensor;

use super::to_value::double;
use crate::error::{Error, Result};

fn check_num_features(num_features: i64) -> Result<()> {
    match num_features > 0 {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "Argument num_features must be greater to zero, got: {num_features}"
        ))),
    }
}

/// What the extractor gives, (N, num_features) in the accumulator's type.
fn extract(
    extractor: &impl Fn(&Tensor) -> anyhow::Result<Tensor>,
    num_features: i64,
    samples: &Tensor,
) -> anyhow::Result<Tensor> {
    let features = tch::no_grad(|| extractor(samples))?;
    let shape = features.size();
    anyhow::ensure!(
        shape.len() == 2,
        "feature_extractor output must be a tensor of dim 2, got: {}",
        shape.len()
    );
    anyhow::ensure!(
        shape[1] == num_features,
        "num_features returned by feature_extractor should be {num_features}, got: {}",
        shape[1]
    );
    Ok(double(&features.f_detach()?)?)
}
