//! The only unsafe code of the crate: parts of libtorch that tch hides, and kernels of our own.
//!
//! `tch::nn::Optimizer` keeps the C++ optimizer private, but tch builds it through the public trait
//! `OptimizerConfig`, whose `build_copt` returns a `tch::COptimizer`: a single pointer. A config of our
//! own ([`Tap`]) calls the real config and notes that pointer on its way. So tch builds its own
//! optimizer as usual, and [`Native`] knows the address of the C++ object inside it.
#![expect(unsafe_code, reason = "this is where the unsafe code of the crate lives")]

mod abi;
mod allocator;
mod autocast;
mod average;
mod batch_norm;
mod compiled;
#[cfg(feature = "distributed")]
mod dist;
mod fused;
mod generator;
mod gradients;
mod host_syncs;
#[cfg(test)]
mod kernel_form;
mod low_precision;
mod memory;
mod normalize;
#[cfg(all(feature = "distributed", unix))]
mod process;
#[cfg(feature = "distributed")]
mod reducer;
mod script;
mod serial;
mod shared_tensor;
mod thread_state;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Mutex, PoisonError};

use tch::nn::{self, OptimizerConfig};
use tch::{COptimizer, TchError, Tensor};
use torch_sys::C_tensor;

use abi::Class;
pub(crate) use abi::{Algorithm, Hyper, LowPrecision, Mode};
#[cfg(feature = "distributed")]
pub(crate) use abi::{Cause, Compression, Reduction};
pub(crate) use allocator::keep_freed;
pub(crate) use autocast::AutocastRegion;
pub(crate) use average::{Average, Pairs};
pub(crate) use batch_norm::BatchNormWatch;
pub(crate) use compiled::{Bound, CompiledProgram, Role, libtorch_version};
#[cfg(feature = "distributed")]
pub(crate) use dist::{DistException, ProcessGroups, Store, StoreAddress};
pub(crate) use fused::StepError;
pub(crate) use generator::{generator_state, set_generator_state};
pub(crate) use host_syncs::HostSyncs;
#[cfg(test)]
pub(crate) use kernel_form::{in_kernel_forms, set_kernel_form};
pub(crate) use low_precision::{is_low_precision, low_precision_value};
pub(crate) use memory::{bytes, bytes_mut, dense_on_cpu};
pub(crate) use normalize::{Rows, normalize_rows};
#[cfg(all(feature = "distributed", unix))]
pub(crate) use process::send_signal;
#[cfg(feature = "distributed")]
pub(crate) use reducer::{Reducer, ReducerOptions};
pub(crate) use script::{Optimized, ScriptBuffers, is_training, save_module};
pub(crate) use serial::Serial;
pub(crate) use shared_tensor::SharedTensor;
pub(crate) use thread_state::ThreadState;

use fused::Plan;

type Raw = *mut c_void;

unsafe extern "C" {
    fn tig_free(text: *mut c_char);
    fn tig_kind(
        optimizer: Raw,
        kind: *mut c_int,
        algorithm: *mut c_int,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_own_new(
        algorithm: c_int,
        hypers: *const c_int,
        values: *const f64,
        count: usize,
        made: *mut Raw,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_group_count(optimizer: Raw) -> usize;
    fn tig_reserve_groups(optimizer: Raw, count: usize, error: *mut *mut c_char) -> c_int;
    fn tig_set_algorithm(
        optimizer: Raw,
        kind: c_int,
        group: usize,
        algorithm: c_int,
        hypers: *const c_int,
        values: *const f64,
        count: usize,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_get(
        optimizer: Raw,
        kind: c_int,
        plan: Raw,
        group: usize,
        option: c_int,
        value: *mut f64,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_set(
        optimizer: Raw,
        kind: c_int,
        plan: Raw,
        group: usize,
        option: c_int,
        value: f64,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_parameter_count(
        optimizer: Raw,
        group: usize,
        count: *mut usize,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_parameters(
        optimizer: Raw,
        group: usize,
        parameters: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_remove_repeated(optimizer: Raw, error: *mut *mut c_char) -> c_int;
    fn tig_warn(text: *const c_char, error: *mut *mut c_char) -> c_int;
    fn tig_tensor_id(tensor: *const C_tensor) -> *const c_void;
    fn tig_zero_grad(optimizer: Raw, error: *mut *mut c_char) -> c_int;
    fn tig_state(
        optimizer: Raw,
        kind: c_int,
        plan: Raw,
        parameter: *const C_tensor,
        found: *mut c_int,
        step: *mut i64,
        tensors: *mut *mut C_tensor,
        kept: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_set_state(
        optimizer: Raw,
        kind: c_int,
        plan: Raw,
        parameter: *const C_tensor,
        step: i64,
        tensors: *const *const C_tensor,
        kept: *const C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_clear_state(
        optimizer: Raw,
        plan: Raw,
        parameter: *const C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_pin_memory(
        tensor: *const C_tensor,
        pinned: *mut *mut C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
    fn tig_set_gradient(
        parameter: *const C_tensor,
        gradient: *const C_tensor,
        error: *mut *mut c_char,
    ) -> c_int;
}

/// The text of a C++ exception.
pub(crate) type BridgeError = String;

// `Tap` reads the address out of a COptimizer, so a COptimizer has to be a pointer and nothing else.
const _: () = assert!(size_of::<COptimizer>() == size_of::<Raw>());
const _: () = assert!(align_of::<COptimizer>() == align_of::<Raw>());

fn checked(call: impl FnOnce(*mut *mut c_char) -> c_int) -> Result<(), BridgeError> {
    let mut error: *mut c_char = null_mut();
    if call(&mut error) == 0 {
        return Ok(());
    }
    if error.is_null() {
        return Err("no message".into());
    }
    // SAFETY: on failure the C++ side leaves a text that strdup allocated there, and we take it once.
    Err(unsafe { taken_text(error) })
}

/// Copies a text from the C++ side and frees the original.
///
/// # Safety
/// `text` is a NUL-terminated string that strdup on the C++ side allocated, and nobody else frees it.
unsafe fn taken_text(text: *mut c_char) -> String {
    // SAFETY: as the caller promises.
    let copy = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: as the caller promises; it is freed once, here.
    unsafe { tig_free(text) };
    copy
}

/// Identifies a tensor of libtorch by the address of its TensorImpl: equal for all shallow clones of a
/// tensor, different for its views.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TensorId(usize);

impl TensorId {
    pub(crate) fn of(tensor: &Tensor) -> Self {
        // SAFETY: the pointer of a live tch tensor is a live torch::Tensor.
        Self(unsafe { tig_tensor_id(tensor.as_ptr()) } as usize)
    }
}

/// Prints a warning through libtorch (a line on stderr). The same text is printed once per process.
pub(crate) fn warn_once(text: &str) {
    static WARNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let is_new = WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(text.to_owned());
    let Some(text) = CString::new(text).ok().filter(|_| is_new) else { return };
    // SAFETY: the text ends with NUL and outlives the call. An error while warning is ignored.
    let _ = checked(|error| unsafe { tig_warn(text.as_ptr(), error) });
}

/// A copy of a tensor in pinned memory. Without CUDA this is an error.
pub(crate) fn pin_memory(tensor: &Tensor) -> Result<Tensor, BridgeError> {
    let mut pinned = null_mut();
    // SAFETY: the pointer of a live tch tensor is a live torch::Tensor.
    checked(|error| unsafe { tig_pin_memory(tensor.as_ptr(), &mut pinned, error) })?;
    // SAFETY: on success the C++ side made a torch::Tensor with `new` for us, and we own it from here on.
    Ok(unsafe { Tensor::from_ptr(pinned) })
}

/// Sets the gradient of a parameter, shared and not copied; `None` removes it.
pub(crate) fn set_gradient(
    parameter: &Tensor,
    gradient: Option<&Tensor>,
) -> Result<(), BridgeError> {
    let gradient = gradient.map_or(null(), tch::Tensor::as_ptr);
    // SAFETY: pointers of live tch tensors are live torch::Tensors; null is allowed for `gradient`.
    checked(|error| unsafe { tig_set_gradient(parameter.as_ptr(), gradient, error) })
}

/// A config that forwards to `inner` and notes the address of the C++ optimizer that `inner` built.
struct Tap<'t, T> {
    inner: &'t T,
    address: &'t Cell<Raw>,
}

impl<T: OptimizerConfig> OptimizerConfig for Tap<'_, T> {
    fn build_copt(&self, lr: f64) -> Result<COptimizer, TchError> {
        let optimizer = self.inner.build_copt(lr)?;
        // SAFETY: a COptimizer is one pointer (asserted above), initialised by build_copt.
        self.address.set(unsafe { *(&raw const optimizer).cast::<Raw>() });
        Ok(optimizer)
    }
}

/// tch's handle of a new optimizer of our own, with these hyper-parameters.
pub(crate) fn own_optimizer(
    algorithm: Algorithm,
    hypers: &[(Hyper, f64)],
) -> Result<COptimizer, BridgeError> {
    let (numbers, values): (Vec<c_int>, Vec<f64>) =
        hypers.iter().map(|(hyper, value)| (*hyper as c_int, *value)).unzip();
    let mut made = null_mut();
    // SAFETY: both lists have the given length.
    checked(|error| unsafe {
        tig_own_new(
            algorithm as c_int,
            numbers.as_ptr(),
            values.as_ptr(),
            values.len(),
            &mut made,
            error,
        )
    })?;
    let made = NonNull::new(made).ok_or("no memory")?;
    // SAFETY: a COptimizer is one pointer (asserted above) to a torch::optim::Optimizer that it owns, and deletes
    // through the virtual destructor. The C++ side made this one with `new` for us.
    Ok(unsafe { std::mem::transmute::<Raw, COptimizer>(made.as_ptr()) })
}

/// The state that is kept for one parameter: the step count (`None` for libtorch's SGD, which does not count)
/// and up to three tensors, in the order of `Algorithm::state_names`.
pub(crate) struct RawState {
    pub(crate) step: Option<i64>,
    pub(crate) tensors: [Option<Tensor>; 3],
    /// A parameter in f16 or bf16 has this beside its state, where its group has a storage of low precision: master
    /// weights (f32), compensation (the parameter's type), or the number of random numbers of stochastic rounding (i64).
    pub(crate) kept: Option<Tensor>,
}

/// tch's optimizer together with the address of the C++ optimizer in it.
#[derive(Debug)]
pub(crate) struct Native {
    pub(crate) tch: nn::Optimizer,
    raw: NonNull<c_void>,
    class: Class,
    pub(crate) algorithm: Algorithm,
    /// How steps are made: fused or by libtorch's loop.
    pub(crate) mode: Mode,
    plan: Plan,
}

// SAFETY: nn::Optimizer is Send, and `raw`, which points into it, is only used through &self or &mut self.
unsafe impl Send for Native {}

impl Native {
    pub(crate) fn build<T: OptimizerConfig>(
        config: &T,
        vs: &nn::VarStore,
        lr: f64,
    ) -> Result<Self, BridgeError> {
        let address = Cell::new(null_mut());
        let tch =
            Tap { inner: config, address: &address }.build(vs, lr).map_err(|e| e.to_string())?;
        let raw = NonNull::new(address.get()).ok_or("tch built no optimizer")?;
        let (mut kind, mut algorithm) = (-1, -1);
        // SAFETY: `raw` is the live optimizer inside `tch`.
        checked(|error| unsafe { tig_kind(raw.as_ptr(), &mut kind, &mut algorithm, error) })?;
        let (class, algorithm) = (Class::try_from(kind)?, Algorithm::try_from(algorithm)?);
        let mut native = Self { tch, raw, class, algorithm, mode: Mode::Fused, plan: Plan::new()? };
        native.remove_repeated()?;
        Ok(native)
    }

    // For the SAFETY comments below: `raw` lives as long as `self.tch`, which owns the C++ object, and
    // the borrow of `self` keeps other threads out.

    pub(crate) fn group_count(&self) -> usize {
        // SAFETY: see above.
        unsafe { tig_group_count(self.raw.as_ptr()) }
    }

    pub(crate) fn reserve_groups(&mut self, count: usize) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe { tig_reserve_groups(self.raw.as_ptr(), count, error) })
    }

    #[inline]
    pub(crate) fn get(&self, group: usize, option: Hyper) -> Result<f64, BridgeError> {
        let mut value = f64::NAN;
        // SAFETY: see above; the C++ side checks `group` and `option`.
        checked(|error| unsafe {
            tig_get(
                self.raw.as_ptr(),
                self.class as c_int,
                self.plan.as_ptr(),
                group,
                option as c_int,
                &mut value,
                error,
            )
        })?;
        Ok(value)
    }

    #[inline]
    pub(crate) fn set(
        &mut self,
        group: usize,
        option: Hyper,
        value: f64,
    ) -> Result<(), BridgeError> {
        // SAFETY: see above; the C++ side checks `group` and `option`.
        checked(|error| unsafe {
            tig_set(
                self.raw.as_ptr(),
                self.class as c_int,
                self.plan.as_ptr(),
                group,
                option as c_int,
                value,
                error,
            )
        })
    }

    /// Sets an option of groups that do not exist yet.
    pub(crate) fn set_default(&mut self, option: Hyper, value: f64) -> Result<(), BridgeError> {
        self.set(usize::MAX, option, value)
    }

    /// Whether groups may have algorithms of their own.
    pub(crate) fn takes_algorithms(&self) -> bool {
        self.class == Class::Own
    }

    /// Gives a group an algorithm, with all its hyper-parameters.
    pub(crate) fn set_algorithm(
        &mut self,
        group: usize,
        algorithm: Algorithm,
        hypers: &[(Hyper, f64)],
    ) -> Result<(), BridgeError> {
        self.settle()?;
        let (numbers, values): (Vec<c_int>, Vec<f64>) =
            hypers.iter().map(|(hyper, value)| (*hyper as c_int, *value)).unzip();
        // SAFETY: see above; both lists have the given length, and the C++ side checks all numbers.
        checked(|error| unsafe {
            tig_set_algorithm(
                self.raw.as_ptr(),
                self.class as c_int,
                group,
                algorithm as c_int,
                numbers.as_ptr(),
                values.as_ptr(),
                values.len(),
                error,
            )
        })
    }

    /// The parameters of a group, in libtorch's order.
    pub(crate) fn parameters(&self, group: usize) -> Result<Vec<Tensor>, BridgeError> {
        let mut count = 0;
        // SAFETY: see above.
        checked(|error| unsafe {
            tig_parameter_count(self.raw.as_ptr(), group, &mut count, error)
        })?;
        let mut parameters = vec![null_mut(); count];
        // SAFETY: see above; there is room for `count` entries, and nothing changes the group between the calls.
        checked(|error| unsafe {
            tig_parameters(self.raw.as_ptr(), group, parameters.as_mut_ptr(), error)
        })?;
        // SAFETY: the C++ side made each with `new` for us, and we own them from here on.
        Ok(parameters.into_iter().map(|tensor| unsafe { Tensor::from_ptr(tensor) }).collect())
    }

    /// Removes the repetitions of a tensor that tch added more than once, in any group. It stays where it was
    /// added first.
    pub(crate) fn remove_repeated(&mut self) -> Result<(), BridgeError> {
        self.settle()?;
        // SAFETY: see above.
        checked(|error| unsafe { tig_remove_repeated(self.raw.as_ptr(), error) })
    }

    pub(crate) fn zero_grad(&mut self) -> Result<(), BridgeError> {
        // SAFETY: see above.
        checked(|error| unsafe { tig_zero_grad(self.raw.as_ptr(), error) })
    }

    /// The state of a parameter; `None` before its first step. The tensors are shared with the optimizer, not
    /// copied.
    pub(crate) fn state(&self, parameter: &Tensor) -> Result<Option<RawState>, BridgeError> {
        self.settle()?;
        let (mut found, mut step) = (0, -1);
        let mut tensors: [*mut C_tensor; 3] = [null_mut(); 3];
        let mut kept = null_mut();
        // SAFETY: see above; `tensors` has room for three.
        checked(|error| unsafe {
            tig_state(
                self.raw.as_ptr(),
                self.class as c_int,
                self.plan.as_ptr(),
                parameter.as_ptr(),
                &mut found,
                &mut step,
                tensors.as_mut_ptr(),
                &mut kept,
                error,
            )
        })?;
        let owned = |tensor: *mut C_tensor| {
            // SAFETY: each is null or a torch::Tensor that was made with `new` for us and is ours from here on.
            (!tensor.is_null()).then(|| unsafe { Tensor::from_ptr(tensor) })
        };
        let (tensors, kept) = (tensors.map(owned), owned(kept));
        let step = (step >= 0).then_some(step);
        Ok((found != 0).then_some(RawState { step, tensors, kept }))
    }

    /// Adds a state tensor of zeros, at index `buffer`, to the parameters of the group that have a state
    /// without it. Zeros are the values that the tensor would have if it had existed without any effect.
    pub(crate) fn add_buffer(&mut self, group: usize, buffer: usize) -> Result<(), BridgeError> {
        let _guard = tch::no_grad_guard();
        for parameter in self.parameters(group)? {
            let Some(mut state) = self.state(&parameter)? else { continue };
            if state.tensors[buffer].is_none() {
                let zeros = parameter.f_zeros_like().and_then(|zeros| match state.kept {
                    Some(_) => zeros.f_to_kind(tch::Kind::Float),
                    None => Ok(zeros),
                });
                state.tensors[buffer] = Some(zeros.map_err(|error| error.to_string())?);
                self.set_state(&parameter, Some(&state))?;
            }
        }
        Ok(())
    }

    /// Sets the state of a parameter, sharing the tensors; `None` removes the state.
    pub(crate) fn set_state(
        &mut self,
        parameter: &Tensor,
        state: Option<&RawState>,
    ) -> Result<(), BridgeError> {
        self.settle()?;
        let Some(state) = state else {
            // SAFETY: see above; the pointer of a live tch tensor is a live torch::Tensor.
            return checked(|error| unsafe {
                tig_clear_state(self.raw.as_ptr(), self.plan.as_ptr(), parameter.as_ptr(), error)
            });
        };
        let tensors = state
            .tensors
            .each_ref()
            .map(|tensor| tensor.as_ref().map_or(null(), tch::Tensor::as_ptr));
        let kept = state.kept.as_ref().map_or(null(), tch::Tensor::as_ptr);
        // SAFETY: see above; `tensors` has three entries, null or live tensors that outlive the call, as is `kept`.
        checked(|error| unsafe {
            tig_set_state(
                self.raw.as_ptr(),
                self.class as c_int,
                self.plan.as_ptr(),
                parameter.as_ptr(),
                state.step.unwrap_or(-1),
                tensors.as_ptr(),
                kept,
                error,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// tch and we must mean one C++ object. This fails first if tch changes its layout.
    #[test]
    fn tch_and_the_bridge_share_one_optimizer() {
        fn check(config: impl OptimizerConfig) {
            let vs = nn::VarStore::new(Device::Cpu);
            let _ = vs.root().ones("w", &[2]);
            let mut native = Native::build(&config, &vs, 0.1).unwrap();
            native.tch.set_lr(0.25);
            assert_eq!(native.get(0, Hyper::Lr).unwrap(), 0.25);
            native.tch.set_weight_decay(0.5);
            assert_eq!(native.get(0, Hyper::WeightDecay).unwrap(), 0.5);
        }
        check(nn::sgd(0.9, 0., 0., false));
        check(nn::Adam::default());
        check(nn::AdamW::default());
        check(nn::RmsProp::default());
    }

    /// The C++ side must refuse a number that has no meaning there, and not take it for another one.
    #[test]
    fn unknown_numbers_are_errors() {
        const UNKNOWN: c_int = 999;
        let vs = nn::VarStore::new(Device::Cpu);
        let w = vs.root().ones("w", &[2]);
        let native = Native::build(&nn::Adam::default(), &vs, 0.1).unwrap();
        let (raw, plan) = (native.raw.as_ptr(), native.plan.as_ptr());
        let (mut value, mut found, mut step) = (0., 0, 0);
        let mut tensors: [*mut C_tensor; 3] = [null_mut(); 3];
        let mut kept = null_mut();
        let w = w.as_ptr();
        // SAFETY: as in the methods of Native that make these calls.
        let refused = unsafe {
            [
                checked(|e| tig_get(raw, UNKNOWN, plan, 0, 0, &mut value, e)),
                checked(|e| tig_get(raw, 1, plan, 0, UNKNOWN, &mut value, e)),
                checked(|e| tig_set(raw, UNKNOWN, plan, 0, 0, 1., e)),
                checked(|e| tig_set(raw, -1, plan, 0, 0, 1., e)),
                checked(|e| {
                    let tensors = tensors.as_mut_ptr();
                    tig_state(raw, UNKNOWN, plan, w, &mut found, &mut step, tensors, &mut kept, e)
                }),
                checked(|e| {
                    tig_set_state(raw, UNKNOWN, plan, w, 1, tensors.as_ptr().cast(), null(), e)
                }),
                native.set_low_precision_number(0, UNKNOWN, 0),
                fused::step_with_numbers(&native, UNKNOWN, 1),
                fused::step_with_numbers(&native, 1, UNKNOWN),
                average::update_with_number(UNKNOWN),
                autocast::enter_device(UNKNOWN),
            ]
        };
        for (index, refused) in refused.into_iter().enumerate() {
            let text = refused.expect_err(&index.to_string());
            assert!(
                text.contains("no such option") || text.contains("knows no"),
                "{index}: {text}"
            );
        }
        assert!(native.state(&vs.variables()["w"]).unwrap().is_none());
    }
}
