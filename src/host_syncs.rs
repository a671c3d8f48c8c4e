use std::cell::Cell;

use crate::bridge;
use crate::error::{Error, Result};

/// Calls `call`, and lists the operations in it that make the CPU wait for a GPU, by libtorch's names and in their
/// order: values that are read (`aten::_local_scalar_dense` is `item`) and results of unknown size (`aten::nonzero`,
/// masks as indices). Tests can use this to keep a training step free of such waits. It resembles
/// `torch.cuda.set_sync_debug_mode`, but also finds the operations on the CPU, where they cost nothing.
///
/// Operations of this thread and of the threads of backward are listed. Not found are copies between devices, reads of
/// a CPU tensor's memory (as by `Vec::try_from`), and waits within kernels. Operations are some microseconds slower
/// while they are watched. Calls on several threads wait for each other.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::host_syncs;
///
/// let x = Tensor::from_slice(&[1f32, 2., 3.]);
/// let (mean, waits) = host_syncs(|| x.mean(tch::Kind::Float))?;
/// assert!(waits.is_empty());
/// let (_, waits) = host_syncs(|| mean.double_value(&[]))?;
/// assert_eq!(waits, ["aten::_local_scalar_dense"]);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// A call of `host_syncs` within another one.
pub fn host_syncs<R>(call: impl FnOnce() -> R) -> Result<(R, Vec<String>)> {
    thread_local!(static WATCHING: Cell<bool> = const { Cell::new(false) });
    struct Watching;
    impl Drop for Watching {
        fn drop(&mut self) {
            WATCHING.set(false);
        }
    }

    if WATCHING.replace(true) {
        return Err(Error::invalid(
            "host_syncs was called within host_syncs: call it once, around all that is to be watched",
        ));
    }
    let _watching = Watching;
    let failed = |text: String| Error::libtorch("watching for host syncs", text);
    let syncs = bridge::HostSyncs::begin().map_err(failed)?;
    let result = call();
    Ok((result, syncs.end().map_err(failed)?))
}
