use std::fs::{self, File};
use std::io;
use std::path::Path;

/// The bytes of a file, on disk or in memory. They are read by position, so that threads can share a source.
pub(super) enum Source {
    File { file: File, length: u64 },
    Memory(Vec<u8>),
}

impl Source {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // The type is checked before opening: opening a pipe would wait for its other end.
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
        }
        Ok(Self::File { file: File::open(path)?, length: metadata.len() })
    }

    pub(super) fn length(&self) -> u64 {
        match self {
            Self::File { length, .. } => *length,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Fills `bytes` with the bytes of the file from `offset` on.
    pub(super) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File { file, .. } => read_at(file, bytes, offset),
            Self::Memory(memory) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = memory.get(from..).and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
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

/// The longest line that is read: names of modules and classes are lines.
const MAX_LINE: usize = 1024;
/// How much is read from the file at once.
const BLOCK: u64 = 1 << 16;

/// Reads a range of a file from its beginning on, and never takes more memory than the range has bytes left.
pub(super) struct Input<'s> {
    source: &'s Source,
    /// Position in the file of the first byte that is not in `block` yet.
    next: u64,
    end: u64,
    block: Vec<u8>,
    /// How much of `block` has been handed out.
    used: usize,
}

impl<'s> Input<'s> {
    /// Reads the bytes from `begin` to `end`, or to the end of the file if that comes first.
    pub(super) fn new(source: &'s Source, begin: u64, end: u64) -> Self {
        Self { source, next: begin, end: end.min(source.length()), block: vec![], used: 0 }
    }

    /// Position in the file of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.next - (self.block.len() - self.used) as u64
    }

    fn left(&self) -> u64 {
        self.end.saturating_sub(self.position())
    }

    pub(super) fn byte(&mut self) -> Result<u8, String> {
        if self.used == self.block.len() {
            let length = (self.end.saturating_sub(self.next)).min(BLOCK);
            if length == 0 {
                return Err("it ends too early".into());
            }
            self.block.resize(length as usize, 0);
            self.used = self.block.len();
            self.source.read_at(&mut self.block, self.next).map_err(|error| error.to_string())?;
            self.next += length;
            self.used = 0;
        }
        let byte = self.block[self.used];
        self.used += 1;
        Ok(byte)
    }

    /// Fails unless so many bytes are left.
    pub(super) fn expect(&self, length: u64) -> Result<(), String> {
        match self.left() {
            left if length > left => {
                Err(format!("it ends too early: {length} bytes are claimed, {left} are left"))
            }
            _ => Ok(()),
        }
    }

    /// The next `length` bytes. Memory for them is taken only if the range has as many.
    pub(super) fn take(&mut self, length: u64) -> Result<Vec<u8>, String> {
        self.expect(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads as many bytes as there is room for.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.expect(bytes.len() as u64)?;
        let in_block = bytes.len().min(self.block.len() - self.used);
        let (now, later) = bytes.split_at_mut(in_block);
        now.copy_from_slice(&self.block[self.used..self.used + in_block]);
        self.used += in_block;
        if !later.is_empty() {
            self.source.read_at(later, self.next).map_err(|error| error.to_string())?;
            self.next += later.len() as u64;
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.byte()?;
        }
        Ok(bytes)
    }

    /// The text up to the next line feed, without it.
    pub(super) fn line(&mut self) -> Result<String, String> {
        let mut line = vec![];
        loop {
            match self.byte()? {
                b'\n' => break,
                _ if line.len() == MAX_LINE => return Err("a name in it is too long".into()),
                byte => line.push(byte),
            }
        }
        String::from_utf8(line).map_err(|_| "a name in it is not UTF-8".into())
    }

    pub(super) fn skip(&mut self, length: u64) -> Result<(), String> {
        self.expect(length)?;
        *self = Self::new(self.source, self.position() + length, self.end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_across_blocks_and_never_beyond() {
        let bytes: Vec<u8> = (0..200_000).map(|i| (i % 251) as u8).collect();
        let source = Source::Memory(bytes.clone());
        let mut input = Input::new(&source, 10, 150_000);
        assert_eq!(input.byte(), Ok(bytes[10]));
        assert_eq!(input.take(100_000).unwrap(), bytes[11..100_011]);
        assert_eq!(input.position(), 100_011);
        input.skip(9).unwrap();
        assert_eq!(input.array::<2>().unwrap(), bytes[100_020..100_022]);
        assert!(input.take(u64::MAX).unwrap_err().contains("too early"));
        assert_eq!(input.take(49_978).unwrap(), bytes[100_022..150_000]);
        assert!(input.byte().is_err() && input.take(1).is_err() && input.skip(1).is_err());
    }
}
