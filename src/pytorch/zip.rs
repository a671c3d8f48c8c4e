//! The container of `torch.save` since 1.6: a zip archive whose files are stored, not compressed.
//!
//! We read the directory ourselves, in about 150 lines, because a storage must be read from its place in the file
//! straight into a tensor, and because files of an archive must not overlap (a few bytes could claim to be gigabytes
//! of storages otherwise). A general zip crate gives streams, and brings decompression that PyTorch never uses.

use std::collections::HashMap;

use super::budget::{Budget, table};
use super::source::Source;

const END: [u8; 4] = *b"PK\x05\x06";
const END64: [u8; 4] = *b"PK\x06\x06";
const LOCATOR64: [u8; 4] = *b"PK\x06\x07";
const CENTRAL: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const END_LENGTH: usize = 22;
const CENTRAL_LENGTH: usize = 46;
const LOCAL_LENGTH: usize = 30;

/// A file of the archive.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Position of the entry's first byte in the archive file.
    pub(super) begin: u64,
    pub(super) length: u64,
    /// CRC-32 of its bytes; `None` if the writer did not compute it (PyTorch can be told not to).
    pub(super) crc: Option<u32>,
    /// Why its bytes cannot be read, if they cannot.
    unreadable: Option<&'static str>,
}

/// The files of an archive, by their names without the folder that all of them are in, which is named after the
/// archive.
pub(super) struct Archive {
    entries: HashMap<String, Entry>,
}

impl Archive {
    /// Reads the directory. What it takes for a while stays counted, because it is little in a real file.
    pub(super) fn open(source: &Source, budget: &mut Budget) -> Result<Self, String> {
        let directory = directory(source)?;
        let listed = listed(source, &directory, budget)?;
        let first = listed.first().ok_or("the archive is empty")?;
        let prefix =
            first.name.split_once('/').map_or(String::new(), |(name, _)| format!("{name}/"));

        let mut places = vec![];
        budget.reserve_exact(&mut places, listed.len())?;
        budget.take(table::<String, Entry>(listed.len()))?;
        let mut entries = HashMap::with_capacity(listed.len());
        for listed in listed {
            let begin = local_begin(source, &listed)?;
            let end = begin.checked_add(listed.stored).filter(|end| *end <= directory.begin);
            let end =
                end.ok_or_else(|| format!("'{}' lies outside the file", shown(&listed.name)))?;
            places.push((listed.header, end));
            // PyTorch ignores files in other folders.
            let Some(name) = listed.name.strip_prefix(&prefix) else { continue };
            budget.take_piece(name.len())?;
            let (crc, length) = ((listed.crc != 0).then_some(listed.crc), listed.length);
            let entry = Entry { begin, length, crc, unreadable: listed.unreadable };
            if entries.insert(name.to_owned(), entry).is_some() {
                return Err(format!("there are two files '{}' in the archive", shown(name)));
            }
        }
        places.sort_unstable();
        if places.windows(2).any(|pair| pair[1].0 < pair[0].1) {
            return Err("files of the archive overlap".into());
        }
        Ok(Self { entries })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    pub(super) fn get(&self, name: &str) -> Result<&Entry, String> {
        let entry = self.entries.get(name);
        let entry = entry.ok_or_else(|| format!("it has no '{}'", shown(name)))?;
        match entry.unreadable {
            Some(why) => Err(format!("'{}' {why}", shown(name))),
            None => Ok(entry),
        }
    }
}

/// A name from a file, short enough for an error.
fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

struct Directory {
    begin: u64,
    length: u64,
    count: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 2).map_or(0, |b| u64::from(u16::from_le_bytes([b[0], b[1]])))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    u16_at(bytes, at) | u16_at(bytes, at + 2) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) | u32_at(bytes, at + 4) << 32
}

fn read<const N: usize>(source: &Source, at: u64) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    source.read_at(&mut bytes, at).map_err(|_| "the archive is cut off or damaged".to_owned())?;
    Ok(bytes)
}

/// Finds the directory by the record at the end of the file.
fn directory(source: &Source) -> Result<Directory, String> {
    let length = source.length();
    let tail_length = length.min((END_LENGTH + usize::from(u16::MAX)) as u64);
    let mut tail = vec![0; tail_length as usize];
    source.read_at(&mut tail, length - tail_length).map_err(|error| error.to_string())?;
    let is_end = |at: &usize| {
        tail[*at..].starts_with(&END)
            && u16_at(&tail, at + 20) == (tail.len() - at - END_LENGTH) as u64
    };
    let last = tail.len().checked_sub(END_LENGTH);
    let at = last
        .and_then(|last| (0..=last).rev().find(is_end))
        .ok_or("the archive is cut off: it has no directory at its end")?;
    let record = &tail[at..];
    let end = length - tail_length + at as u64;

    let (mut count, mut size, mut begin) =
        (u16_at(record, 10), u32_at(record, 12), u32_at(record, 16));
    let mut limit = end;
    if count == 0xffff || size == 0xffff_ffff || begin == 0xffff_ffff {
        let locator = end.checked_sub(20).ok_or("the archive is damaged")?;
        let bytes: [u8; 20] = read(source, locator)?;
        if bytes[..4] != LOCATOR64 {
            return Err("the archive is damaged: the directory's place is missing".into());
        }
        limit = u64_at(&bytes, 8);
        let record: [u8; 56] = read(source, limit)?;
        if record[..4] != END64 || limit > locator {
            return Err("the archive is damaged: the directory's place is wrong".into());
        }
        (count, size, begin) = (u64_at(&record, 32), u64_at(&record, 40), u64_at(&record, 48));
    }
    if begin.checked_add(size).is_none_or(|end| end > limit) {
        return Err("the archive is damaged: its directory lies outside the file".into());
    }
    Ok(Directory { begin, length: size, count })
}

/// A file as the directory lists it.
struct Listed {
    name: String,
    header: u64,
    /// How many bytes the file takes in the archive; `length` is that of the file itself.
    stored: u64,
    length: u64,
    crc: u32,
    unreadable: Option<&'static str>,
}

fn listed(
    source: &Source,
    directory: &Directory,
    budget: &mut Budget,
) -> Result<Vec<Listed>, String> {
    let damaged = || "the archive's directory is damaged".to_owned();
    if directory.count > directory.length / CENTRAL_LENGTH as u64 {
        return Err(damaged());
    }
    // `directory` checked that the file has this many bytes.
    budget.take(directory.length as usize)?;
    let mut bytes = vec![0; directory.length as usize];
    source.read_at(&mut bytes, directory.begin).map_err(|error| error.to_string())?;
    let mut files = vec![];
    budget.reserve_exact(&mut files, directory.count as usize)?;
    let mut rest = &bytes[..];
    for _ in 0..directory.count {
        if rest.len() < CENTRAL_LENGTH || rest[..4] != CENTRAL {
            return Err(damaged());
        }
        let (head, after) = rest.split_at(CENTRAL_LENGTH);
        let lengths = [28, 30, 32].map(|at| u16_at(head, at) as usize);
        if lengths.iter().sum::<usize>() > after.len() {
            return Err(damaged());
        }
        let (name, after) = after.split_at(lengths[0]);
        let (extra, after) = after.split_at(lengths[1]);
        rest = &after[lengths[2]..];

        let mut wide = zip64_numbers(extra);
        let mut number = |short: u64| match short {
            0xffff_ffff => wide.next().ok_or_else(damaged),
            _ => Ok(short),
        };
        let length = number(u32_at(head, 24))?;
        let stored = number(u32_at(head, 20))?;
        let header = number(u32_at(head, 42))?;
        let name = std::str::from_utf8(name).map_err(|_| damaged())?;
        budget.take_piece(name.len())?;
        let unreadable = match (u16_at(head, 8) & 1, u16_at(head, 10)) {
            (1, _) => Some("is encrypted"),
            (_, 0) if stored == length => None,
            (_, 0) => return Err(damaged()),
            _ => Some(
                "is compressed, which torch.save never does: unpack and pack without compression",
            ),
        };
        let crc = u32_at(head, 16) as u32;
        files.push(Listed { name: name.into(), header, stored, length, crc, unreadable });
    }
    Ok(files)
}

/// The numbers that did not fit into 32 bits, in the order of the zip64 extra field.
fn zip64_numbers(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut numbers = &[][..];
    while extra.len() >= 4 {
        let (id, length) = (u16_at(extra, 0), u16_at(extra, 2) as usize);
        let Some(field) = extra.get(4..4 + length) else { break };
        if id == 1 {
            numbers = field;
            break;
        }
        extra = &extra[4 + length..];
    }
    numbers.chunks_exact(8).map(|bytes| u64_at(bytes, 0))
}

/// Position of a file's first byte, behind its own header, which must have the name that the directory has.
fn local_begin(source: &Source, listed: &Listed) -> Result<u64, String> {
    let damaged = || format!("the header of '{}' in the archive is damaged", shown(&listed.name));
    let header: [u8; LOCAL_LENGTH] = read(source, listed.header)?;
    let name_length = u16_at(&header, 26);
    if header[..4] != LOCAL || name_length != listed.name.len() as u64 {
        return Err(damaged());
    }
    let mut name = vec![0; name_length as usize];
    let after = listed.header.saturating_add(LOCAL_LENGTH as u64);
    source.read_at(&mut name, after).map_err(|_| damaged())?;
    if name != listed.name.as_bytes() {
        return Err(damaged());
    }
    after.checked_add(name_length + u16_at(&header, 28)).ok_or_else(damaged)
}
