use std::rc::Rc;
use std::sync::Arc;

use tch::Tensor;

/// Batches that a vector can give again in each pass: tensors are shared, as by `Tensor::shallow_clone`, all else is
/// cloned.
///
/// Implemented for tensors, numbers, strings, and tuples, lists and options of them. A batch type of your own calls it
/// on its tensors:
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::data::ShallowClone;
/// struct Pair(Tensor, Tensor);
/// impl ShallowClone for Pair {
///     fn shallow_clone(&self) -> Self {
///         Self(self.0.shallow_clone(), self.1.shallow_clone())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "a vector cannot give batches `{Self}` again in each pass",
    note = "implement `ShallowClone` for the batch, or give `restartable(|| batches.iter().cloned())`"
)]
pub trait ShallowClone {
    /// Returns a batch that shares the tensors of this one.
    fn shallow_clone(&self) -> Self;
}

impl ShallowClone for Tensor {
    fn shallow_clone(&self) -> Self {
        Tensor::shallow_clone(self)
    }
}

macro_rules! by_clone {
    ($($type:ty),*) => {$(
        impl ShallowClone for $type {
            fn shallow_clone(&self) -> Self {
                self.clone()
            }
        }
    )*};
}
by_clone!(
    i8,
    i16,
    i32,
    i64,
    i128,
    isize,
    u8,
    u16,
    u32,
    u64,
    u128,
    usize,
    f32,
    f64,
    (),
    bool,
    char,
    String,
    serde_json::Value
);

macro_rules! of_tuples {
    ($(($($type:ident $part:ident),*))*) => {$(
        impl<$($type: ShallowClone),*> ShallowClone for ($($type,)*) {
            fn shallow_clone(&self) -> Self {
                let ($($part,)*) = self;
                ($($part.shallow_clone(),)*)
            }
        }
    )*};
}
of_tuples!((A a) (A a, B b) (A a, B b, C c) (A a, B b, C c, D d) (A a, B b, C c, D d, E e));

impl<T: ShallowClone> ShallowClone for Vec<T> {
    fn shallow_clone(&self) -> Self {
        self.iter().map(T::shallow_clone).collect()
    }
}

impl<T: ShallowClone> ShallowClone for Option<T> {
    fn shallow_clone(&self) -> Self {
        self.as_ref().map(T::shallow_clone)
    }
}

impl<T: ShallowClone, const N: usize> ShallowClone for [T; N] {
    fn shallow_clone(&self) -> Self {
        self.each_ref().map(T::shallow_clone)
    }
}

impl<T: ?Sized> ShallowClone for &T {
    fn shallow_clone(&self) -> Self {
        self
    }
}

impl<T: ?Sized> ShallowClone for Arc<T> {
    fn shallow_clone(&self) -> Self {
        self.clone()
    }
}

impl<T: ?Sized> ShallowClone for Rc<T> {
    fn shallow_clone(&self) -> Self {
        self.clone()
    }
}
