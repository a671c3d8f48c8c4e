use std::collections::BTreeMap;

use tch::Tensor;

use crate::error::Result;

/// The input of a model, or its prediction: a tensor, or several.
///
/// Tensors, lists, options, maps by name and tuples of them implement this, and texts and numbers, which hold no tensor.
/// Implement it for a type of your own by calling it on the type's tensors:
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::Result;
/// use tch_ignite::supervised::Tensors;
///
/// struct Tokens {
///     ids: Tensor,
///     mask: Tensor,
/// }
///
/// impl Tensors for Tokens {
///     fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
///         self.ids.each(visit);
///         self.mask.each(visit);
///     }
///
///     fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
///         Ok(Self { ids: self.ids.map(map)?, mask: self.mask.map(map)? })
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no tensor and no tuple, list or map of tensors",
    note = "implement `Tensors` for a type of your own: call `each` and `map` on its tensors"
)]
pub trait Tensors: Sized {
    /// Calls `visit` for each tensor. The first dimension of an input's first tensor counts the samples.
    fn each(&self, visit: &mut dyn FnMut(&Tensor));

    /// Replaces each tensor by what `map` makes of it.
    ///
    /// # Errors
    /// The first error of `map`.
    fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self>;
}

impl Tensors for Tensor {
    fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
        visit(self);
    }

    fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        map(self)
    }
}

impl<T: Tensors> Tensors for Option<T> {
    fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
        self.iter().for_each(|part| part.each(visit));
    }

    fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        std::option::Option::map(self, |part| part.map(map)).transpose()
    }
}

impl<T: Tensors> Tensors for Vec<T> {
    fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
        self.iter().for_each(|part| part.each(visit));
    }

    fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.into_iter().map(|part| part.map(map)).collect()
    }
}

impl<K: Ord, T: Tensors> Tensors for BTreeMap<K, T> {
    fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
        self.values().for_each(|part| part.each(visit));
    }

    fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.into_iter().map(|(name, part)| Ok((name, part.map(map)?))).collect()
    }
}

macro_rules! without_tensors {
    ($($type:ty),*) => {$(
        impl Tensors for $type {
            fn each(&self, _visit: &mut dyn FnMut(&Tensor)) {}

            fn map(self, _map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
                Ok(self)
            }
        }
    )*};
}
without_tensors!((), bool, f32, f64, i64, usize, String);

macro_rules! tuples {
    ($(($($part:ident $index:tt),*)),*) => {$(
        impl<$($part: Tensors),*> Tensors for ($($part,)*) {
            fn each(&self, visit: &mut dyn FnMut(&Tensor)) {
                $(self.$index.each(visit);)*
            }

            fn map(self, map: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
                Ok(($(self.$index.map(map)?,)*))
            }
        }
    )*};
}
tuples!((A 0), (A 0, B 1), (A 0, B 1, C 2), (A 0, B 1, C 2, D 3));

/// The type, shape and device of each tensor, for errors: "Float [8, 3] on Cpu".
pub(super) fn description(tensors: &impl Tensors) -> String {
    let mut texts = vec![];
    tensors.each(&mut |tensor| {
        let kind = tensor.f_kind().map_or("an unknown type".into(), |kind| format!("{kind:?}"));
        texts.push(format!("{kind} {:?} on {:?}", tensor.size(), tensor.device()));
    });
    match texts.is_empty() {
        true => "no tensor".into(),
        false => texts.join(", "),
    }
}
