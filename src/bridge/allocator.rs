//! A setting of the C library: how much freed memory it keeps.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_freed(bytes: usize) -> bool {
    use std::ffi::c_int;
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_MMAP_THRESHOLD: c_int = -3;
    // The largest M_MMAP_THRESHOLD that glibc accepts.
    const LARGEST_FROM_HEAP: c_int = 32 << 20;
    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    // SAFETY: mallopt takes two numbers, and may be called at any time, from any thread.
    unsafe {
        mallopt(M_TRIM_THRESHOLD, bytes) == 1 && mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP) == 1
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_freed(_bytes: usize) -> bool {
    false
}
