//! The file format: safetensors, with the values as JSON and a checksum in the metadata.
//!
//! ```text
//! 8 bytes    length of the header, little-endian
//! header     JSON: "__metadata__" and, for each tensor, dtype, shape and place; padded with spaces
//! tensors    without gaps, the widest types first, so that each is aligned
//! ```
//!
//! The metadata holds `tch-ignite` (the version of this layout), `state` (the values and parts, as JSON), `written`
//! (the time, in nanoseconds since 1970), `kept` (the stamp of the [`Checkpoint`](super::Checkpoint) that keeps the
//! file on its list) and `crc32c` (the CRC-32C of header and tensors, computed with zeros in the place of its own
//! digits). Files of weights alone have no version, state and time.
//!
//! A tensor with several names in one part (tied weights) is written once. Each other name is a key of the metadata;
//! its value is the name that the tensor is written under. Python's `safetensors.torch.save_model` does the same.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::header::{Entry, TYPES, check_memory, parsed, shortened};
use crate::bridge::{bytes, bytes_mut, dense_on_cpu};
use crate::fs::open_file;
use crate::state::Layout;
use crate::state::StateDict;
use crate::state::tree::{METADATA, Named, Tree, assembled, joined};

/// The version of the layout that is written. A file of a newer version is refused.
const VERSION: u32 = 1;
/// Largest length of a header, in bytes. Parsing a header takes up to five times its length. The reference
/// implementation of safetensors allows 100 MB; the headers of the largest models have less than 10 MB.
const MAX_HEADER: u64 = 28_000_000;
/// Number of bytes that a thread reads before it takes the next piece.
const PIECE: usize = 1 << 23;
/// Number of bytes that are read and then hashed while they are in the cache.
const CHUNK: usize = 1 << 18;
const NO_CRC: &str = "00000000";

/// The statements of a file about itself besides its content.
#[derive(Debug, Clone, Default)]
pub(super) struct Stamp {
    /// Time of writing, in nanoseconds since 1970.
    pub(super) written: u64,
    pub(super) kept: Option<String>,
}

impl Stamp {
    pub(super) fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { written: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX), kept: None }
    }

    fn texts(&self) -> BTreeMap<String, String> {
        let mut texts = BTreeMap::from([("crc32c".to_owned(), NO_CRC.to_owned())]);
        texts.insert("written".into(), self.written.to_string());
        texts.extend(self.kept.iter().map(|kept| ("kept".to_owned(), kept.clone())));
        texts
    }
}

/// Writes a state. Dense, contiguous CPU tensors are written from their own memory; others are copied first, one at a
/// time.
pub(super) fn write(
    file: &mut (impl Write + Seek),
    state: &StateDict,
    stamp: &Stamp,
) -> io::Result<()> {
    let mut named = Named::default();
    let state = serde_json::to_string(&named.add("", state))?;
    check_memory(&state, named.tensors.len()).map_err(io::Error::other)?;
    let mut metadata = stamp.texts();
    metadata.extend([("tch-ignite".into(), VERSION.to_string()), ("state".into(), state)]);
    metadata.extend(named.tied);
    write_tensors(file, &named.tensors, &metadata)
}

/// Writes only the tensors, as other programs do.
pub(super) fn write_plain(
    file: &mut (impl Write + Seek),
    state: &StateDict,
    stamp: &Stamp,
) -> io::Result<()> {
    if state.tensors.contains_key(METADATA) {
        return Err(io::Error::other(format!("a tensor cannot be named '{METADATA}'")));
    }
    let mut named = Named::default();
    named.add("", state);
    let mut metadata = stamp.texts();
    // Without a time, equal weights give equal bytes.
    metadata.remove("written");
    // Python's readers of PyTorch weights look for this key.
    metadata.insert("format".into(), "pt".into());
    metadata.extend(named.tied);
    write_tensors(file, &named.tensors, &metadata)
}

/// Writes the header and the tensors, then the checksum into the header.
fn write_tensors(
    file: &mut (impl Write + Seek),
    tensors: &BTreeMap<String, &Tensor>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut order = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, *tensor, type_name(name, tensor)?)))
        .collect::<io::Result<Vec<_>>>()?;
    order.sort_by_key(|(_, tensor, _)| std::cmp::Reverse(tensor.kind().elt_size_in_bytes()));
    let mut header = Map::new();
    header.insert(METADATA.into(), serde_json::to_value(metadata)?);
    let mut offset = 0;
    for (name, tensor, dtype) in &order {
        let end = offset + (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let entry = json!({"dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end]});
        header.insert((*name).clone(), entry);
        offset = end;
    }
    let mut header = serde_json::to_string(&header)?.into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER {
        return Err(io::Error::other(format!(
            "the header would be {} bytes long, and {MAX_HEADER} is the limit",
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
        for chunk in bytes(&dense).map_err(failed)?.chunks(CHUNK) {
            crc = crc32c::crc32c_append(crc, chunk);
            file.write_all(chunk)?;
        }
    }
    if let Some(place) = crc_place(&header) {
        file.seek(SeekFrom::Start(start + 8 + place as u64))?;
        file.write_all(format!("{crc:08x}").as_bytes())?;
        file.seek(SeekFrom::End(0))?;
    }
    Ok(())
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

/// The offset of the eight digits of the checksum in a header that this module made. The metadata comes first and its
/// keys are sorted, so the first match is the right one.
fn crc_place(header: &[u8]) -> Option<usize> {
    const KEY: &[u8] = br#""crc32c":""#;
    header.windows(KEY.len()).position(|window| window == KEY).map(|place| place + KEY.len())
}

/// An opened file whose header is read, and whose tensors are not.
pub(super) struct Contents {
    file: File,
    /// `None` where the file has only tensors.
    tree: Option<Tree>,
    entries: Vec<Entry>,
    /// Other names of tied tensors, each with the name in `entries`.
    tied: BTreeMap<String, String>,
    /// The checksum of the header, and the checksum that the whole file should have, if it says one.
    crc: (u32, Option<u32>),
    /// Length of the file, then of the tensors in it, in bytes.
    length: u64,
    data: u64,
    /// The file's stamp; `written` is 0 where the file does not say it.
    pub(super) stamp: Stamp,
}

impl Contents {
    /// Reads and checks the header, in at most 150 MB of memory.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        Self::opened(path).map_err(|why| shortened(&why))
    }

    fn opened(path: &Path) -> Result<Self, String> {
        let mut file = open_file(path).map_err(|error| error.to_string())?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(|_| "the file is too short".to_owned())?;
        let (header_length, rest) = (u64::from_le_bytes(prefix), length.saturating_sub(8));
        if header_length > MAX_HEADER || header_length > rest {
            return Err(format!(
                "the header should be {header_length} bytes long, in a file of {length}"
            ));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(|error| error.to_string())?;
        let data = rest - header_length;
        let (mut metadata, entries) = parsed(&header, data)?;
        let tied = tied(std::mem::take(&mut metadata.others), &entries);
        let expected = metadata.crc32c.as_ref().map(checksum).transpose()?;
        if let Some(place) = expected.and_then(|_| crc_place(&header)) {
            let digits = header.get_mut(place..place + NO_CRC.len()).ok_or("it has no checksum")?;
            digits.copy_from_slice(NO_CRC.as_bytes());
        }
        let crc = (crc32c::crc32c(&header), expected);
        // `metadata` holds the state as well, and parsing it takes more memory.
        drop(header);
        let tree = match &metadata.version {
            Some(version) => {
                let state = metadata.state.as_ref().ok_or("it has no state")?;
                if expected.is_none() {
                    return Err("it has no checksum".into());
                }
                Some(tree_in(version, state, entries.len())?)
            }
            None => None,
        };
        let written = metadata.written.and_then(|time| time.parse().ok()).unwrap_or(0);
        let stamp = Stamp { written, kept: metadata.kept };
        Ok(Self { file, tree, entries, tied, crc, length, data, stamp })
    }

    /// Whether the file is a checkpoint, and not only tensors.
    pub(super) fn has_state(&self) -> bool {
        self.tree.is_some()
    }

    /// The type and shape of each tensor, under each of its names in the file.
    pub(super) fn layouts(&self) -> impl Iterator<Item = (&str, Layout)> {
        let layout = |entry: &Entry| Layout { kind: entry.kind, shape: entry.shape.clone() };
        let by_name: HashMap<&str, &Entry> = match self.tied.is_empty() {
            true => HashMap::new(),
            false => self.entries.iter().map(|entry| (entry.name.as_str(), entry)).collect(),
        };
        let tied = self.tied.iter().filter_map(move |(name, first)| {
            Some((name.as_str(), layout(by_name.get(first.as_str())?)))
        });
        self.entries.iter().map(move |entry| (entry.name.as_str(), layout(entry))).chain(tied)
    }

    /// Whether this is only another name of a tied tensor.
    pub(super) fn is_tied(&self, name: &str) -> bool {
        self.tied.contains_key(name)
    }

    fn part(&self, name: &str) -> Option<&Tree> {
        self.tree.as_ref()?.parts.get(name)
    }

    /// The names of the parts of the state, and of the parts of the part `of`.
    pub(super) fn parts(&self, of: &str) -> (Vec<&str>, Vec<&str>) {
        fn names(tree: Option<&Tree>) -> Vec<&str> {
            tree.into_iter().flat_map(|tree| tree.parts.keys()).map(String::as_str).collect()
        }
        (names(self.tree.as_ref()), names(self.part(of)))
    }

    /// Epoch and iteration of the engine that the checkpoint is of (0 where the file says none), and whether that
    /// engine ran within another.
    pub(super) fn progress(&self) -> (u64, u64, bool) {
        let position = self.part("engine").and_then(|part| part.values.get("position"));
        let get = |key| position.and_then(|position| position.get(key));
        let count = |key| get(key).and_then(Value::as_u64).unwrap_or(0);
        let nested = get("nested").and_then(Value::as_bool).unwrap_or(false);
        (count("epoch"), count("iteration"), nested)
    }

    /// Reads all tensors. A tensor goes into the one of `places` that has its name in the file, if that is a dense CPU
    /// tensor of the same type and shape; otherwise into a new one. On error these places hold garbage.
    pub(super) fn read(self, places: &mut BTreeMap<String, Tensor>) -> Result<StateDict, String> {
        if let Some(tree) = &self.tree {
            // A tensor that nobody can ask for takes no memory.
            let mut named = BTreeSet::new();
            names_in_file(tree, "", &mut named);
            let stray = |entry: &&Entry| !named.contains(&entry.name);
            if let Some(entry) = self.entries.iter().find(stray) {
                return Err(format!("tensor '{}' belongs to no part", entry.name));
            }
        }
        let mut tensors = self.tensors(|_| true, places)?;
        let Some(tree) = &self.tree else {
            return Ok(StateDict { tensors, ..StateDict::default() });
        };
        assembled(tree, "", &mut tensors)
    }

    /// The type and shape of each tensor of a part, under its name in the part; `None` where the file has no such part.
    pub(super) fn part_layouts(&self, name: &str) -> Option<BTreeMap<&str, Layout>> {
        let part = self.part(name)?;
        let mut all: HashMap<&str, Layout> = self.layouts().collect();
        let mut layout =
            |own| Some((String::as_str(own), all.remove(&*part.name_in_file(name, own))?));
        Some(part.tensors.iter().filter_map(&mut layout).collect())
    }

    /// Reads one part only, in the memory of its tensors; `None` where the file has no part of this name. The whole
    /// file is read once for the checksum.
    pub(super) fn read_part(self, name: &str) -> Result<Option<StateDict>, String> {
        let Some(part) = self.part(name) else { return Ok(None) };
        let mut wanted = BTreeSet::new();
        names_in_file(part, name, &mut wanted);
        let mut tensors = self.tensors(|name| wanted.contains(name), &mut BTreeMap::new())?;
        assembled(part, name, &mut tensors).map(Some)
    }

    /// Reads the tensors with these names in the file as [`read`](Self::read) does, and hashes the others.
    pub(super) fn tensors(
        &self,
        wanted: impl Fn(&str) -> bool,
        places: &mut BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<String, Tensor>, String> {
        let mut taken = Ranges::default();
        let mut tensors = BTreeMap::new();
        let tied: Vec<_> = self.tied.iter().filter(|(name, _)| wanted(name)).collect();
        let by_others: BTreeSet<&str> = tied.iter().map(|(_, first)| first.as_str()).collect();
        let is_wanted = |name: &str| wanted(name) || by_others.contains(name);
        for entry in self.entries.iter().filter(|entry| is_wanted(&entry.name)) {
            let place = places.remove(&entry.name).filter(|place| {
                place.device() == Device::Cpu
                    && !place.is_sparse()
                    && place.is_contiguous()
                    && place.kind() == entry.kind
                    && place.size() == entry.shape
                    && bytes(place).is_ok_and(|bytes| taken.take(bytes))
            });
            let tensor = match place {
                Some(place) => place,
                None => Tensor::f_empty(&entry.shape, (entry.kind, Device::Cpu))
                    .map_err(|error| format!("tensor '{}': {error}", entry.name))?,
            };
            tensors.insert(entry.name.clone(), tensor);
        }
        self.fill(&mut tensors)?;
        for (name, first) in tied {
            if let Some(tensor) = tensors.get(first).map(Tensor::shallow_clone) {
                tensors.insert(name.clone(), tensor);
            }
        }
        tensors.retain(|name, _| wanted(name));
        Ok(tensors)
    }

    /// Reads and hashes the file in a few threads, because hashing in one thread would take half as long again as
    /// reading. Where no thread can be started, this one does all the work.
    fn fill(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<(), String> {
        let begin = self.length - self.data;
        let mut places: BTreeMap<&str, &mut Tensor> =
            tensors.iter_mut().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut pieces = vec![];
        let mut ends = self.entries.iter().skip(1).map(|entry| entry.from);
        for entry in &self.entries {
            let (name, is_bool) = (entry.name.as_str(), entry.kind == Kind::Bool);
            let end = ends.next().unwrap_or(self.data);
            let mut offset = begin + entry.from;
            match places.remove(name) {
                Some(tensor) => {
                    let bytes =
                        bytes_mut(tensor).map_err(|error| format!("tensor '{name}': {error}"))?;
                    for bytes in bytes.chunks_mut(PIECE) {
                        let len = bytes.len();
                        pieces.push(Piece { name, is_bool, offset, len, bytes: Some(bytes) });
                        offset += len as u64;
                    }
                }
                None => {
                    while offset < begin + end {
                        let len = (begin + end - offset).min(PIECE as u64) as usize;
                        pieces.push(Piece { name, is_bool: false, offset, len, bytes: None });
                        offset += len as u64;
                    }
                }
            }
        }
        let threads =
            std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
        let share = pieces.len().div_ceil(threads * 8).max(1);
        let (file, shares) = (&self.file, Mutex::new(pieces.chunks_mut(share)));
        let read = || -> Result<Vec<(u64, u32, usize)>, String> {
            let (mut hashed, mut unwanted) = (vec![], vec![]);
            loop {
                let share = shares.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(pieces) = share else { return Ok(hashed) };
                for piece in pieces {
                    hashed.push((piece.offset, piece.read(file, &mut unwanted)?, piece.len));
                }
            }
        };
        let hashed: Vec<_> = std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads)
                .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, read).ok())
                .collect();
            let panicked = |_| Err("a thread that reads panicked".to_owned());
            let mut hashed = vec![read()];
            hashed.extend(helpers.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)));
            hashed
        });
        let mut hashed = hashed.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
        hashed.sort_unstable();
        let crc = hashed
            .into_iter()
            .fold(self.crc.0, |crc, (_, hash, len)| crc32c::crc32c_combine(crc, hash, len));
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

    /// Reads the whole file once and compares the checksum.
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

/// A piece of a tensor that is read at once.
struct Piece<'t> {
    name: &'t str,
    is_bool: bool,
    offset: u64,
    len: usize,
    /// The memory to read into; `None` where the piece is only hashed.
    bytes: Option<&'t mut [u8]>,
}

impl Piece<'_> {
    /// Reads the piece and returns its hash. Unwanted bytes go into a buffer of one chunk.
    fn read(&mut self, file: &File, unwanted: &mut Vec<u8>) -> Result<u32, String> {
        let (mut crc, mut done) = (0, 0);
        while done < self.len {
            let end = self.len.min(done + CHUNK);
            let chunk = match &mut self.bytes {
                Some(bytes) => &mut bytes[done..end],
                None => {
                    unwanted.resize(CHUNK, 0);
                    &mut unwanted[..end - done]
                }
            };
            read_at(file, chunk, self.offset + done as u64)
                .map_err(|error| format!("tensor '{}': {error}", self.name))?;
            crc = crc32c::crc32c_append(crc, chunk);
            if self.is_bool && chunk.iter().any(|byte| *byte > 1) {
                chunk.fill(0);
                return Err(format!(
                    "tensor '{}': it has values other than true and false",
                    self.name
                ));
            }
            done = end;
        }
        Ok(crc)
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

/// Memory ranges that are filled already, because variables may share memory.
#[derive(Default)]
struct Ranges(BTreeMap<usize, usize>);

impl Ranges {
    /// Adds a range of bytes; false if it overlaps one that was added before.
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

/// Collects the names in the file of all tensors of a part.
fn names_in_file(tree: &Tree, prefix: &str, names: &mut BTreeSet<String>) {
    names.extend(tree.tensors.iter().map(|name| tree.name_in_file(prefix, name)));
    for (name, part) in &tree.parts {
        names_in_file(part, &joined(prefix, name), names);
    }
}

/// Finds the metadata texts that are other names of tensors.
fn tied(texts: Vec<(String, String)>, entries: &[Entry]) -> BTreeMap<String, String> {
    if texts.is_empty() {
        return BTreeMap::new();
    }
    let names: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let is_tied = |(name, first): &(String, String)| {
        names.contains(first.as_str()) && !names.contains(name.as_str())
    };
    texts.into_iter().filter(is_tied).collect()
}

fn tree_in(version: &str, state: &str, tensors: usize) -> Result<Tree, String> {
    let version: u32 = version.parse().map_err(|_| format!("its version is '{version:.20}'"))?;
    if version > VERSION {
        return Err(format!("it is of version {version}, and this program reads up to {VERSION}"));
    }
    check_memory(state, tensors)?;
    serde_json::from_str(state).map_err(|error| format!("its state: {error}"))
}
