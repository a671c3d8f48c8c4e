use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tch::{Device, Kind, Tensor};

use super::dtype::DType;
use super::source::Source;
use crate::bridge::bytes_mut;

/// How much one thread reads before it takes the next piece.
const PIECE: usize = 1 << 23;
/// How much is read before it is hashed, while it is in the cache.
const CHUNK: usize = 1 << 18;

/// The position of a storage's bytes in a file.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) source: Arc<Source>,
    pub(super) begin: u64,
    pub(super) crc: Option<u32>,
    /// Whether the machine that wrote the file had the other order of bytes than this one.
    pub(super) swapped: bool,
}

/// Memory that tensors of a file share. Its elements are read when the first of these tensors is asked for.
pub(super) struct Storage {
    /// The type of the elements; `uint8` for untyped storages.
    pub(super) dtype: DType,
    /// Length in bytes.
    pub(super) length: u64,
    /// The reader sets it before it returns a value.
    place: OnceLock<Place>,
    /// All elements in one dimension, once they are read; bytes where tch does not have the type.
    read: Mutex<Option<Tensor>>,
}

impl Storage {
    pub(super) fn new(dtype: DType, length: u64) -> Self {
        Self { dtype, length, place: OnceLock::new(), read: Mutex::new(None) }
    }

    pub(super) fn put_at(&self, place: Place) {
        // The reader sets each place once.
        let _ = self.place.set(place);
    }

    /// The kind of the tensor that holds this storage's elements.
    fn kind(&self) -> Kind {
        // libtorch cannot make quantized tensors without their scales.
        match self.dtype.kind() {
            Some(kind) if !self.dtype.is_quantized() => kind,
            _ => Kind::Uint8,
        }
    }

    /// All elements in one dimension. The tensor shares its memory with those that earlier calls returned.
    pub(super) fn tensor(&self) -> Result<Tensor, String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = &*read {
            return Ok(tensor.shallow_clone());
        }
        Ok(read.insert(self.fresh()?).shallow_clone())
    }

    /// All elements in one dimension, like [`tensor`](Self::tensor), but the storage does not keep what it reads:
    /// unless `tensor` was called before, dropping the result frees the memory.
    pub(super) fn passing(&self) -> Result<Tensor, String> {
        if self.is_read() { self.tensor() } else { self.fresh() }
    }

    fn fresh(&self) -> Result<Tensor, String> {
        let kind = self.kind();
        let count = self.length / kind.elt_size_in_bytes() as u64;
        let count = i64::try_from(count).map_err(|error| error.to_string())?;
        let mut tensor =
            Tensor::f_empty([count], (kind, Device::Cpu)).map_err(|error| error.to_string())?;
        self.read_into(bytes_mut(&mut tensor)?)?;
        Ok(tensor)
    }

    /// Whether [`tensor`](Self::tensor) has read the elements, so that there is memory to share.
    pub(super) fn is_read(&self) -> bool {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Reads all elements from the file into `bytes`, which must be as long as the storage, and compares the
    /// checksum.
    pub(super) fn read_into(&self, bytes: &mut [u8]) -> Result<(), String> {
        let place = self.place.get().ok_or("a storage without a place in the file")?;
        if bytes.len() as u64 != self.length {
            return Err(format!("{} bytes do not fit into {}", self.length, bytes.len()));
        }
        let mut pieces: Vec<_> = bytes.chunks_mut(PIECE).enumerate().collect();
        let read = |pieces: &mut [(usize, &mut [u8])]| -> Result<crc32fast::Hasher, String> {
            let mut crc = crc32fast::Hasher::new();
            for (index, piece) in pieces {
                for (number, chunk) in piece.chunks_mut(CHUNK).enumerate() {
                    let offset = (*index * PIECE + number * CHUNK) as u64;
                    place
                        .source
                        .read_at(chunk, place.begin + offset)
                        .map_err(|error| error.to_string())?;
                    if place.crc.is_some() {
                        crc.update(chunk);
                    }
                    self.settle(chunk, place.swapped)?;
                }
            }
            Ok(crc)
        };
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(4));
        let share = pieces.len().div_ceil(threads).max(1);
        let hashes: Vec<_> = if pieces.len() < 2 || threads == 1 {
            vec![read(&mut pieces)]
        } else {
            std::thread::scope(|scope| {
                let threads: Vec<_> = pieces
                    .chunks_mut(share)
                    .map(|pieces| scope.spawn(move || read(pieces)))
                    .collect();
                let panicked = |_| Err("a thread that reads panicked".to_owned());
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
            })
        };
        let mut all = crc32fast::Hasher::new();
        for hash in hashes {
            all.combine(&hash?);
        }
        match place.crc.map(|expected| (expected, all.finalize())) {
            Some((expected, crc)) if expected != crc => Err(format!(
                "its checksum is {crc:08x} and should be {expected:08x}: the file is damaged"
            )),
            _ => Ok(()),
        }
    }

    /// Puts the bytes of each number into this machine's order, and refuses Bools that are neither 0 nor 1.
    fn settle(&self, bytes: &mut [u8], swapped: bool) -> Result<(), String> {
        let size = self.dtype.number_size();
        if swapped && size > 1 {
            bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        if self.dtype == DType::Bool && bytes.iter().any(|byte| *byte > 1) {
            bytes.fill(0);
            return Err("it has values other than true and false".into());
        }
        Ok(())
    }
}
