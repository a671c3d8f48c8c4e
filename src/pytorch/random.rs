use tch::{Device, Kind};

use super::value::Value;
use crate::bridge::{generator_state, set_generator_state};
use crate::error::{Error, Result};

/// The state of the CPU's random number generator as a tensor of bytes, which [`write()`](super::write()) can put
/// into a file. `torch.get_rng_state()` returns the same bytes.
///
/// # Errors
/// libtorch's.
pub fn rng_state() -> Result<Value> {
    let state = generator_state(Device::Cpu);
    Value::tensor(&state.map_err(|text| Error::libtorch("reading the generator's state", text))?)
}

/// Sets the CPU's random number generator to a state of `torch.get_rng_state()`: the next random numbers are bit for
/// bit those that Python would have drawn next.
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
