//! One file: safetensors, with the values as JSON and a checksum in its metadata.
//!
//! ```text
//! 8 bytes    length of the header, little-endian
//! header     JSON: "__metadata__" and, for each tensor, dtype, shape and place; padded with spaces
//! tensors    without gaps, the widest types first, so that each is aligned
//! ```
//!
//! The metadata holds `tch-ignite` (the version of this layout), `state` (the values and parts, as
//! JSON), `written` (when, in nanoseconds since 1970) and `crc32c`: the CRC-32C of header and tensors,
//! with zeros in its own place.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::StateDict;
use crate::bridge::{bytes, bytes_mut};

/// The version that is written; what is read may not be newer.
const VERSION: u32 = 1;
/// As in the reference implementation of safetensors.
const MAX_HEADER: u64 = 100_000_000;
/// libtorch's own limit for most operations.
const MAX_DIMENSIONS: usize = 64;
/// What a thread reads without looking up.
const PIECE: usize = 1 << 23;
/// Hashed while it is in the cache.
const CHUNK: usize = 1 << 18;
const NO_CRC: &str = "00000000";

/// safetensors' names of the types that libtorch shares with it.
const TYPES: [(&str, Kind); 10] = [
    ("F64", Kind::Double),
    ("I64", Kind::Int64),
    ("F32", Kind::Float),
    ("I32", Kind::Int),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

/// Where a tensor lies in the file, and what it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Values and parts of a [`StateDict`], and the names of its tensors.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tree {
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    values: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    parts: BTreeMap<String, Tree>,
}

/// The name of a tensor in the file: the names of its part and itself.
fn joined(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.into() } else { format!("{prefix}/{name}") }
}

fn tree_of(state: &StateDict) -> Tree {
    Tree {
        values: state.values.clone(),
        tensors: state.tensors.keys().cloned().collect(),
        parts: state.parts.iter().map(|(name, part)| (name.clone(), tree_of(part))).collect(),
    }
}

fn flat<'s>(
    prefix: &str,
    state: &'s StateDict,
    tensors: &mut BTreeMap<String, &'s Tensor>,
) -> io::Result<()> {
    for (name, tensor) in &state.tensors {
        let name = joined(prefix, name);
        if tensors.insert(name.clone(), tensor).is_some() || name == "__metadata__" {
            return Err(io::Error::other(format!("two tensors would be named '{name}'")));
        }
    }
    state.parts.iter().try_for_each(|(name, part)| flat(&joined(prefix, name), part, tensors))
}

/// Writes a state. Dense, contiguous CPU tensors are written from where they lie; others are copied
/// first, one at a time.
pub(super) fn write(file: &mut (impl Write + Seek), state: &StateDict) -> io::Result<()> {
    let mut tensors = BTreeMap::new();
    flat("", state, &mut tensors)?;
    let metadata = BTreeMap::from([
        ("tch-ignite", VERSION.to_string()),
        ("state", serde_json::to_string(&tree_of(state))?),
        ("crc32c", NO_CRC.into()),
        ("written", now().to_string()),
    ]);
    write_tensors(file, &tensors, &metadata)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Writes tensors alone, as other programs do.
pub(super) fn write_plain(
    file: &mut (impl Write + Seek),
    tensors: &BTreeMap<String, &Tensor>,
) -> io::Result<()> {
    // What Python's readers of PyTorch weights look for.
    write_tensors(file, tensors, &BTreeMap::from([("format", "pt".into())]))
}

fn write_tensors(
    file: &mut (impl Write + Seek),
    tensors: &BTreeMap<String, &Tensor>,
    metadata: &BTreeMap<&str, String>,
) -> io::Result<()> {
    let mut order = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, *tensor, type_name(name, tensor)?)))
        .collect::<io::Result<Vec<_>>>()?;
    order.sort_by_key(|(_, tensor, _)| std::cmp::Reverse(tensor.kind().elt_size_in_bytes()));
    let mut header = Map::new();
    header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    let mut offset = 0;
    for (name, tensor, dtype) in &order {
        let len = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let entry = Entry {
            dtype: (*dtype).into(),
            shape: tensor.size().into_iter().map(|size| size as u64).collect(),
            data_offsets: (offset, offset + len),
        };
        header.insert((*name).clone(), serde_json::to_value(entry)?);
        offset += len;
    }
    let mut header = serde_json::to_string(&header)?.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER {
        return Err(io::Error::other(format!(
            "the header would be {} bytes long, and {MAX_HEADER} is the limit of the format",
            header.len()
        )));
    }

    let start = file.stream_position()?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut crc = crc32c::crc32c(&header);
    for (name, tensor, _) in order {
        let failed = |error: String| io::Error::other(format!("tensor '{name}': {error}"));
        let dense = dense_on_cpu(tensor).map_err(|error| failed(error.to_string()))?;
        for chunk in bytes(dense.as_ref().unwrap_or(tensor)).map_err(failed)?.chunks(CHUNK) {
            crc = crc32c::crc32c_append(crc, chunk);
            file.write_all(chunk)?;
        }
    }
    if let Some(place) = metadata.get("crc32c").and_then(|_| crc_place(&header)) {
        file.seek(SeekFrom::Start(start + 8 + place as u64))?;
        file.write_all(format!("{crc:08x}").as_bytes())?;
        file.seek(SeekFrom::End(0))?;
    }
    Ok(())
}

/// A copy that can be written; `None` where the tensor itself can.
fn dense_on_cpu(tensor: &Tensor) -> Result<Option<Tensor>, tch::TchError> {
    if tensor.device() == Device::Cpu && !tensor.is_sparse() && tensor.is_contiguous() {
        return Ok(None);
    }
    let dense =
        if tensor.is_sparse() { tensor.f_to_dense(None, false)? } else { tensor.f_detach()? };
    dense.f_to_device(Device::Cpu)?.f_contiguous().map(Some)
}

fn type_name(name: &str, tensor: &Tensor) -> io::Result<&'static str> {
    let kind = tensor
        .f_kind()
        .map_err(|error| io::Error::other(format!("tensor '{name}' cannot be saved: {error}")))?;
    TYPES.iter().find(|(_, known)| *known == kind).map(|(dtype, _)| *dtype).ok_or_else(|| {
        io::Error::other(format!("tensor '{name}' is of type {kind:?}, which cannot be saved"))
    })
}

fn checksum(text: &String) -> Result<u32, String> {
    match u32::from_str_radix(text, 16) {
        Ok(number) if format!("{number:08x}") == *text => Ok(number),
        _ => Err(format!("its checksum is '{text}'")),
    }
}

/// Where the eight digits of the checksum are in the header that was just made. Its metadata comes
/// first and its keys are sorted, so the first match is the place.
fn crc_place(header: &[u8]) -> Option<usize> {
    const KEY: &[u8] = br#""crc32c":""#;
    header.windows(KEY.len()).position(|window| window == KEY).map(|place| place + KEY.len())
}

/// What a file holds, before its tensors are read.
pub(super) struct Contents {
    file: File,
    tree: Tree,
    entries: Vec<(String, Kind, Entry)>,
    /// The checksum of the header, and of all.
    crc: (u32, Option<u32>),
    /// Length of the file, and of the tensors in it.
    length: u64,
    data: u64,
    /// When it was written, in nanoseconds since 1970; 0 where it does not say.
    pub(super) written: u64,
}

/// A tensor of the file: what it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Layout {
    pub(super) kind: Kind,
    pub(super) shape: Vec<i64>,
}

impl Contents {
    /// Reads and checks the header. Takes no more memory than a small multiple of it, and it is no
    /// longer than the file.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|error| error.to_string())?;
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        let length = metadata.len();
        if !metadata.is_file() || length < 8 {
            return Err("it is too short, or no file".into());
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(|_| "the file is too short".to_owned())?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER || header_length > length - 8 {
            return Err(format!(
                "the header should be {header_length} bytes long, in a file of {length}"
            ));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(|error| error.to_string())?;
        let data = length - 8 - header_length;
        let (metadata, entries) = parsed(&header, data)?;
        let tree = match metadata.get("tch-ignite") {
            Some(version) => {
                let version: u32 =
                    version.parse().map_err(|_| format!("its version is '{version}'"))?;
                if version > VERSION {
                    return Err(format!(
                        "it is of version {version}, and this program reads up to {VERSION}"
                    ));
                }
                let state = metadata.get("state").ok_or("it has no state")?;
                serde_json::from_str(state).map_err(|error| format!("its state: {error}"))?
            }
            // Tensors of another program.
            None => Tree {
                tensors: entries.iter().map(|(name, ..)| name.clone()).collect(),
                ..Tree::default()
            },
        };
        let crc = metadata.get("crc32c").map(checksum).transpose()?;
        if crc.is_none() && metadata.contains_key("tch-ignite") {
            return Err("it has no checksum".into());
        }
        if let Some(place) = crc.and_then(|_| crc_place(&header)) {
            let digits = header.get_mut(place..place + NO_CRC.len()).ok_or("it has no checksum")?;
            digits.copy_from_slice(NO_CRC.as_bytes());
        }
        let written = metadata.get("written").and_then(|time| time.parse().ok()).unwrap_or(0);
        Ok(Self { file, tree, entries, crc: (crc32c::crc32c(&header), crc), length, data, written })
    }

    /// Whether it is a checkpoint, not only tensors.
    pub(super) fn has_state(&self) -> bool {
        self.crc.1.is_some()
    }

    /// What each tensor is, by its name in the file.
    pub(super) fn layouts(&self) -> impl Iterator<Item = (&str, Layout)> {
        self.entries.iter().map(|(name, kind, entry)| {
            let shape = entry.shape.iter().map(|size| *size as i64).collect();
            (name.as_str(), Layout { kind: *kind, shape })
        })
    }

    /// Epoch and iteration of the engine it is of; 0 where it says none.
    pub(super) fn progress(&self) -> (u64, u64) {
        let position = self.tree.parts.get("engine").and_then(|part| part.values.get("position"));
        let count = |key| position.and_then(|p| p.get(key)).and_then(Value::as_u64).unwrap_or(0);
        (count("epoch"), count("iteration"))
    }

    /// Reads all tensors: into `places`, by their names in the file, where these are dense CPU tensors
    /// of the same type and shape, else into new ones. On error those places hold garbage.
    pub(super) fn read(self, places: &mut BTreeMap<String, Tensor>) -> Result<StateDict, String> {
        let mut taken = Ranges::default();
        let mut tensors = BTreeMap::new();
        for (name, kind, entry) in &self.entries {
            let shape: Vec<i64> = entry.shape.iter().map(|size| *size as i64).collect();
            let place = places.remove(name).filter(|place| {
                place.device() == Device::Cpu
                    && !place.is_sparse()
                    && place.is_contiguous()
                    && place.kind() == *kind
                    && place.size() == shape
                    && bytes(place).is_ok_and(|bytes| taken.take(bytes))
            });
            let tensor = match place {
                Some(place) => place,
                None => Tensor::f_empty(&shape, (*kind, Device::Cpu))
                    .map_err(|error| format!("tensor '{name}': {error}"))?,
            };
            tensors.insert(name.clone(), tensor);
        }
        self.fill(&mut tensors)?;
        let state = assembled(&self.tree, "", &mut tensors)?;
        match tensors.keys().next() {
            Some(name) => Err(format!("tensor '{name}' belongs to no part")),
            None => Ok(state),
        }
    }

    /// Reads and hashes, in a few threads: hashing would take half as long again as reading.
    fn fill(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<(), String> {
        let begin = self.length - self.data;
        let places: BTreeMap<&str, u64> =
            self.entries.iter().map(|(name, _, e)| (name.as_str(), e.data_offsets.0)).collect();
        let mut pieces = vec![];
        for (name, tensor) in tensors {
            let is_bool = tensor.kind() == Kind::Bool;
            let mut offset = begin + places.get(name.as_str()).copied().unwrap_or(0);
            let bytes = bytes_mut(tensor).map_err(|error| format!("tensor '{name}': {error}"))?;
            for bytes in bytes.chunks_mut(PIECE) {
                let len = bytes.len() as u64;
                pieces.push(Piece { name, is_bool, offset, bytes });
                offset += len;
            }
        }
        pieces.sort_by_key(|piece| piece.offset);
        let threads =
            std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
        let share = pieces.len().div_ceil(threads).max(1);
        let hashed: Vec<_> = std::thread::scope(|scope| {
            let read = |pieces: &mut [Piece<'_>]| -> Result<Vec<(u32, usize)>, String> {
                pieces.iter_mut().map(|piece| piece.read(&self.file)).collect()
            };
            let threads: Vec<_> =
                pieces.chunks_mut(share).map(|pieces| scope.spawn(move || read(pieces))).collect();
            let panicked = |_| Err("a thread that reads panicked".to_owned());
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        let mut crc = self.crc.0;
        for part in hashed {
            for (hash, len) in part? {
                crc = crc32c::crc32c_combine(crc, hash, len);
            }
        }
        self.check(crc)
    }

    fn check(&self, crc: u32) -> Result<(), String> {
        match self.crc.1.filter(|expected| *expected != crc) {
            Some(expected) => Err(format!(
                "its checksum is {crc:08x} and should be {expected:08x}: the file is damaged"
            )),
            None => Ok(()),
        }
    }

    /// Reads everything once and compares the checksum.
    pub(super) fn verify(&mut self) -> Result<(), String> {
        let mut buffer = vec![0; CHUNK.min(self.data as usize)];
        let (mut crc, mut left) = (self.crc.0, self.data);
        while left > 0 {
            let len = left.min(buffer.len() as u64) as usize;
            self.file.read_exact(&mut buffer[..len]).map_err(|error| error.to_string())?;
            crc = crc32c::crc32c_append(crc, &buffer[..len]);
            left -= len as u64;
        }
        self.check(crc)
    }
}

/// A part of a tensor that is read at once.
struct Piece<'t> {
    name: &'t str,
    is_bool: bool,
    offset: u64,
    bytes: &'t mut [u8],
}

impl Piece<'_> {
    /// Its hash and length.
    fn read(&mut self, file: &File) -> Result<(u32, usize), String> {
        let mut crc = 0;
        for (index, chunk) in self.bytes.chunks_mut(CHUNK).enumerate() {
            read_at(file, chunk, self.offset + (index * CHUNK) as u64)
                .map_err(|error| format!("tensor '{}': {error}", self.name))?;
            crc = crc32c::crc32c_append(crc, chunk);
            if self.is_bool && chunk.iter().any(|byte| *byte > 1) {
                chunk.fill(0);
                return Err(format!(
                    "tensor '{}': it has values other than true and false",
                    self.name
                ));
            }
        }
        Ok((crc, self.bytes.len()))
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}

/// Memory that is written already: variables may share theirs.
#[derive(Default)]
struct Ranges(BTreeMap<usize, usize>);

impl Ranges {
    /// Notes the bytes; false if some of them are noted.
    fn take(&mut self, bytes: &[u8]) -> bool {
        let range = bytes.as_ptr_range();
        let (start, end) = (range.start as usize, range.end as usize);
        let free = self.0.range(..end).next_back().is_none_or(|(_, other)| *other <= start);
        if free && start < end {
            self.0.insert(start, end);
        }
        free
    }
}

fn assembled(
    tree: &Tree,
    prefix: &str,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<StateDict, String> {
    let mut state = StateDict { values: tree.values.clone(), ..StateDict::default() };
    for name in &tree.tensors {
        let in_file = joined(prefix, name);
        let tensor = tensors.remove(&in_file).ok_or(format!("tensor '{in_file}' is missing"))?;
        state.tensors.insert(name.clone(), tensor);
    }
    for (name, part) in &tree.parts {
        state.parts.insert(name.clone(), assembled(part, &joined(prefix, name), tensors)?);
    }
    Ok(state)
}

type Parsed = (BTreeMap<String, String>, Vec<(String, Kind, Entry)>);

/// Metadata and tensors in the order of their places, checked against each other and the file.
fn parsed(header: &[u8], data: u64) -> Result<Parsed, String> {
    let mut header: BTreeMap<String, Value> =
        serde_json::from_slice(header).map_err(|error| format!("its header: {error}"))?;
    let metadata = match header.remove("__metadata__") {
        Some(metadata) => {
            serde_json::from_value(metadata).map_err(|error| format!("its metadata: {error}"))?
        }
        None => BTreeMap::new(),
    };
    let mut entries = vec![];
    for (name, entry) in header {
        let entry: Entry =
            serde_json::from_value(entry).map_err(|error| format!("tensor '{name}': {error}"))?;
        let kind = TYPES
            .iter()
            .find(|(dtype, _)| *dtype == entry.dtype)
            .map(|(_, kind)| *kind)
            .ok_or(format!("tensor '{name}' is of unknown type '{}'", entry.dtype))?;
        entries.push((name, kind, entry));
    }
    entries.sort_by_key(|(_, _, entry)| entry.data_offsets);
    let mut end = 0;
    for (name, kind, entry) in &entries {
        let (from, to) = entry.data_offsets;
        let size = kind.elt_size_in_bytes() as u64;
        let len = entry.shape.iter().try_fold(size, |len, dim| {
            // What is empty may have any other dimensions, but none that i64 cannot hold.
            i64::try_from(*dim).ok()?;
            len.checked_mul(*dim)
        });
        if from != end
            || entry.shape.len() > MAX_DIMENSIONS
            || len.is_none_or(|len| from.checked_add(len) != Some(to))
        {
            return Err(format!(
                "tensor '{name}' of shape {:?} does not fit into bytes {from} to {to}",
                entry.shape
            ));
        }
        end = to;
    }
    if end != data {
        return Err(format!("it should hold {end} bytes of tensors, and holds {data}"));
    }
    Ok((metadata, entries))
}
