//! The parameters and buffers of TorchScript modules; the C++ is in script.cpp.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};
use std::slice;

use tch::{CModule, Tensor};
use torch_sys::C_tensor;

use super::{BridgeError, checked};

type Raw = *mut c_void;
type Each = unsafe extern "C" fn(Raw, *const c_char, *mut C_tensor, c_int);
type Written = unsafe extern "C" fn(Raw, *const c_char, usize) -> c_int;

unsafe extern "C" {
    fn tig_script_open(
        module: Raw,
        data: Raw,
        each: Each,
        made: *mut Raw,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_script_free(script: Raw);
    fn tig_script_settle(script: Raw, error: *mut *mut c_char) -> c_int;
    fn tig_script_set_optimized(optimized: c_int) -> c_int;
    fn tig_script_is_training(module: Raw, training: *mut c_int, error: *mut *mut c_char) -> c_int;
    fn tig_script_save(module: Raw, data: Raw, write: Written, error: *mut *mut c_char) -> c_int;
}

const _: () = assert!(size_of::<CModule>() == size_of::<Raw>());
const _: () = assert!(align_of::<CModule>() == align_of::<Raw>());

/// The torch::jit::Module that tch keeps to itself.
fn pointer(module: &CModule) -> Raw {
    // SAFETY: a CModule is one pointer to a torch::jit::Module; size and alignment are compared above.
    unsafe { *std::ptr::from_ref(module).cast::<Raw>() }
}

/// A parameter or buffer of a module, under its name there.
pub(crate) struct ScriptTensor {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
    pub(crate) is_parameter: bool,
}

/// The buffers of a module, which stay the tensors that they were.
pub(crate) struct ScriptBuffers(NonNull<c_void>);

// SAFETY: it owns C++ objects that belong to no thread, and is used by one thread at a time, as it is not Sync.
unsafe impl Send for ScriptBuffers {}

impl ScriptBuffers {
    /// The buffers, and all parameters and buffers in the order of Python's `state_dict()`, shared with the module.
    pub(crate) fn of(module: &CModule) -> Result<(Self, Vec<ScriptTensor>), BridgeError> {
        unsafe extern "C" fn each(
            data: Raw,
            name: *const c_char,
            tensor: *mut C_tensor,
            is_parameter: c_int,
        ) {
            // SAFETY: `data` is the vector below, which nobody else uses meanwhile; the name ends with NUL and the
            // tensor was made with `new` for us.
            let (all, name, tensor) = unsafe {
                let all = &mut *data.cast::<Vec<ScriptTensor>>();
                (all, CStr::from_ptr(name), Tensor::from_ptr(tensor))
            };
            let name = name.to_string_lossy().into_owned();
            all.push(ScriptTensor { name, tensor, is_parameter: is_parameter != 0 });
        }
        let (mut all, mut made) = (Vec::<ScriptTensor>::new(), null_mut());
        let data = std::ptr::from_mut(&mut all).cast();
        // SAFETY: the module is alive, and `each` is called during the call alone, with `data`.
        checked(|error| unsafe { tig_script_open(pointer(module), data, each, &mut made, error) })?;
        let made = NonNull::new(made).ok_or("no buffers were made")?;
        Ok((Self(made), all))
    }

    /// Where the module has put another tensor into a buffer, its value goes into the tensor that it was, which takes
    /// its place again. An error where the shape or type is another.
    pub(crate) fn settle(&self) -> Result<(), BridgeError> {
        // SAFETY: the object is alive.
        checked(|error| unsafe { tig_script_settle(self.0.as_ptr(), error) })
    }
}

impl Drop for ScriptBuffers {
    fn drop(&mut self) {
        // SAFETY: it was made for us, and nobody uses it afterwards.
        unsafe { tig_script_free(self.0.as_ptr()) };
    }
}

/// While it lives, this thread's calls of modules run as they are written, or are optimized after the first.
pub(crate) struct Optimized {
    before: c_int,
    /// The setting is the thread's.
    _not_send: PhantomData<*const ()>,
}

impl Optimized {
    pub(crate) fn set(optimized: bool) -> Self {
        // SAFETY: it sets a number of this thread.
        let before = unsafe { tig_script_set_optimized(optimized.into()) };
        Self { before, _not_send: PhantomData }
    }
}

impl Drop for Optimized {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { tig_script_set_optimized(self.before) };
    }
}

/// Whether a module is in training mode.
pub(crate) fn is_training(module: &CModule) -> Result<bool, BridgeError> {
    let mut training = 0;
    // SAFETY: the module is alive.
    checked(|error| unsafe { tig_script_is_training(pointer(module), &mut training, error) })?;
    Ok(training != 0)
}

/// Writes a module as TorchScript.
pub(crate) fn save_module(module: &CModule, to: &mut dyn Write) -> io::Result<()> {
    struct Target<'t> {
        to: &'t mut dyn Write,
        failed: Option<io::Error>,
    }
    unsafe extern "C" fn write(data: Raw, bytes: *const c_char, count: usize) -> c_int {
        // SAFETY: `data` is the target below, which nobody else uses meanwhile, and there are as many bytes.
        let (target, bytes) = unsafe {
            (&mut *data.cast::<Target<'_>>(), slice::from_raw_parts(bytes.cast::<u8>(), count))
        };
        match target.to.write_all(bytes) {
            Ok(()) => 1,
            Err(error) => {
                target.failed.get_or_insert(error);
                0
            }
        }
    }
    let mut target = Target { to, failed: None };
    let data = std::ptr::from_mut(&mut target).cast();
    // SAFETY: the module is alive, and `write` is called during the call alone, with `data`.
    let saved = checked(|error| unsafe { tig_script_save(pointer(module), data, write, error) });
    match (target.failed, saved) {
        (Some(error), _) => Err(error),
        (None, saved) => saved.map_err(io::Error::other),
    }
}
