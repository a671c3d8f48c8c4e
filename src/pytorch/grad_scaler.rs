//! The state of torch's `GradScaler`, both ways.

use super::json::{dict, object};
use super::value::Value;
use crate::amp::GradScaler;
use crate::error::{Error, Result};

/// The state of a scaler for `scaler.load_state_dict()` of torch's `GradScaler`, which does not count skipped steps.
/// Costs a host sync on CUDA.
///
/// # Errors
/// libtorch cannot read a tensor.
pub fn grad_scaler_value(scaler: &GradScaler) -> Result<Value> {
    let mut state = scaler.state_dict()?;
    state.remove("skipped");
    Ok(dict(&state).into())
}

/// Goes on where torch's `GradScaler` was: `saved` is its `state_dict()`, of which
/// [`TrainingFile::grad_scaler`](super::TrainingFile::grad_scaler) finds the only one of a file. Skipped steps are
/// counted from 0.
///
/// ```
/// use tch_ignite::amp::GradScaler;
/// use tch_ignite::pytorch;
/// let there = GradScaler::new().init_scale(1024.)?;
/// // For Python: scaler.load_state_dict(checkpoint["scaler"])
/// let saved = pytorch::grad_scaler_value(&there)?;
/// // Of Python: scaler.state_dict()
/// let here = GradScaler::new();
/// pytorch::load_grad_scaler(&here, &saved)?;
/// assert_eq!(here.get_scale()?, 1024.);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// A state of anything else, or of a scaler that was off in Python, which is empty; numbers that a scaler cannot have.
/// Nothing is changed then.
pub fn load_grad_scaler(scaler: &GradScaler, saved: &Value) -> Result<()> {
    let fault = |why: &str| Error::State(format!("the scaler's state: {why}"));
    let saved = saved.as_dict().ok_or_else(|| fault(&format!("it is a {}", saved.type_name())))?;
    match saved.is_empty() {
        true => Err(fault("it is empty, as that of a scaler with enabled=False")),
        false => scaler.load_state_dict(&object(saved)?),
    }
}
