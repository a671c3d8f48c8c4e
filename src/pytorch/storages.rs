//! Decides which storages a file gets, so that memory that tensors share is written once.

use std::collections::HashMap;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::dtype::DType;
use super::storage::Storage;
use super::tensor::{Memory, StoredTensor, text};
use super::value::Value;

/// A tensor as the file describes it: a view of a storage.
pub(super) struct Placed {
    pub(super) storage: usize,
    pub(super) storage_dtype: DType,
    /// Length of the storage in bytes.
    pub(super) storage_length: u64,
    pub(super) dtype: DType,
    /// The tensor's first element, counted in elements from the beginning of the storage.
    pub(super) offset: i64,
    pub(super) shape: Vec<i64>,
    pub(super) strides: Vec<i64>,
    pub(super) requires_grad: bool,
    pub(super) parameter: bool,
    pub(super) conjugate: bool,
    pub(super) negative: bool,
    pub(super) bare: bool,
}

/// The storages that a file gets, numbered in the order in which the tensors that need them are written.
#[derive(Default)]
pub(super) struct Storages {
    of_file: HashMap<*const Storage, usize>,
    of_program: Vec<Range>,
    written: Vec<Written>,
}

/// The bytes of one storage.
pub(super) enum Written {
    /// All of a storage of a file that was opened before; its elements may not have been read yet.
    Whole(Arc<Storage>),
    /// Memory of a tensor that this program made, seen as a tensor of one dimension.
    Memory(Tensor),
}

/// Memory that one tensor of this program covers, or several tensors that overlap.
struct Range {
    device: Device,
    kind: Kind,
    begin: usize,
    end: usize,
    /// The tensor that begins first.
    first: Tensor,
    /// Number of the storage, once a tensor in it is written.
    storage: Option<usize>,
}

impl Storages {
    /// Finds memory that tensors of this program share, by their addresses. tch has no way to ask for libtorch's own
    /// storages; with addresses, moreover, only the parts of a large storage that some tensor needs are written.
    pub(super) fn of(value: &Value) -> Result<Self, String> {
        let mut ranges: Vec<Range> = vec![];
        let mut failed = None;
        let mut seen = std::collections::HashSet::new();
        value.walk(&mut |path, value| {
            if let Value::Tensor(stored) = value
                && let Memory::Program(_) = stored.memory
                && seen.insert(Arc::as_ptr(stored))
                && failed.is_none()
            {
                match range(stored) {
                    Ok(range) => ranges.extend(range),
                    Err(why) => failed = Some(format!("{path}: {why}")),
                }
            }
        });
        if let Some(why) = failed {
            return Err(why);
        }
        let order = |range: &Range| (format!("{:?}", (range.device, range.kind)), range.begin);
        ranges.sort_by_cached_key(order);
        let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last)
                    if (last.device, last.kind) == (range.device, range.kind)
                        && range.begin < last.end =>
                {
                    last.end = last.end.max(range.end);
                }
                _ => merged.push(range),
            }
        }
        Ok(Self { of_program: merged, ..Self::default() })
    }

    /// The storage and the place in it at which a tensor is written.
    pub(super) fn place(&mut self, stored: &Arc<StoredTensor>) -> Result<Placed, String> {
        let (storage, storage_dtype, storage_length, offset, strides) = match &stored.memory {
            Memory::File(storage) => {
                let number = *self.of_file.entry(Arc::as_ptr(storage)).or_insert_with(|| {
                    self.written.push(Written::Whole(storage.clone()));
                    self.written.len() - 1
                });
                (number, storage.dtype, storage.length, stored.offset, stored.strides.clone())
            }
            Memory::Program(_) => {
                let (number, length, offset) = self.place_of_program(stored)?;
                (number, stored.dtype, length, offset, stored.strides.clone())
            }
        };
        Ok(Placed {
            storage,
            storage_dtype,
            storage_length,
            dtype: stored.dtype,
            offset,
            shape: stored.shape.clone(),
            strides,
            requires_grad: stored.requires_grad,
            parameter: stored.parameter,
            conjugate: stored.conjugate,
            negative: stored.negative,
            bare: stored.bare,
        })
    }

    fn place_of_program(&mut self, stored: &StoredTensor) -> Result<(usize, u64, i64), String> {
        let Some(own) = range(stored)? else {
            // Empty tensors have storages of their own.
            let kind = stored.dtype.kind().ok_or("a tensor of no type")?;
            let empty = Tensor::f_empty([0], (kind, Device::Cpu)).map_err(text)?;
            self.written.push(Written::Memory(empty));
            return Ok((self.written.len() - 1, 0, 0));
        };
        let same = |range: &&mut Range| {
            (range.device, range.kind) == (own.device, own.kind)
                && range.begin <= own.begin
                && own.end <= range.end
        };
        let found = self
            .of_program
            .iter_mut()
            .find(same)
            .ok_or("a tensor has moved while it was written")?;
        let size = stored.dtype.size() as usize;
        let length = found.end - found.begin;
        let number = match found.storage {
            Some(number) => number,
            None => {
                let all = tch::no_grad(|| {
                    let first = found.first.f_detach()?;
                    first.f_as_strided([(length / size) as i64], [1i64], None)
                });
                self.written.push(Written::Memory(all.map_err(text)?));
                *found.storage.insert(self.written.len() - 1)
            }
        };
        Ok((number, length as u64, ((own.begin - found.begin) / size) as i64))
    }

    pub(super) fn written(self) -> Vec<Written> {
        self.written
    }
}

/// The memory that a tensor of this program covers; `None` if the tensor is empty.
fn range(stored: &StoredTensor) -> Result<Option<Range>, String> {
    let tensor = stored.view()?;
    if stored.numel() == 0 {
        return Ok(None);
    }
    let begin = tensor.data_ptr() as usize;
    if begin == 0 {
        return Err("a tensor has no memory".into());
    }
    let last: i64 = stored
        .shape
        .iter()
        .zip(&stored.strides)
        .map(|(length, stride)| (length - 1) * stride)
        .sum();
    let length = (last as usize + 1) * stored.dtype.size() as usize;
    Ok(Some(Range {
        device: tensor.device(),
        kind: tensor.f_kind().map_err(text)?,
        begin,
        end: begin + length,
        first: tensor,
        storage: None,
    }))
}
