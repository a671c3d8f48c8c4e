//! States: the values and tensors that something needs to go on exactly. This module knows nothing of files.

mod evaluation_weights;
pub(crate) mod json_floats;
mod layout;
mod saveable;
mod state_dict;
mod stateful;
mod strides;
pub(crate) mod tree;

pub use evaluation_weights::EvaluationWeights;
pub(crate) use layout::Layout;
pub use saveable::Saveable;
pub use state_dict::{StateDict, Stateful};
pub use stateful::{IntoStateful, SavedGradients};
pub(crate) use stateful::{copy_variables, layout_misfits, misfits, variables_of};
