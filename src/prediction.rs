//! The output of an evaluation step.

use tch::Tensor;

use crate::error::Result;
use crate::state::{Saveable, StateDict};

/// The output of an evaluation step.
#[derive(Debug)]
pub struct Prediction<P = Tensor, Y = Tensor> {
    /// The output of the model, without gradients.
    pub y_pred: P,
    /// The targets of the batch.
    pub y: Y,
}

impl<P, Y> Prediction<P, Y> {
    /// The pair `(y_pred, y)`, as metrics take it.
    pub fn parts(&self) -> (&P, &Y) {
        (&self.y_pred, &self.y)
    }
}

impl<P: Saveable, Y: Saveable> Saveable for Prediction<P, Y> {
    fn to_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_part("y_pred", self.y_pred.to_state()?);
        state.set_part("y", self.y.to_state()?);
        Ok(state)
    }

    fn from_state(mut state: StateDict) -> Result<Self> {
        let (y_pred, y) = (state.take_part("y_pred")?, state.take_part("y")?);
        Ok(Self { y_pred: P::from_state(y_pred)?, y: Y::from_state(y)? })
    }
}
