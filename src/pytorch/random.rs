use tch::{Device, Kind};

use super::value::Value;
use crate::bridge::{generator_state, set_generator_state};
use crate::error::{Error, Result};

/// The state of the CPU's random numbers, as `torch.get_rng_state()` has it: a tensor of bytes, to be written.
///
/// # Errors
/// libtorch's.
pub fn rng_state() -> Result<Value> {
    let state = generator_state(Device::Cpu);
    Value::tensor(&state.map_err(|text| Error::libtorch("reading the generator's state", text))?)
}

/// Goes on with the CPU's random numbers where `torch.get_rng_state()` was called: they are the same to the bit.
///
/// # Errors
/// A value that is no such state.
pub fn set_rng_state(state: &Value) -> Result<()> {
    let stored = state.as_tensor();
    let stored = stored.ok_or_else(|| {
        Error::State(format!("a {} is no state of a generator", state.type_name()))
    })?;
    let state = stored.tensor()?;
    if state.kind() != Kind::Uint8 {
        return Err(Error::State(format!("{stored:?} is no state of a generator")));
    }
    set_generator_state(Device::Cpu, &state)
        .map_err(|text| Error::libtorch("setting the generator's state", text))
}
