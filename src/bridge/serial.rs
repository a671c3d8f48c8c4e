use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// While a value of this type lives, libtorch's operations on this thread run on this thread alone.
///
/// `at::set_num_threads` would also set the number for threads that start later; OpenMP's own function
/// sets it for the calling thread only.
pub(crate) struct Serial {
    before: c_int,
    /// The setting belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl Serial {
    /// Makes libtorch's operations run on this thread alone. Returns `None`, and changes nothing, if libtorch has no
    /// OpenMP.
    pub(crate) fn begin() -> Option<Self> {
        let open_mp = OpenMp::find()?;
        // libtorch sets a thread's number when the thread first asks for it. Asking now keeps a later
        // question from undoing the change.
        let before = tch::get_num_threads();
        // SAFETY: OpenMP declares this signature; any number above 0 is allowed.
        unsafe { (open_mp.set_num_threads)(1) };
        Some(Self { before, _not_send: PhantomData })
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        if let Some(open_mp) = OpenMp::find() {
            // SAFETY: as above; the number is the one from before, and at least 1.
            unsafe { (open_mp.set_num_threads)(self.before.max(1)) };
        }
    }
}

struct OpenMp {
    set_num_threads: unsafe extern "C" fn(c_int),
}

impl OpenMp {
    /// Finds the OpenMP runtime that libtorch has loaded.
    fn find() -> Option<&'static Self> {
        static FOUND: OnceLock<Option<OpenMp>> = OnceLock::new();
        FOUND
            .get_or_init(|| {
                let address = symbol(c"omp_set_num_threads");
                if address.is_null() {
                    return None;
                }
                // SAFETY: OpenMP declares `void omp_set_num_threads(int)`.
                let set_num_threads = unsafe {
                    std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int)>(address)
                };
                Some(OpenMp { set_num_threads })
            })
            .as_ref()
    }
}

#[cfg(unix)]
fn symbol(name: &std::ffi::CStr) -> *mut c_void {
    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const std::ffi::c_char) -> *mut c_void;
    }
    // RTLD_DEFAULT: search all loaded libraries.
    let anywhere: isize = if cfg!(target_vendor = "apple") { -2 } else { 0 };
    // SAFETY: `name` ends with NUL; dlsym keeps nothing.
    unsafe { dlsym(anywhere as *mut c_void, name.as_ptr()) }
}

#[cfg(not(unix))]
fn symbol(_name: &std::ffi::CStr) -> *mut c_void {
    std::ptr::null_mut()
}
