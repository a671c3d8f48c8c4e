//! The form in which kernels run, for tests; the C++ is in kernel_form.cpp.

use std::ffi::{CString, c_char, c_int};
use std::sync::{Mutex, PoisonError};

use super::{BridgeError, checked};

unsafe extern "C" {
    fn tig_set_kernel_form(words: *const c_char, error: *mut *mut c_char) -> c_int;
}

/// Sets the form for all threads (kernel_form.h has the words). Without words it is what it was at the start.
pub(crate) fn set_kernel_form(words: &str) -> Result<(), BridgeError> {
    let words = CString::new(words).map_err(|error| error.to_string())?;
    // SAFETY: `words` ends with NUL, and the C++ side keeps nothing of it.
    checked(|error| unsafe { tig_set_kernel_form(words.as_ptr(), error) })
}

/// Calls `f` while kernels run in each of these forms, except those that this processor has no instructions for, and
/// returns what it returned, beside the forms. Other threads run kernels in the same forms meanwhile, but none of them
/// calls this.
pub(crate) fn in_kernel_forms<'a, T>(
    forms: &[&'a str],
    mut f: impl FnMut() -> T,
) -> Vec<(&'a str, T)> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut found = vec![];
    for form in forms {
        match set_kernel_form(form) {
            Ok(()) => found.push((*form, f())),
            Err(error) => assert!(error.contains("no instructions"), "{error}"),
        }
    }
    set_kernel_form("").expect("the form from before");
    found
}
