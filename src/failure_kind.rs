//! What can go wrong between processes.

use std::fmt;

/// What went wrong between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// A rank did not answer within the time-out: it is frozen, late, or does something else.
    Timeout,
    /// A connection to another rank was closed: it has ended, or gave up because of yet another.
    PeerLost,
    /// The store through which the ranks find each other could not be reached or used.
    Store,
    /// The ranks are not doing the same: other operations, sizes, models, numbers of batches.
    Mismatch,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timeout => "timed out",
            Self::PeerLost => "another rank is lost",
            Self::Store => "the store cannot be used",
            Self::Mismatch => "the ranks differ",
        })
    }
}

/// For the end of an error's text.
pub(crate) fn unanswered(missing: &[usize]) -> String {
    match missing {
        [] => String::new(),
        _ => format!("; ranks that did not answer: {missing:?}"),
    }
}
