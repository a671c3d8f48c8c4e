use std::fmt;

use crate::error::Result;

/// While this lives, parameters have the values that are meant for evaluation; then they get those for training back.
/// Made by [`Stateful::evaluation_weights`](super::Stateful::evaluation_weights).
#[must_use = "the values for training come back when this is dropped"]
pub struct EvaluationWeights {
    put_back: Option<Box<dyn FnOnce() -> Result<()>>>,
}

impl EvaluationWeights {
    /// Calls `put_back` when it is dropped. An error of it is lost, so an optimizer has to refuse steps while the values for
    /// training are not there.
    pub fn new(put_back: impl FnOnce() -> Result<()> + 'static) -> Self {
        Self { put_back: Some(Box::new(put_back)) }
    }
}

impl Drop for EvaluationWeights {
    fn drop(&mut self) {
        if let Some(put_back) = self.put_back.take() {
            let _ = put_back();
        }
    }
}

impl fmt::Debug for EvaluationWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EvaluationWeights").finish_non_exhaustive()
    }
}
