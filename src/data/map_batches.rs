use std::sync::Arc;

use anyhow::{Context, Result};

use super::SplitMix64;
use crate::guard::guarded;

/// A function of the user's that changes whole batches.
pub(super) type MapFn<B> = dyn Fn(B, &mut SplitMix64) -> Result<B> + Send + Sync;

/// Returns a function that calls `first`, where there is one, and then `next`.
pub(super) fn after<B: 'static>(
    first: Option<Arc<MapFn<B>>>,
    next: impl Fn(B, &mut SplitMix64) -> Result<B> + Send + Sync + 'static,
) -> Arc<MapFn<B>> {
    match first {
        Some(first) => Arc::new(move |batch, rng| next(first(batch, rng)?, rng)),
        None => Arc::new(next),
    }
}

/// Calls `map` without gradients, with the random numbers that belong to a seed, a pass, and the batch's first position
/// in it.
pub(super) fn map_batch<B>(map: &MapFn<B>, batch: B, [seed, pass, first]: [u64; 3]) -> Result<B> {
    let _no_grad = tch::no_grad_guard();
    // The last number keeps them apart from the random numbers of samples.
    let mut rng = SplitMix64::keyed([seed, pass, first, u64::MAX]);
    guarded(|| map(batch, &mut rng))
        .with_context(|| format!("map_batches, at the batch from position {first} of pass {pass}"))
}
