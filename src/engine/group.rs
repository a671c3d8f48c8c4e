//! The group of processes that an engine belongs to.

use crate::distributed::ProcessGroup;
use crate::error::Result;

/// A group of at least two processes.
#[derive(Clone)]
pub(super) struct Group(ProcessGroup);

impl Group {
    /// `None` for a group of one process.
    pub(super) fn new(pg: &ProcessGroup) -> Option<Self> {
        (pg.world_size() > 1).then(|| Self(pg.clone()))
    }

    pub(super) fn ranks(&self) -> usize {
        self.0.world_size()
    }

    pub(super) fn rank(&self) -> usize {
        self.0.rank()
    }

    /// Sends a message to all ranks and returns the messages of all, by rank. Every rank must name the same occasion;
    /// the error says what each of them named.
    pub(super) fn exchange(&self, occasion: &str, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.control().exchange(occasion, message)
    }

    /// Checks that all ranks name the same number.
    pub(super) fn agree(&self, what: &str, number: i64) -> Result<()> {
        self.0.control().agree(what, number)
    }
}
