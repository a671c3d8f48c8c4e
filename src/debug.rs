//! `Debug` for types that hold closures or libtorch's objects.

/// Implements `Debug` for a type by its name alone.
macro_rules! opaque_debug {
    ($type:ident $(<$($parameter:tt),+>)?) => {
        impl $(<$($parameter),+>)? std::fmt::Debug for $type $(<$($parameter),+>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type)).finish_non_exhaustive()
            }
        }
    };
}
pub(crate) use opaque_debug;
