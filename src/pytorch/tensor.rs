use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::dtype::DType;
use super::storage::Storage;
use crate::bridge::{bytes, bytes_mut};
use crate::error::{Error, Result};

/// A tensor of a file: its type and shape are known, and its elements are read when the caller asks for them.
///
/// Tensors that share memory in the file share it here: [`tensor`](Self::tensor) gives views of one storage,
/// which is read once. Everything is on the CPU, wherever it was when it was saved.
pub struct StoredTensor {
    pub(super) memory: Memory,
    pub(super) dtype: DType,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
    /// In elements, from the beginning of the storage.
    pub(super) offset: i64,
    pub(super) requires_grad: bool,
    /// Whether the tensor is an `nn.Parameter` and no plain tensor.
    pub(super) parameter: bool,
    /// Whether the elements are the conjugates, or the negatives, of what is stored.
    pub(super) conjugate: bool,
    pub(super) negative: bool,
    /// Whether this stands for a whole storage that the pickle uses as a value, in one dimension.
    pub(super) bare: bool,
}

/// [`StoredTensor::to_bytes`] gathers up to this many bytes of an expanded tensor, however small its storage is.
const FREE_EXPANSION: u64 = 64 << 20;

/// The memory that holds a tensor's elements.
pub(super) enum Memory {
    File(Arc<Storage>),
    /// A tensor of this program, which may share its memory with others. The mutex is there because tch's tensors may
    /// be sent to another thread, but two threads may not use one at once.
    Program(Mutex<Tensor>),
}

impl StoredTensor {
    /// Wraps a tensor of this program, so that it can be written to a file. The memory is shared, not copied.
    ///
    /// # Errors
    /// A tensor that is undefined, sparse or quantized.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let refused = |why: &str| Err(Error::invalid(format!("a tensor cannot be saved: {why}")));
        if !tensor.defined() {
            return refused("it is undefined");
        }
        if tensor.is_sparse() {
            return refused("it is sparse; make it dense first");
        }
        let kind = tensor.f_kind().map_err(|error| Error::libtorch("saving a tensor", error))?;
        let Some(dtype) = DType::from_kind(kind).filter(|dtype| !dtype.is_quantized()) else {
            return refused(&format!("it is of type {kind:?}"));
        };
        // Lazily conjugated or negated elements are written as the values that they stand for.
        let tensor = tensor
            .f_resolve_conj()
            .and_then(|tensor| tensor.f_resolve_neg())
            .map_err(|error| Error::libtorch("saving a tensor", error))?;
        Ok(Self {
            dtype,
            shape: tensor.size(),
            strides: tensor.stride(),
            offset: 0,
            requires_grad: tensor.requires_grad(),
            parameter: false,
            conjugate: false,
            negative: false,
            bare: false,
            memory: Memory::Program(Mutex::new(tensor)),
        })
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Length of each dimension.
    pub fn size(&self) -> &[i64] {
        &self.shape
    }

    /// How far apart, in elements, neighbours in each dimension are in memory.
    pub fn stride(&self) -> &[i64] {
        &self.strides
    }

    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Whether autograd recorded gradients for the tensor.
    pub fn requires_grad(&self) -> bool {
        self.requires_grad
    }

    /// Whether the tensor was saved as an `nn.Parameter`.
    pub fn is_parameter(&self) -> bool {
        self.parameter
    }

    /// Whether both tensors are views of one storage of a file.
    pub fn shares_storage_with(&self, other: &Self) -> bool {
        match (&self.memory, &other.memory) {
            (Memory::File(one), Memory::File(two)) => Arc::ptr_eq(one, two),
            _ => false,
        }
    }

    /// The tensor, with the strides it has in the file. The first call for a storage reads all of it, and
    /// the storage stays in memory while this value or one of its tensors lives. Tensors of one storage
    /// share their memory, also with later calls: copy before changing one alone.
    ///
    /// # Errors
    /// The file cannot be read or its checksum is wrong; a type that tch does not have.
    pub fn tensor(&self) -> Result<Tensor> {
        self.view().map_err(|why| Error::State(format!("{self:?} cannot be read: {why}")))
    }

    pub(super) fn view(&self) -> Result<Tensor, String> {
        let storage = match &self.memory {
            Memory::File(storage) => storage,
            Memory::Program(tensor) => {
                return Ok(tensor.lock().unwrap_or_else(PoisonError::into_inner).shallow_clone());
            }
        };
        let kind = self.dtype.kind().filter(|_| !self.dtype.is_quantized());
        let kind = kind.ok_or_else(|| format!("tch has no type for {}", self.dtype))?;
        let viewed = || {
            let all = typed(&storage.tensor()?, kind)?;
            let mut view = Tensor::f_empty([0], (kind, Device::Cpu)).map_err(text)?;
            // PyTorch's `torch.load` makes the same call. The result is a view of the storage, not of the tensor
            // `all`.
            let _ = view
                .f_set_source_tensor_storage_offset_(
                    &all,
                    self.offset,
                    &self.shape[..],
                    &self.strides[..],
                )
                .map_err(text)?;
            if self.conjugate {
                view = view.f_conj().map_err(text)?;
            }
            if self.negative {
                view = view.f_neg().map_err(text)?;
            }
            if self.requires_grad && self.dtype.is_differentiable() {
                view = view.set_requires_grad(true);
            }
            Ok(view)
        };
        tch::no_grad(viewed)
    }

    /// Copies the elements into a tensor of the same shape, converted to its type. Where the destination is a
    /// contiguous CPU tensor of the same type, and this tensor is a whole storage, the file is read straight into the
    /// destination and takes no other memory.
    ///
    /// # Errors
    /// Another shape, or the file cannot be read; the tensor may hold a part of it then.
    pub fn copy_to(&self, tensor: &mut Tensor) -> Result<()> {
        if tensor.size() != self.shape {
            return Err(Error::invalid(format!(
                "a tensor of shape {:?} cannot be copied to one of {:?}",
                self.shape,
                tensor.size()
            )));
        }
        self.copied(tensor).map_err(|why| Error::State(format!("{self:?} cannot be read: {why}")))
    }

    pub(super) fn copied(&self, tensor: &mut Tensor) -> Result<(), String> {
        if let Some(storage) = self.whole_storage()
            && !storage.is_read()
            && tensor.device() == Device::Cpu
            && !tensor.is_sparse()
            && tensor.is_contiguous()
            && Some(tensor.kind()) == self.dtype.kind()
        {
            return storage.read_into(bytes_mut(tensor)?);
        }
        let source = self.view()?;
        tch::no_grad(|| tensor.f_copy_(&source)).map_err(text)
    }

    /// The storage, if it holds exactly the elements of this tensor, in their order.
    fn whole_storage(&self) -> Option<&Storage> {
        let Memory::File(storage) = &self.memory else { return None };
        let plain = !self.conjugate && !self.negative && self.offset == 0;
        let whole = self.numel() as u64 * self.dtype.size() == storage.length;
        // The types must agree, because only a storage of Bool refuses bytes other than 0 and 1.
        let typed = storage.dtype == self.dtype;
        (plain && whole && typed && is_contiguous(&self.shape, &self.strides)).then_some(storage)
    }

    /// The elements in the order of the dimensions, as bytes in this machine's order. This works for all types, also
    /// for those that tch does not have.
    ///
    /// # Errors
    /// The file cannot be read; an expanded tensor has more bytes than its storage and more than 64 MiB.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.gathered().map_err(|why| Error::State(format!("{self:?} cannot be read: {why}")))
    }

    fn gathered(&self) -> Result<Vec<u8>, String> {
        if let Memory::Program(_) = self.memory {
            return Ok(bytes(&dense(&self.view()?)?)?.to_vec());
        }
        let Memory::File(storage) = &self.memory else { return Ok(vec![]) };
        let length = (self.numel() as u64).saturating_mul(self.dtype.size());
        if length > storage.length.max(FREE_EXPANSION) {
            return Err(format!(
                "its {length} bytes are copies of a storage of {}: use tensor() or copy_to",
                storage.length
            ));
        }
        if self.conjugate || self.negative {
            return Ok(bytes(&dense(&self.view()?)?)?.to_vec());
        }
        let all = storage.tensor()?;
        let all = bytes(&all)?;
        let size = self.dtype.size() as usize;
        let count = usize::try_from(self.numel()).map_err(|error| error.to_string())?;
        let length = count.checked_mul(size).ok_or("too many elements")?;
        let mut gathered = vec![];
        gathered.try_reserve_exact(length).map_err(|error| error.to_string())?;
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let at: i64 = index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();
            let at = (self.offset + at) as usize * size;
            gathered.extend(all.get(at..at + size).ok_or("an element outside its storage")?);
            for (i, length) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *length {
                    break;
                }
                *i = 0;
            }
        }
        Ok(gathered)
    }
}

impl fmt::Debug for StoredTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.parameter, self.bare) {
            (true, _) => "Parameter",
            (_, true) => "storage",
            _ => "tensor",
        };
        write!(f, "{name}({}, {:?})", self.dtype, self.shape)
    }
}

pub(super) fn text(error: tch::TchError) -> String {
    // libtorch's own words end where its C++ stack begins.
    let text = error.to_string();
    text.split("\nException raised from").next().unwrap_or_default().to_owned()
}

/// The elements on the CPU, contiguous, without lazy conjugation or negation. A tensor that is all this already is
/// returned without a copy.
pub(super) fn dense(tensor: &Tensor) -> Result<Tensor, String> {
    let tensor =
        tensor.f_detach().and_then(|t| t.f_resolve_conj()?.f_resolve_neg()).map_err(text)?;
    tensor.f_to_device(Device::Cpu).and_then(|tensor| tensor.f_contiguous()).map_err(text)
}

/// The bytes of a storage as elements of another type. Bytes that become Bool must be 0 or 1, because libtorch does
/// not check them.
fn typed(all: &Tensor, kind: Kind) -> Result<Tensor, String> {
    if all.f_kind().map_err(text)? == kind {
        return Ok(all.shallow_clone());
    }
    if kind == Kind::Bool && bytes(all)?.iter().any(|byte| *byte > 1) {
        return Err("it has values other than true and false".into());
    }
    let size = kind.elt_size_in_bytes() as i64;
    let whole = bytes(all)?.len() as i64 / size * size;
    all.f_view_dtype(Kind::Uint8)
        .and_then(|all| all.f_narrow(0, 0, whole)?.f_view_dtype(kind))
        .map_err(text)
}

pub(super) fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(length, stride)| {
            let fits = *length == 1 || *stride == expected;
            expected *= *length;
            fits
        })
}
