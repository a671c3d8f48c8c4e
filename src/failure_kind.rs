//! The kinds of failure between processes.

use std::fmt;

/// The kind of a failure between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// A rank did not answer within the time-out: the rank is frozen, late, or does something else.
    Timeout,
    /// A connection to another rank was closed: that rank has ended, or gave up because of a third one.
    PeerLost,
    /// The store through which the ranks find each other could not be reached or used.
    Store,
    /// The ranks are not doing the same: they differ in operation, size, model or number of batches.
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

/// The end of an error's text: lists the ranks that did not answer, if any.
pub(crate) fn unanswered(missing: &[usize]) -> String {
    match missing {
        [] => String::new(),
        _ => format!("; ranks that did not answer: {missing:?}"),
    }
}
