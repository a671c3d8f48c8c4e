//! The states of libtorch's random number generators, as part of an engine's state.

use tch::{Device, Kind, Tensor};

use super::Engine;
use super::restored::Report;
use crate::bridge::{generator_state, set_generator_state};
use crate::error::{Error, Result};
use crate::state::StateDict;

/// The name of the part with the random numbers.
pub(super) const RNG: &str = "rng";

/// The part of the random numbers with the states from before the pass under way.
pub(super) const BEFORE_PASS: &str = "before_pass";

impl<'a, C, B, O> Engine<'a, C, B, O> {
    /// The states of libtorch's random number generators, and their states from before the pass under way where the
    /// data may have drawn its order from them.
    pub(super) fn random_numbers(&self) -> Result<StateDict> {
        let mut random = generators()?;
        if let Some(before) =
            self.position.before_pass.as_ref().filter(|_| self.position.is_within_pass())
        {
            random.set_part(BEFORE_PASS, shared(before));
        }
        Ok(random)
    }

    /// Sets the restored random numbers once more, because numbers that were drawn between restoring and running do not
    /// count.
    pub(super) fn restore_random_numbers(&mut self) -> Result<()> {
        self.random.take().map_or(Ok(()), load_generators_strictly)
    }
}

/// Calls `call`, and sets libtorch's random number generators (of the CPU and of each CUDA device) back to where they
/// were before: ignite's `keep_random_state`. After an evaluation that draws random numbers, training goes on as if it
/// had not been. [`Evaluate::keep_random_state`](crate::handlers::Evaluate::keep_random_state) does this for evaluators
/// within a trainer. Costs a copy of each generator's state, 5 KB on the CPU.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_ignite::engine::keep_random_state;
/// let draw = || Tensor::rand([3], (Kind::Float, Device::Cpu));
/// let within = keep_random_state(|| Ok(draw()))?;
/// assert_eq!(within, draw());
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// # Errors
/// The errors of `call`; libtorch cannot read or set a generator. A panic of `call` goes on once the generators are set.
pub fn keep_random_state<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    /// Sets the generators back also where the call panics.
    struct Kept(Option<StateDict>);

    impl Drop for Kept {
        fn drop(&mut self) {
            if let Some(before) = self.0.take() {
                // The panic is what its catcher has to hear of.
                let _ = load_generators_strictly(before);
            }
        }
    }

    let mut kept = Kept(Some(generators()?));
    let result = call();
    let restored = kept.0.take().map_or(Ok(()), load_generators_strictly);
    match (result, restored) {
        (Ok(value), restored) => restored.map(|()| value),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(second)) => Err(error.besides(second)),
    }
}

/// The devices with generators of their own, by the names under which their states are saved.
fn generator_devices() -> Vec<(String, Device)> {
    let mut devices = vec![("cpu".to_owned(), Device::Cpu)];
    if tch::Cuda::is_available() {
        let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
        devices.extend((0..count).map(|index| (format!("cuda:{index}"), Device::Cuda(index))));
    }
    devices
}

/// A state with the same tensors, not copied.
fn shared(state: &StateDict) -> StateDict {
    let mut shared = StateDict::new();
    state.tensors().for_each(|(name, tensor)| shared.set_tensor(name, tensor.shallow_clone()));
    shared
}

/// Whether two sets of generator states are equal.
pub(super) fn same_generators(a: &StateDict, b: &StateDict) -> bool {
    let same = |name: &str, tensor: &Tensor| {
        b.tensor(name).is_ok_and(|other| tensor.f_equal(other).unwrap_or(false))
    };
    a.tensors().all(|(name, tensor)| same(name, tensor))
}

/// Sets the generators to states that [`generators`] gave, in this process or another.
pub(super) fn set_generators(states: &StateDict) -> Result<()> {
    load_generators_strictly(shared(states))
}

/// The states of the default generators of the CPU and of each CUDA device, by device; `u8` tensors on the CPU.
pub(super) fn generators() -> Result<StateDict> {
    let mut states = StateDict::new();
    for (name, device) in generator_devices() {
        let state = generator_state(device)
            .map_err(|text| Error::libtorch(format!("saving the generator of {name}"), text))?;
        states.set_tensor(&name, state);
    }
    Ok(states)
}

pub(super) fn load_generators_strictly(states: StateDict) -> Result<()> {
    load_generators(Some(states), &mut Report::strict())
}

pub(super) fn load_generators(states: Option<StateDict>, report: &mut Report) -> Result<()> {
    let Some(mut states) = states else {
        return report.note(format!("the state has no part '{RNG}'"));
    };
    for (name, device) in generator_devices() {
        match states.tensors.remove(&name) {
            None => report.restored.ignored.push(format!("no random numbers of {name} were saved")),
            Some(state) if state.kind() != Kind::Uint8 || state.dim() != 1 => {
                report.note(format!("the saved random numbers of {name} are not bytes"))?;
            }
            Some(state) => {
                set_generator_state(device, &state).map_err(|text| {
                    Error::libtorch(format!("restoring the generator of {name}"), text)
                })?;
                report.restored.parts.push(format!("random numbers of {name}"));
            }
        }
    }
    for name in states.tensors.keys() {
        report.restored.ignored.push(format!("random numbers of {name}, which is not here"));
    }
    Ok(())
}
