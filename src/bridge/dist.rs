//! libtorch's process groups; the C++ is in dist.cpp.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};

use tch::Tensor;
use torch_sys::C_tensor;

use super::abi::{Cause, Reduction};
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
        let cause = Cause::try_from(cause).unwrap_or(Cause::Other);
        DistException { cause, text }
    })
}

fn c_string(text: &str) -> Result<CString, DistException> {
    CString::new(text).map_err(DistException::other)
}

/// The address of the store through which ranks find each other, and how this process connects.
#[derive(Debug, Clone)]
pub(crate) struct StoreAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Whether this process serves the store.
    pub(crate) serve: bool,
    /// A socket of this process that listens on `port` already, to serve on.
    pub(crate) listen_fd: Option<i32>,
    /// How often the launcher has restarted the ranks. A launcher may keep one store over restarts, so keys get a
    /// prefix with this number.
    pub(crate) attempt: u32,
}

/// A connection to the key-value store through which processes find each other.
#[derive(Debug)]
pub(crate) struct Store(NonNull<c_void>);

// SAFETY: the TCPStore locks each of its operations, and the PrefixStore around it is never changed.
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
        // SAFETY: `host` ends with NUL and outlives the call; libtorch takes over a listening socket.
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

    /// Waits until all ranks have connected, on the rank that serves the store. Returns at once on other ranks.
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

    /// The value of a key. Waits, at most for the store's time-out, until the key is set.
    pub(crate) fn get(&self, key: &str) -> Result<String, DistException> {
        let key = c_string(key)?;
        let mut value = null_mut();
        // SAFETY: as above.
        dist_checked(|cause, error| unsafe {
            tig_store_get(self.0.as_ptr(), key.as_ptr(), &mut value, cause, error)
        })?;
        // SAFETY: on success `value` is a text that strdup allocated; `taken_text` frees it.
        Ok(unsafe { taken_text(value) })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: tig_store_connect made the store, and it is freed once, here.
        unsafe { tig_store_free(self.0.as_ptr()) }
    }
}

/// The process groups of this process: one for tensors, and one for small messages.
#[derive(Debug)]
pub(crate) struct ProcessGroups {
    raw: NonNull<c_void>,
    world: usize,
}

// SAFETY: the C++ object is not bound to a thread.
unsafe impl Send for ProcessGroups {}
// SAFETY: `ProcessGroup`, the owner, has a lock that lets one thread at a time make calls. `hang_up` is called without
// the lock; it only uses parts that gloo itself locks.
unsafe impl Sync for ProcessGroups {}

impl ProcessGroups {
    /// Connects to all ranks, which make the same call. With `control_timeout_ms` of `None` no group for messages is
    /// made.
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

    // For the SAFETY comments below: the group lives as long as `self`, pointers of live tch tensors are live
    // torch::Tensors, and lists are passed with their lengths.

    /// Reduces tensors of one type and on one device over all ranks, in place. `op` is `ReduceOp::number`.
    pub(crate) fn all_reduce(
        &self,
        tensors: &[&Tensor],
        op: Reduction,
    ) -> Result<(), DistException> {
        let tensors = pointers(tensors);
        // SAFETY: see above.
        dist_checked(|cause, error| unsafe {
            tig_dist_all_reduce(
                self.as_ptr(),
                tensors.as_ptr(),
                tensors.len(),
                op as c_int,
                cause,
                error,
            )
        })
    }

    /// Gives the tensors of all ranks the values of rank `root`, in place.
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

    /// The tensors of all ranks, in order; all ranks pass the same shape and type.
    pub(crate) fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>, DistException> {
        let mut gathered = vec![null_mut(); self.world];
        // SAFETY: see above; `gathered` has room for one pointer of each rank.
        dist_checked(|cause, error| unsafe {
            tig_dist_all_gather(self.as_ptr(), tensor.as_ptr(), gathered.as_mut_ptr(), cause, error)
        })?;
        // SAFETY: on success each is a torch::Tensor that was made with `new` for us and is ours from here on.
        Ok(gathered.into_iter().map(|tensor| unsafe { Tensor::from_ptr(tensor) }).collect())
    }

    /// The bytes of all ranks, one rank after the other; all ranks pass the same number of bytes. Needs the group for
    /// messages.
    pub(crate) fn exchange(&self, own: &[u8]) -> Result<Vec<u8>, DistException> {
        let mut all = vec![0; own.len() * self.world];
        // SAFETY: see above; `all` has room for `own.len()` bytes of each rank. The group for messages exists: callers
        // check that.
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

    /// Closes all connections, so that ranks that wait for this one fail at once.
    pub(crate) fn hang_up(&self) {
        // SAFETY: see above; the C++ side catches its exceptions.
        unsafe { tig_dist_hang_up(self.as_ptr()) }
    }
}

impl Drop for ProcessGroups {
    fn drop(&mut self) {
        // SAFETY: tig_dist_new made the object, and it is freed once, here.
        unsafe { tig_dist_free(self.raw.as_ptr()) }
    }
}

pub(super) fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}
