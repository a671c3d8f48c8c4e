//! Writes the container: a zip archive whose files are stored uncompressed and aligned, so that `torch.load(mmap=True)`
//! can map them.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use super::pickler::Pickler;
use super::storages::{Storages, Written};
use super::tensor::dense;
use super::value::Value;
use crate::bridge::bytes;
use crate::error::{Error, Result};
use crate::fs::write_atomically;

/// The bytes of each file in the archive begin at a multiple of this, as in archives that torch writes.
const ALIGNMENT: u64 = 64;
/// The id of the extra field with which torch fills the gap before an aligned file.
const PADDING: [u8; 2] = *b"FB";
const PADDING_HEAD: u64 = 4;
const LOCAL_LENGTH: u64 = 30;
/// In a field of 32 bits this value says that the number stands in the extra field instead.
const FULL: u64 = 0xffff_ffff;
/// How much is hashed before it is written, while it is in the cache.
const CHUNK: usize = 1 << 18;
/// The flag which says that names are UTF-8.
const FLAGS: u16 = 1 << 11;
/// All files get the date 1 January 1980, so that the same value is always written as the same bytes.
const DATE: u16 = 1 << 5 | 1;

/// Writes a value so that `torch.load` reads it, also with `weights_only=True` and `mmap=True`. The file appears
/// whole or not at all: it is written under another name, synced and renamed. Missing parent folders are made.
///
/// Memory that tensors share is written once and shared again when read. Tensors on the CPU are written straight from
/// their memory; those on a GPU are copied to the CPU one at a time.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("checkpoint.pt");
/// use tch::Tensor;
/// use tch_ignite::pytorch::{self, Dict, Value};
/// let mut checkpoint = Dict::new();
/// checkpoint.insert("epoch", 3);
/// checkpoint.insert("mean", Value::tensor(&Tensor::from_slice(&[0.5, 1.5]))?);
/// pytorch::write(&path, &checkpoint.into())?;
/// let read = pytorch::read(&path)?;
/// assert_eq!(read.get("epoch").and_then(Value::as_i64), Some(3));
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// A tensor cannot be read, containers are nested too deeply, or the file cannot be written.
pub fn write(path: impl AsRef<Path>, value: &Value) -> Result<()> {
    let path = path.as_ref();
    let failed = |why| Error::State(format!("{}: {why}", path.display()));
    let mut storages = Storages::of(value).map_err(failed)?;
    let pickle = Pickler::new(&mut storages).pickle(value).map_err(failed)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().replace(['/', '\\'], "_");
    let name = if stem.is_empty() || stem.len() > 1000 { "archive".into() } else { stem };
    write_atomically(path, |file| {
        let mut archive = ArchiveWriter { file, name, at: 0, directory: vec![], count: 0 };
        archive.add("data.pkl", &pickle)?;
        archive.add(".format_version", b"1")?;
        archive.add(".storage_alignment", ALIGNMENT.to_string().as_bytes())?;
        archive.add("byteorder", if cfg!(target_endian = "big") { b"big" } else { b"little" })?;
        for (number, storage) in storages.written().into_iter().enumerate() {
            let name = format!("data/{number}");
            let failed = |why: String| io::Error::other(format!("{name}: {why}"));
            let all = match storage {
                Written::Whole(storage) => storage.passing().map_err(failed)?,
                Written::Memory(tensor) => dense(&tensor).map_err(failed)?,
            };
            archive.add(&name, bytes(&all).map_err(failed)?)?;
        }
        archive.add("version", b"3\n")?;
        archive.finish()
    })
}

struct ArchiveWriter<'f, F> {
    file: &'f mut F,
    /// The archive's own name, with which all names in it begin.
    name: String,
    at: u64,
    /// The entries of the directory.
    directory: Vec<u8>,
    count: u64,
}

impl<F: Write + Seek> ArchiveWriter<'_, F> {
    fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let name = format!("{}/{name}", self.name);
        let (header, length) = (self.at, bytes.len() as u64);
        // Sizes that need more than 32 bits stand in an extra field.
        let wide = match length >= FULL {
            true => extra_field(1, &[length.to_le_bytes(), length.to_le_bytes()].concat()),
            false => vec![],
        };
        let unpadded = header + LOCAL_LENGTH + name.len() as u64 + wide.len() as u64 + PADDING_HEAD;
        let padding = unpadded.next_multiple_of(ALIGNMENT) - unpadded;
        let padding = extra_field(u16::from_le_bytes(PADDING), &vec![b'Z'; padding as usize]);

        let short = length.min(FULL) as u32;
        let mut head = b"PK\x03\x04".to_vec();
        head.extend(versions_and_flags(length >= FULL, false));
        let crc_at = header + head.len() as u64;
        head.extend([0; 4]);
        head.extend([short.to_le_bytes(), short.to_le_bytes()].concat());
        head.extend((name.len() as u16).to_le_bytes());
        head.extend(((wide.len() + padding.len()) as u16).to_le_bytes());
        head.extend(name.as_bytes());
        head.extend(wide);
        head.extend(padding);
        self.file.write_all(&head)?;

        let mut crc = crc32fast::Hasher::new();
        for chunk in bytes.chunks(CHUNK) {
            crc.update(chunk);
            self.file.write_all(chunk)?;
        }
        let crc = crc.finalize().to_le_bytes();
        self.file.seek(SeekFrom::Start(crc_at))?;
        self.file.write_all(&crc)?;
        self.at = header + head.len() as u64 + length;
        self.file.seek(SeekFrom::Start(self.at))?;
        self.list(&name, header, length, crc);
        Ok(())
    }

    fn list(&mut self, name: &str, header: u64, length: u64, crc: [u8; 4]) {
        let mut wide = vec![];
        if length >= FULL {
            wide.extend([length.to_le_bytes(), length.to_le_bytes()].concat());
        }
        if header >= FULL {
            wide.extend(header.to_le_bytes());
        }
        let is_wide = !wide.is_empty();
        let extra = if is_wide { extra_field(1, &wide) } else { vec![] };
        let short = length.min(FULL) as u32;
        let entry = &mut self.directory;
        entry.extend(b"PK\x01\x02");
        entry.extend(versions_and_flags(is_wide, true));
        entry.extend(crc);
        entry.extend([short.to_le_bytes(), short.to_le_bytes()].concat());
        entry.extend((name.len() as u16).to_le_bytes());
        entry.extend((extra.len() as u16).to_le_bytes());
        // The file has no comment, is on the first disk, and has no attributes.
        entry.extend([0; 10]);
        entry.extend((header.min(FULL) as u32).to_le_bytes());
        entry.extend(name.as_bytes());
        entry.extend(extra);
        self.count += 1;
    }

    fn finish(self) -> io::Result<()> {
        let (begin, length) = (self.at, self.directory.len() as u64);
        self.file.write_all(&self.directory)?;
        if begin >= FULL || length >= FULL || self.count >= 0xffff {
            let mut record = b"PK\x06\x06".to_vec();
            record.extend(44u64.to_le_bytes());
            record.extend([45, 0, 45, 0]);
            record.extend([0; 8]);
            for number in [self.count, self.count, length, begin] {
                record.extend(number.to_le_bytes());
            }
            // The locator says where the 64-bit record begins.
            record.extend(b"PK\x06\x07\0\0\0\0");
            record.extend((begin + length).to_le_bytes());
            record.extend(1u32.to_le_bytes());
            self.file.write_all(&record)?;
        }
        let count = (self.count.min(0xffff) as u16).to_le_bytes();
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend([count, count].concat());
        end.extend((length.min(FULL) as u32).to_le_bytes());
        end.extend((begin.min(FULL) as u32).to_le_bytes());
        end.extend([0; 2]);
        self.file.write_all(&end)
    }
}

fn extra_field(id: u16, bytes: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes()[..], &(bytes.len() as u16).to_le_bytes(), bytes].concat()
}

/// These fields: in the directory the version that the writer has; then the version that a reader needs, flags, no
/// compression, and the date.
fn versions_and_flags(wide: bool, with_writer: bool) -> Vec<u8> {
    let version = if wide { 45u16 } else { 20 };
    let mut bytes = if with_writer { version.to_le_bytes().to_vec() } else { vec![] };
    for number in [version, FLAGS, 0, 0, DATE] {
        bytes.extend(number.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::budget::Budget;
    use super::super::source::Source;
    use super::super::zip::Archive;
    use super::*;

    #[test]
    fn more_files_than_16_bits_can_count_are_listed_and_found()
    -> Result<(), Box<dyn std::error::Error>> {
        let mut bytes = Cursor::new(vec![]);
        let name = "a".to_owned();
        let mut archive =
            ArchiveWriter { file: &mut bytes, name, at: 0, directory: vec![], count: 0 };
        for number in 0..70_000u32 {
            archive.add(&format!("data/{number}"), &number.to_le_bytes())?;
        }
        archive.finish()?;
        let source = Source::Memory(bytes.into_inner());
        let archive = Archive::open(&source, &mut Budget::new(u64::MAX))?;
        for number in [0u32, 69_999] {
            let entry = archive.get(&format!("data/{number}"))?;
            assert_eq!((entry.begin % ALIGNMENT, entry.length), (0, 4));
            let mut read = [0; 4];
            source.read_at(&mut read, entry.begin)?;
            assert_eq!(read, number.to_le_bytes());
        }
        Ok(())
    }
}
