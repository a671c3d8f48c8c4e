//! What an evaluation step returns.

use tch::Tensor;

use crate::error::Result;
use crate::state::{Saveable, StateDict};

/// What an evaluation step returns.
#[derive(Debug)]
pub struct Prediction {
    /// What the model gave, without gradients.
    pub y_pred: Tensor,
    /// The targets of the batch.
    pub y: Tensor,
}

impl Prediction {
    /// Both, as metrics take them.
    pub fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.y_pred, &self.y)
    }
}

impl Saveable for Prediction {
    fn to_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_part("y_pred", self.y_pred.to_state()?);
        state.set_part("y", self.y.to_state()?);
        Ok(state)
    }

    fn from_state(mut state: StateDict) -> Result<Self> {
        let (y_pred, y) = (state.take_part("y_pred")?, state.take_part("y")?);
        Ok(Self { y_pred: Tensor::from_state(y_pred)?, y: Tensor::from_state(y)? })
    }
}
