use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::budget::Budget;
use super::freeze::freeze;
use super::legacy;
use super::machine::Machine;
use super::source::{Input, Source};
use super::storage::Place;
use super::value::Value;
use super::zip::Archive;
use crate::error::{Error, Result};

/// Reads files of `torch.save`; its options say which classes it accepts.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.pt");
/// # tch_ignite::pytorch::write(&path, &3.into())?;
/// use tch_ignite::pytorch::Reader;
/// // Objects of an allowed class come out as `Value::Object`; none of their code is run.
/// let value = Reader::new().allow("argparse.Namespace").read(&path)?;
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Reader {
    allowed: BTreeSet<String>,
    max_memory: Option<u64>,
}

/// The plain data of the smallest file may take this many bytes.
const FREE: u64 = 64 << 20;

impl Reader {
    /// A reader that accepts the classes that `torch.load(weights_only=True)` accepts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Also accepts objects of the class with this full name. They come out as [`Value::Object`], which has
    /// everything that the file says of them. Nothing is executed, whatever the name.
    pub fn allow(mut self, class: &str) -> Self {
        self.allowed.insert(class.into());
        self
    }

    /// Bounds the memory, in bytes, of everything in a file but its tensors' elements; a file that needs more is an
    /// error. Unless this is given, it is 64 MiB and as much as the file has, so that a file that was made for it cannot
    /// fill the memory: a byte can stand for a whole container. Long lists of plain numbers need up to 72 bytes for each,
    /// so that a file of nothing else needs a larger bound from about a million numbers on.
    pub fn max_memory(mut self, bytes: u64) -> Self {
        self.max_memory = Some(bytes);
        self
    }

    /// Reads a file. Its tensors are read when they are asked for: see [`StoredTensor`](super::StoredTensor).
    ///
    /// # Errors
    /// The file cannot be read, is no file of `torch.save`, is damaged, takes more memory beside its tensors than
    /// [`max_memory`](Self::max_memory) allows, or uses names that are no plain data; the error lists such names.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Value> {
        let path = path.as_ref();
        let source =
            Source::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        self.value(source).map_err(|why| Error::State(format!("{}: {why}", path.display())))
    }

    /// Reads a file whose bytes are in memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_bytes(&self, bytes: Vec<u8>) -> Result<Value> {
        self.value(Source::Memory(bytes)).map_err(Error::State)
    }

    fn value(&self, source: Source) -> Result<Value, String> {
        let mut begin = vec![0; source.length().min(512) as usize];
        source.read_at(&mut begin, 0).map_err(|error| error.to_string())?;
        let source = Arc::new(source);
        let free = FREE.saturating_add(source.length());
        let mut budget = Budget::new(self.max_memory.unwrap_or(free));
        if legacy::begins_like_one(&begin) {
            return legacy::read(&source, &self.allowed, &mut budget);
        }
        if begin.starts_with(b"PK") {
            return self.archive(&source, &mut budget);
        }
        Err(match &begin[..] {
            [] => "the file is empty".into(),
            [_, _, _, _, _, _, _, _, b'{', ..] => {
                "it is a safetensors file: read it with pytorch::read_pretrained".into()
            }
            _ if begin.get(257..262) == Some(b"ustar") => {
                "it is a tar archive, which torch wrote before 0.1.10; torch.load(weights_only=True) refuses it too"
                    .into()
            }
            _ => "it is no file of torch.save".to_owned(),
        })
    }

    fn archive(&self, source: &Arc<Source>, budget: &mut Budget) -> Result<Value, String> {
        let archive = Archive::open(source, budget)?;
        if archive.has("constants.pkl") {
            return Err("it is a TorchScript module: load it with pytorch::ScriptModule".into());
        }
        let pickle = archive.get("data.pkl")?;
        check(source, pickle.begin, pickle.length, pickle.crc)
            .map_err(|why| format!("data.pkl: {why}"))?;
        let mut input = Input::new(source, pickle.begin, pickle.begin + pickle.length);
        let mut made = Machine::new(&mut input, &self.allowed, budget).run()?;
        let little = match archive.has("byteorder") {
            false => true,
            true => {
                let entry = archive.get("byteorder")?;
                let mut name = [0; 6];
                let name =
                    name.get_mut(..entry.length as usize).ok_or("its byteorder is damaged")?;
                source.read_at(name, entry.begin).map_err(|error| error.to_string())?;
                match &*name {
                    b"little" => true,
                    b"big" => false,
                    _ => return Err("its byteorder is damaged".into()),
                }
            }
        };
        for referred in &made.storages {
            let (key, storage) = (&referred.key, &referred.storage);
            let entry = archive.get(&format!("data/{key}"))?;
            if entry.length != storage.length {
                let (claimed, there) = (storage.length, entry.length);
                return Err(format!("storage '{key}' should have {claimed} bytes and has {there}"));
            }
            storage.put_at(Place {
                source: source.clone(),
                begin: entry.begin,
                crc: entry.crc,
                swapped: little == cfg!(target_endian = "big"),
            });
        }
        freeze(&mut made, budget)
    }
}

/// Compares the checksum of a part of the file.
fn check(source: &Source, begin: u64, length: u64, expected: Option<u32>) -> Result<(), String> {
    let Some(expected) = expected else { return Ok(()) };
    let (mut crc, mut at) = (crc32fast::Hasher::new(), begin);
    let mut chunk = vec![0; length.min(1 << 16) as usize];
    while at < begin + length {
        let length = (begin + length - at).min(chunk.len() as u64);
        let chunk = &mut chunk[..length as usize];
        source.read_at(chunk, at).map_err(|error| error.to_string())?;
        crc.update(chunk);
        at += length;
    }
    match crc.finalize() {
        crc if crc == expected => Ok(()),
        crc => Err(format!(
            "its checksum is {crc:08x} and should be {expected:08x}: the file is damaged"
        )),
    }
}
