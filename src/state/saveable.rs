use tch::Tensor;

use super::StateDict;
use crate::error::{Error, Result};

/// A value that a checkpoint can hold, such as the output of a step: see
/// [`Engine::track_output`](crate::engine::Engine::track_output).
///
/// Numbers, texts, tensors (saved without their graph), and options, lists and tuples of these implement this trait.
/// Implement it for your own type by putting the type's parts into a [`StateDict`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be part of a checkpoint",
    note = "numbers, texts, tensors, and options, lists and tuples of these can; for a type of your own implement `Saveable`"
)]
pub trait Saveable: Sized {
    /// Turns the value into a state.
    ///
    /// # Errors
    /// A part cannot be saved.
    fn to_state(&self) -> Result<StateDict>;

    /// Turns a state back into the value.
    ///
    /// # Errors
    /// A part is missing or has another type; the text names it.
    fn from_state(state: StateDict) -> Result<Self>;
}

const VALUE: &str = "value";

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Saveable for $type {
            fn to_state(&self) -> Result<StateDict> {
                let mut state = StateDict::new();
                state.set_value(VALUE, self)?;
                Ok(state)
            }

            fn from_state(state: StateDict) -> Result<Self> {
                state.value(VALUE)
            }
        }
    )*};
}
plain!((), bool, f32, f64, i8, i16, i32, i64, isize, u8, u16, u32, u64, usize, String);

impl Saveable for Tensor {
    fn to_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let detached =
            self.f_detach().map_err(|error| Error::libtorch("saving a tensor", error))?;
        state.set_tensor(VALUE, detached);
        Ok(state)
    }

    fn from_state(mut state: StateDict) -> Result<Self> {
        state.take_tensor(VALUE)
    }
}

impl<T: Saveable> Saveable for Option<T> {
    fn to_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        if let Some(value) = self {
            state.set_part(VALUE, value.to_state()?);
        }
        Ok(state)
    }

    fn from_state(mut state: StateDict) -> Result<Self> {
        state.parts.remove(VALUE).map(T::from_state).transpose()
    }
}

impl<T: Saveable> Saveable for Vec<T> {
    fn to_state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_value("len", self.len())?;
        for (index, value) in self.iter().enumerate() {
            state.set_part(&index.to_string(), value.to_state()?);
        }
        Ok(state)
    }

    fn from_state(mut state: StateDict) -> Result<Self> {
        let len: usize = state.value("len")?;
        (0..len).map(|index| T::from_state(state.take_part(&index.to_string())?)).collect()
    }
}

macro_rules! tuples {
    ($(($($part:ident $index:tt),*)),*) => {$(
        impl<$($part: Saveable),*> Saveable for ($($part,)*) {
            fn to_state(&self) -> Result<StateDict> {
                let mut state = StateDict::new();
                $(state.set_part(stringify!($index), self.$index.to_state()?);)*
                Ok(state)
            }

            fn from_state(mut state: StateDict) -> Result<Self> {
                Ok(($($part::from_state(state.take_part(stringify!($index))?)?,)*))
            }
        }
    )*};
}
tuples!((A 0), (A 0, B 1), (A 0, B 1, C 2), (A 0, B 1, C 2, D 3));
