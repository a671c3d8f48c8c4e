use super::{ProcessGroup, ReduceOp};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;

/// Small messages between all ranks of a group: [`ProcessGroup::control`]. Clones share the group.
///
/// Each call first compares which call all ranks make. If the calls differ, all ranks get a
/// [`FailureKind::Mismatch`](crate::failure_kind::FailureKind::Mismatch), which names ranks and calls, and the group
/// can still be used. A call is one exchange of 512 bytes with every rank, 0.3 ms between two processes of one machine;
/// messages above about 360 bytes need a second exchange. In a job with ranks in Python all calls are errors.
#[derive(Debug, Clone)]
pub struct ControlGroup {
    pg: ProcessGroup,
}

impl ControlGroup {
    pub(super) fn new(pg: ProcessGroup) -> Self {
        Self { pg }
    }

    /// Reduces values over all ranks, element by element and in place. All ranks pass the same number of values. The
    /// values are combined in the order of the ranks, so that all ranks get the same bits.
    ///
    /// # Errors
    /// A mismatch, if ranks pass different numbers of values or different reductions; [`Error::Distributed`].
    pub fn all_reduce_f64(&self, values: &mut [f64], op: ReduceOp) -> Result<()> {
        let Some(turn) = self.pg.turn("all_reduce_f64")? else { return Ok(()) };
        let own: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let name = format!("all_reduce_f64 {op:?} of {} values", values.len());
        let all = turn.exchange(&name, &own)?;
        for (index, value) in values.iter_mut().enumerate() {
            let of_rank = |bytes: &Vec<u8>| {
                let bytes = bytes.get(8 * index..8 * index + 8).and_then(|b| b.try_into().ok());
                bytes.map_or(f64::NAN, f64::from_le_bytes)
            };
            *value = op.fold(all.iter().map(of_rank));
        }
        Ok(())
    }

    /// The bytes of all ranks, in the order of the ranks. Their lengths may differ; each message is padded to the
    /// longest one when it is sent.
    ///
    /// ```
    /// # use tch_ignite::distributed::ProcessGroup;
    /// # let pg = ProcessGroup::single();
    /// let names = pg.control().all_gather_bytes("the machine's name".as_bytes())?;
    /// assert_eq!(names.len(), pg.world_size());
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    ///
    /// # Errors
    /// A mismatch, if another rank makes a different call; [`Error::Distributed`].
    pub fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self.pg.turn("all_gather_bytes")? {
            Some(turn) => turn.exchange("all_gather_bytes", bytes),
            None => Ok(vec![bytes.to_vec()]),
        }
    }

    /// The bytes of all ranks. All ranks must pass the same `occasion`, which names the call in errors.
    pub(crate) fn exchange(&self, occasion: &str, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        match self.pg.turn(occasion)? {
            Some(turn) => turn.exchange(occasion, bytes),
            None => Ok(vec![bytes.to_vec()]),
        }
    }

    /// The bytes that rank `root` passes. The bytes of other ranks are ignored.
    ///
    /// # Errors
    /// There is no rank `root`; a mismatch, if another rank makes a different call;
    /// [`Error::Distributed`].
    pub fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>> {
        self.pg.check_rank(root)?;
        let Some(turn) = self.pg.turn("broadcast_bytes")? else { return Ok(bytes.to_vec()) };
        let own = if self.pg.rank() == root { bytes } else { &[] };
        let mut all = turn.exchange(&format!("broadcast_bytes from {root}"), own)?;
        Ok(all.swap_remove(root))
    }

    /// Waits until all ranks have called this.
    ///
    /// # Errors
    /// A mismatch, if another rank makes a different call; [`Error::Distributed`].
    pub fn barrier(&self) -> Result<()> {
        match self.pg.turn("barrier")? {
            Some(turn) => turn.exchange("barrier", &[]).map(drop),
            None => Ok(()),
        }
    }

    /// Checks that all ranks have the same number of something, such as batches in an epoch.
    ///
    /// # Errors
    /// A mismatch, which names the number of each rank; [`Error::Distributed`].
    ///
    /// ```
    /// # use tch_ignite::distributed::ProcessGroup;
    /// # let pg = ProcessGroup::single();
    /// pg.control().agree("batches in an epoch", 100)?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn agree(&self, what: &str, number: i64) -> Result<()> {
        let Some(turn) = self.pg.turn("agree")? else { return Ok(()) };
        let all = turn.exchange(&format!("agree on {what}"), number.to_string().as_bytes())?;
        if all.iter().all(|other| *other == all[0]) {
            return Ok(());
        }
        let of_rank = |(rank, bytes): (usize, &Vec<u8>)| {
            format!("rank {rank} has {}", String::from_utf8_lossy(bytes))
        };
        let each: Vec<_> = all.iter().enumerate().map(of_rank).collect();
        Err(turn.mismatch(format!("{what}: {}", each.join(", "))))
    }
}
