use std::cell::Cell;

use crate::bridge;
use crate::error::{Error, Result};

/// Calls `call`, and lists the operations in it whose result the CPU has to know, so that it waits for a GPU, by libtorch's
/// names, in their order: values that are read (`aten::_local_scalar_dense` is `item`), results of unknown size
/// (`aten::nonzero`, masks as indices). For tests that keep a training step free of them; like
/// `torch.cuda.set_sync_debug_mode`, but they are found on the CPU too, where they cost nothing.
///
/// Of this thread and of backward's. Not found are copies between devices, what reads the memory of a CPU tensor
/// itself, as `Vec::try_from` does, and waits within kernels. Operations are some microseconds slower while they are
/// watched; calls from several threads wait for each other.
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
/// A call within another one.
pub fn host_syncs<R>(call: impl FnOnce() -> R) -> Result<(R, Vec<String>)> {
    thread_local!(static WATCHING: Cell<bool> = const { Cell::new(false) });
    struct Watching;
    impl Drop for Watching {
        fn drop(&mut self) {
            WATCHING.set(false);
        }
    }

    if WATCHING.replace(true) {
        return Err(Error::invalid("host_syncs was called within host_syncs"));
    }
    let _watching = Watching;
    let failed = |text: String| Error::libtorch("watching for host syncs", text);
    let syncs = bridge::HostSyncs::begin().map_err(failed)?;
    let result = call();
    Ok((result, syncs.end().map_err(failed)?))
}
