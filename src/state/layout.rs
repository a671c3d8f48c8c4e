use std::fmt;

use tch::Kind;

/// A tensor of the file: what it is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) shape: Vec<i64>,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of shape {:?}", self.kind, self.shape)
    }
}
