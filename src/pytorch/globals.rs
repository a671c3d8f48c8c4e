use std::collections::BTreeSet;
use std::sync::Arc;

use super::dtype::DType;

/// The meaning of a name in a pickle. The known names are those that `torch.load(weights_only=True)` allows. This
/// crate alone gives each its meaning; no code is looked up by such a name.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Counter,
    Set,
    ByteArray,
    Complex,
    /// `_codecs.encode`, with which protocols before 3 write bytes.
    Encode,
    Size,
    Device,
    Layout,
    Parameter,
    /// `torch.Tensor`, as the type that a rebuilt tensor is to have.
    TensorClass,
    Rebuild(Rebuild),
    /// A class of typed storages.
    Storage(DType),
    UntypedStorage,
    /// A constant of PyTorch, such as `torch.float32`.
    Constant,
    /// A function or class of PyTorch that is not built here, or a class that the caller allowed.
    Inert,
    /// A name that is refused. The pickle is still followed to its end, so that the error lists all of them.
    Refused,
}

/// The functions that build tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rebuild {
    Tensor,
    V2,
    V3,
    Parameter,
    ParameterWithState,
    FromType,
}

/// PyTorch's constants that no [`DType`] stands for.
const CONSTANTS: [&str; 26] = [
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bits16",
    "quint2x4",
    "quint4x2",
    "float4_e2m1fn_x2",
    "int1",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "uint1",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
];

/// Functions of `torch._utils` that build tensors which this module does not build. Values show the function and its
/// arguments instead.
const INERT: [&str; 7] = [
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_device_tensor_from_cpu_tensor",
];

/// Modules that Python 3 renamed. Pickles of protocol 2 have Python 2's names.
const MODULES: [(&str, &str); 3] =
    [("__builtin__", "builtins"), ("copy_reg", "copyreg"), ("UserDict", "collections")];

/// The full name of a global, and its meaning.
pub(super) fn find(module: &str, name: &str, allowed: &BTreeSet<String>) -> (Arc<str>, Global) {
    let renamed = MODULES.iter().find(|(old, _)| *old == module).map_or(module, |(_, new)| new);
    let full: Arc<str> = format!("{renamed}.{name}").into();
    let global = known(renamed, name, &full).unwrap_or(match allowed.contains(&*full) {
        true => Global::Inert,
        false => Global::Refused,
    });
    (full, global)
}

fn known(module: &str, name: &str, full: &str) -> Option<Global> {
    let global = match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("collections", "Counter") => Global::Counter,
        ("builtins", "set") => Global::Set,
        ("builtins", "bytearray") => Global::ByteArray,
        ("builtins", "complex") => Global::Complex,
        ("_codecs", "encode") => Global::Encode,
        ("torch", "Size") => Global::Size,
        ("torch", "device") => Global::Device,
        ("torch", "Tensor") => Global::TensorClass,
        ("torch.serialization", "_get_layout") => Global::Layout,
        ("torch.nn.parameter", "Parameter") => Global::Parameter,
        ("torch._tensor", "_rebuild_from_type_v2") => Global::Rebuild(Rebuild::FromType),
        // Torch 1.8 and before had this name of the module.
        ("torch.tensor", "_rebuild_from_type_v2") => Global::Rebuild(Rebuild::FromType),
        ("torch._utils", "_rebuild_tensor") => Global::Rebuild(Rebuild::Tensor),
        ("torch._utils", "_rebuild_tensor_v2") => Global::Rebuild(Rebuild::V2),
        ("torch._utils", "_rebuild_tensor_v3") => Global::Rebuild(Rebuild::V3),
        ("torch._utils", "_rebuild_parameter") => Global::Rebuild(Rebuild::Parameter),
        ("torch._utils", "_rebuild_parameter_with_state") => {
            Global::Rebuild(Rebuild::ParameterWithState)
        }
        ("torch._utils", name) if INERT.contains(&name) => Global::Inert,
        ("torch.storage" | "torch", "UntypedStorage") => Global::UntypedStorage,
        ("torch" | "torch.cuda", class) if class.ends_with("Storage") => {
            Global::Storage(DType::of_storage_class(class)?)
        }
        ("torch", "per_channel_affine_float_qparams") => Global::Constant,
        ("torch", name) if CONSTANTS.contains(&name) => Global::Constant,
        ("torch", _) if DType::named(full).is_some() => Global::Constant,
        _ => return None,
    };
    Some(global)
}
