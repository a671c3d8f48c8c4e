//! libtorch's process groups; the C++ is in dist.cpp.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{checked, taken_text};

type Raw = *mut c_void;

unsafe extern "C" {
    fn tig_store_connect(
        host: *const c_char,
        port: u16,
        serve: c_int,
        listen_fd: c_int,
        world: usize,
        attempt: i64,
        timeout_ms: i64,
        store: *mut Raw,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_store_wait_for_workers(store: Raw, cause: *mut c_int, error: *mut *mut c_char) -> c_int;
    fn tig_store_set(
        store: Raw,
        key: *const c_char,
        value: *const c_char,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_store_has(
        store: Raw,
        key: *const c_char,
        has: *mut c_int,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_store_get(
        store: Raw,
        key: *const c_char,
        value: *mut *mut c_char,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_store_free(store: Raw);
    fn tig_dist_new(
        store: Raw,
        rank: c_int,
        world: c_int,
        nccl: c_int,
        timeout_ms: i64,
        control_timeout_ms: i64,
        group: *mut Raw,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_dist_free(group: Raw);
    fn tig_dist_all_reduce(
        group: Raw,
        tensors: *const *const C_tensor,
        count: usize,
        op: c_int,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_dist_broadcast(
        group: Raw,
        tensors: *const *const C_tensor,
        count: usize,
        root: c_int,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_dist_all_gather(
        group: Raw,
        tensor: *const C_tensor,
        gathered: *mut *mut C_tensor,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_dist_exchange(
        group: Raw,
        own: *const u8,
        size: usize,
        all: *mut u8,
        cause: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_dist_hang_up(group: Raw);
}

/// Which of c10d's exceptions it was; the numbers are those of dist.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// None of them: gloo's own, or another error.
    Other,
    TimedOut,
    Store,
    Network,
}

/// A C++ exception of c10d.
#[derive(Debug)]
pub(crate) struct DistException {
    pub(crate) cause: Cause,
    pub(crate) text: String,
}

impl DistException {
    pub(super) fn other(text: impl ToString) -> Self {
        Self { cause: Cause::Other, text: text.to_string() }
    }
}

pub(super) fn dist_checked(
    call: impl FnOnce(*mut c_int, *mut *mut c_char) -> c_int,
) -> Result<(), DistException> {
    let mut cause = 0;
    checked(|error| call(&mut cause, error)).map_err(|text| {
        let cause = match cause {
            1 => Cause::TimedOut,
            2 => Cause::Store,
            3 => Cause::Network,
            _ => Cause::Other,
        };
        DistException { cause, text }
    })
}

fn c_string(text: &str) -> Result<CString, DistException> {
    CString::new(text).map_err(DistException::other)
}

/// Where rank 0's store is, and how to come in.
#[derive(Debug, Clone)]
pub(crate) struct StoreAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// This process serves it.
    pub(crate) serve: bool,
    /// A socket that listens on that port already.
    pub(crate) listen_fd: Option<i32>,
    /// Restarts of a launcher that keeps the store.
    pub(crate) attempt: u32,
}

/// A connection to the store of keys through which processes find each other.
#[derive(Debug)]
pub(crate) struct Store(NonNull<c_void>);

// SAFETY: the TCPStore locks each of its operations, and the prefix around it is never changed.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    pub(crate) fn connect(
        address: &StoreAddress,
        world: usize,
        timeout_ms: i64,
    ) -> Result<Self, DistException> {
        let host = c_string(&address.host)?;
        let mut store = null_mut();
        // SAFETY: `host` ends with NUL and outlives the call; a listening socket is taken over.
        dist_checked(|cause, error| unsafe {
            tig_store_connect(
                host.as_ptr(),
                address.port,
                c_int::from(address.serve),
                address.listen_fd.unwrap_or(-1),
                world,
                i64::from(address.attempt),
                timeout_ms,
                &mut store,
                cause,
                error,
            )
        })?;
        NonNull::new(store).map(Self).ok_or_else(|| DistException::other("no store was made"))
    }

    /// On the rank that serves it, waits for the others.
    pub(crate) fn wait_for_workers(&self) -> Result<(), DistException> {
        // SAFETY: the store lives as long as `self`.
        dist_checked(|cause, error| unsafe {
            tig_store_wait_for_workers(self.0.as_ptr(), cause, error)
        })
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Result<(), DistException> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: the store lives as long as `self`; the texts end with NUL and are copied.
        dist_checked(|cause, error| unsafe {
            tig_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr(), cause, error)
        })
    }

    pub(crate) fn has(&self, key: &str) -> Result<bool, DistException> {
        let key = c_string(key)?;
        let mut has = 0;
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe {
            tig_store_has(self.0.as_ptr(), key.as_ptr(), &mut has, cause, error)
        })?;
        Ok(has != 0)
    }

    /// Waits for the key.
    pub(crate) fn get(&self, key: &str) -> Result<String, DistException> {
        let key = c_string(key)?;
        let mut value = null_mut();
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe {
            tig_store_get(self.0.as_ptr(), key.as_ptr(), &mut value, cause, error)
        })?;
        // SAFETY: on success it is a text of strdup that ends with NUL, freed by `taken_text`.
        Ok(unsafe { taken_text(value) })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: made by tig_store_connect, freed once, here.
        unsafe { tig_store_free(self.0.as_ptr()) }
    }
}

/// The process groups: one for tensors, and one for small messages.
#[derive(Debug)]
pub(crate) struct ProcessGroups {
    raw: NonNull<c_void>,
    world: usize,
}

// SAFETY: the C++ object belongs to no thread.
unsafe impl Send for ProcessGroups {}
// SAFETY: its owner lets one thread at a time make calls (`ProcessGroup` has a lock for that), but for
// `hang_up`, which only uses what gloo itself locks.
unsafe impl Sync for ProcessGroups {}

impl ProcessGroups {
    /// `control_timeout_ms` is `None` where there is to be no group for messages.
    pub(crate) fn new(
        store: &Store,
        rank: usize,
        world: usize,
        nccl: bool,
        timeout_ms: i64,
        control_timeout_ms: Option<i64>,
    ) -> Result<Self, DistException> {
        let number = |value: usize| c_int::try_from(value).map_err(DistException::other);
        let (rank, size) = (number(rank)?, number(world)?);
        let mut raw = null_mut();
        // SAFETY: the store is live.
        dist_checked(|cause, error| unsafe {
            tig_dist_new(
                store.0.as_ptr(),
                rank,
                size,
                c_int::from(nccl),
                timeout_ms,
                control_timeout_ms.unwrap_or(-1),
                &mut raw,
                cause,
                error,
            )
        })?;
        let raw = NonNull::new(raw).ok_or_else(|| DistException::other("no group was made"))?;
        Ok(Self { raw, world })
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.raw.as_ptr()
    }

    // In all that follows the group lives as long as `self`, pointers of live tch tensors are live
    // torch::Tensors, and lists are given with their lengths.

    /// In place; all of one type and on one device.
    pub(crate) fn all_reduce(&self, tensors: &[&Tensor], op: i32) -> Result<(), DistException> {
        let tensors = pointers(tensors);
        // SAFETY: see above.
        dist_checked(|cause, error| unsafe {
            tig_dist_all_reduce(self.as_ptr(), tensors.as_ptr(), tensors.len(), op, cause, error)
        })
    }

    /// In place.
    pub(crate) fn broadcast(&self, tensors: &[&Tensor], root: usize) -> Result<(), DistException> {
        let tensors = pointers(tensors);
        // SAFETY: see above; libtorch checks the rank.
        dist_checked(|cause, error| unsafe {
            tig_dist_broadcast(
                self.as_ptr(),
                tensors.as_ptr(),
                tensors.len(),
                root as c_int,
                cause,
                error,
            )
        })
    }

    /// One of every rank, in order.
    pub(crate) fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, DistException> {
        let mut gathered = vec![null_mut(); self.world];
        // SAFETY: see above; `gathered` has room for one of every rank.
        dist_checked(|cause, error| unsafe {
            tig_dist_all_gather(self.as_ptr(), tensor.as_ptr(), gathered.as_mut_ptr(), cause, error)
        })?;
        // SAFETY: on success each is a torch::Tensor made with `new` for us, owned from here on.
        Ok(gathered.into_iter().map(|tensor| unsafe { Tensor::from_ptr(tensor) }).collect())
    }

    /// Those bytes of every rank, one after the other: as many on all. Needs the group for messages.
    pub(crate) fn exchange(&self, own: &[u8]) -> Result<Vec<u8>, DistException> {
        let mut all = vec![0; own.len() * self.world];
        // SAFETY: see above; `all` has room for as many bytes of every rank.
        dist_checked(|cause, error| unsafe {
            tig_dist_exchange(
                self.as_ptr(),
                own.as_ptr(),
                own.len(),
                all.as_mut_ptr(),
                cause,
                error,
            )
        })?;
        Ok(all)
    }

    /// Closes all connections, so that others hear of a failure at once.
    pub(crate) fn hang_up(&self) {
        // SAFETY: see above; the C++ side catches.
        unsafe { tig_dist_hang_up(self.as_ptr()) }
    }
}

impl Drop for ProcessGroups {
    fn drop(&mut self) {
        // SAFETY: made by tig_dist_new, freed once, here.
        unsafe { tig_dist_free(self.raw.as_ptr()) }
    }
}

pub(super) fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}
