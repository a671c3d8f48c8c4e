//! Programs that PyTorch compiled ahead of time; the C++ is in compiled.cpp.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{NonNull, null_mut};

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{BridgeError, checked};

type Raw = *mut c_void;
type Each = unsafe extern "C" fn(Raw, *mut C_tensor);

unsafe extern "C" {
    fn tig_libtorch_version() -> *const c_char;
    fn tig_compiled_load(
        path: *const c_char,
        device: c_int,
        tensors: *const *const C_tensor,
        names: *const *const c_char,
        roles: *const c_int,
        count: usize,
        made: *mut Raw,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_compiled_free(program: Raw);
    fn tig_compiled_run(
        program: Raw,
        inputs: *const *const C_tensor,
        count: usize,
        data: Raw,
        each: Each,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_compiled_step(
        program: Raw,
        inputs: *const *const C_tensor,
        count: usize,
        outputs: usize,
        data: Raw,
        each: Each,
        error: *mut *mut c_char,
    ) -> c_int;
}

/// The version of libtorch that this was compiled with, such as 2.13.0.
pub(crate) fn libtorch_version() -> &'static str {
    // SAFETY: it is a literal of the C++ side.
    unsafe { CStr::from_ptr(tig_libtorch_version()) }.to_str().unwrap_or_default()
}

/// The part that a parameter or buffer has in a step. The numbers are those of compiled.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Role {
    /// A parameter that the export left out of the backward.
    Frozen = 0,
    /// A parameter whose gradient the step returns.
    Trained = 1,
    /// A parameter that the loss does not depend on.
    Unused = 2,
    /// A buffer that is only read.
    Buffer = 3,
    /// A buffer whose new value the step returns.
    Updated = 4,
}

/// A parameter or buffer of a program: the store's tensor, under its name.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
    pub(crate) role: Role,
}

/// A program in memory, with the parameters and buffers that it works on.
pub(crate) struct CompiledProgram(NonNull<c_void>);

// SAFETY: it owns C++ objects that belong to no thread, and is used by one thread at a time, as it is not Sync.
unsafe impl Send for CompiledProgram {}

impl CompiledProgram {
    /// Loads a package. This runs code of the package.
    pub(crate) fn load(
        package: &Path,
        device: Device,
        bound: &[Bound],
    ) -> Result<Self, BridgeError> {
        let text = |error: std::ffi::NulError| error.to_string();
        let path = package.to_str().ok_or("the path is not UTF-8")?;
        let path = CString::new(path).map_err(text)?;
        let names = bound.iter().map(|bound| CString::new(bound.name.as_str()));
        let names = names.collect::<Result<Vec<_>, _>>().map_err(text)?;
        let names: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let tensors: Vec<_> = bound.iter().map(|bound| bound.tensor.as_ptr()).collect();
        let roles: Vec<_> = bound.iter().map(|bound| bound.role as c_int).collect();
        let device = match device {
            Device::Cuda(index) => c_int::try_from(index).map_err(|error| error.to_string())?,
            _ => -1,
        };
        let mut made = null_mut();
        // SAFETY: all texts end with NUL, all tensors are alive, and each array has `count` entries.
        checked(|error| unsafe {
            tig_compiled_load(
                path.as_ptr(),
                device,
                tensors.as_ptr(),
                names.as_ptr(),
                roles.as_ptr(),
                bound.len(),
                &mut made,
                error,
            )
        })?;
        NonNull::new(made).map(Self).ok_or_else(|| "no program was made".into())
    }

    /// Runs an evaluation: its outputs.
    pub(crate) fn run(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, BridgeError> {
        let inputs: Vec<_> = inputs.iter().map(|input| input.as_ptr()).collect();
        // SAFETY: program and inputs are alive, and `collect` is called during the call alone, with the vector.
        outputs_of(|data, error| unsafe {
            tig_compiled_run(self.0.as_ptr(), inputs.as_ptr(), inputs.len(), data, collect, error)
        })
    }

    /// Runs a training step, which updates the buffers: the loss, whose backward gives the parameters their gradients, and
    /// as many further `outputs`.
    pub(crate) fn step(
        &self,
        inputs: &[&Tensor],
        outputs: usize,
    ) -> Result<Vec<Tensor>, BridgeError> {
        let inputs: Vec<_> = inputs.iter().map(|input| input.as_ptr()).collect();
        // SAFETY: as above.
        outputs_of(|data, error| unsafe {
            tig_compiled_step(
                self.0.as_ptr(),
                inputs.as_ptr(),
                inputs.len(),
                outputs,
                data,
                collect,
                error,
            )
        })
    }
}

impl Drop for CompiledProgram {
    fn drop(&mut self) {
        // SAFETY: it was made for us, and nobody uses it afterwards.
        unsafe { tig_compiled_free(self.0.as_ptr()) };
    }
}

unsafe extern "C" fn collect(data: Raw, tensor: *mut C_tensor) {
    // SAFETY: `data` is the vector of `outputs_of`, which nobody else uses meanwhile, and the tensor was made with
    // `new` for us.
    unsafe { (*data.cast::<Vec<Tensor>>()).push(Tensor::from_ptr(tensor)) };
}

fn outputs_of(
    call: impl FnOnce(Raw, *mut *mut c_char) -> c_int,
) -> Result<Vec<Tensor>, BridgeError> {
    let mut outputs = Vec::<Tensor>::new();
    let data = std::ptr::from_mut(&mut outputs).cast();
    checked(|error| call(data, error))?;
    Ok(outputs)
}
