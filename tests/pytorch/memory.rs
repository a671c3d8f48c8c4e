//! Reading a file takes no more memory than it may, whatever the file says.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use anyhow::Result;
use tch_ignite::pytorch::{Reader, Value};

use super::archive;

/// Counts what each thread has, and the most it has had.
struct Counting;

thread_local! {
    static NOW: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    // A thread that ends has no counters any more.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        PEAK.try_with(|peak| peak.set(peak.get().max(now.get())))
    });
}

// SAFETY: forwards to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls a function and tells how much memory that took at its most.
pub fn counted<T>(call: impl FnOnce() -> T) -> (T, i64) {
    let before = NOW.get();
    PEAK.set(before);
    let value = call();
    (value, PEAK.get() - before)
}

/// Reads an archive and tells how much memory that took at its most.
pub fn read(reader: &Reader, bytes: Vec<u8>) -> (tch_ignite::Result<Value>, i64) {
    counted(|| reader.read_bytes(bytes))
}

/// A storage of 4 bytes: its id at 0, and the arguments of a tensor over it at 2 behind the function at 1.
const TENSOR: &[u8] = b"\x80\x02((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tq\x00\
    ctorch._utils\n_rebuild_tensor_v2\nq\x01(h\x00QK\x00))\x89Ntq\x02";

/// A function at 0, and the name of a device at 1.
const DEVICE: &[u8] = b"\x80\x02(ctorch\ndevice\nq\x00X\x04\x00\x00\x00cuda\x85q\x01";

/// Reading takes up to this much beside what it counts: for buffers, and for the text of an error.
const SLACK: i64 = 100_000;

#[test]
fn no_file_takes_more_memory_than_it_may() -> Result<()> {
    let many = |before: &[u8], part: &[u8], count: usize, after: &[u8]| {
        [before, &part.repeat(count), after].concat()
    };
    // A tuple of 900 values as part of each key.
    let mut keys = many(b"\x80\x02(", b"N", 900, b"tq\x00}(");
    for number in 0..20_000i32 {
        keys.extend([b"h\x00J", &number.to_le_bytes()[..], b"\x86N"].concat());
    }
    keys.extend(b"u\x86.");
    let (mut set, mut dict) = (b"\x80\x04\x8f(".to_vec(), b"\x80\x04}(".to_vec());
    for number in 0..150_000i32 {
        set.extend([b"J", &number.to_le_bytes()[..]].concat());
        dict.extend([b"J", &number.to_le_bytes()[..], b"N"].concat());
    }
    set.extend(b"\x90.");
    dict.extend(b"u.");
    let long_int = [b"\x80\x02(\x8a\xff".to_vec(), vec![0x55; 255], b"q\x00".to_vec()].concat();
    let text = [b"\x80\x02(X\x00\x00\x10\x00".to_vec(), vec![b'a'; 1 << 20], b"q\x00".to_vec()];
    let text = text.concat();
    let encode = [&text[..], b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"].concat();
    let (memory, often) = (Err("max_memory"), Err("so often"));
    for (what, pickle, expected) in [
        ("dicts", many(b"\x80\x02(", b"}", 2_000_000, b"t."), memory),
        ("tuples", many(b"\x80\x02(", b")", 2_000_000, b"t."), memory),
        ("sets", many(b"\x80\x04(", b"\x8f", 2_000_000, b"t."), memory),
        ("tuples of one", many(b"\x80\x02(N", b"\x85", 150, b"t."), Ok(())),
        ("a tuple in keys", keys, memory),
        ("places", many(b"\x80\x04N", b"\x94", 250_000, b"."), Ok(())),
        ("values", many(b"\x80\x02(", b"N", 700_000, b"t."), Ok(())),
        ("a list that grows", many(b"\x80\x02]", b"Na", 1_000_000, b"."), Ok(())),
        ("batches", many(b"\x80\x02]", b"(NNNNNNNNNNe", 100_000, b"."), Ok(())),
        ("one key", many(b"\x80\x02}(", b"NN", 200_000, b"u."), Ok(())),
        ("objects", many(b"\x80\x02(ca\nb\nq\x00)q\x01", b"h\x00h\x01R", 150_000, b"t."), Ok(())),
        (
            "new objects",
            many(b"\x80\x04(ca\nb\nq\x00)q\x01", b"h\x00h\x01\x81", 150_000, b"t."),
            Ok(()),
        ),
        ("tensors", many(TENSOR, b"h\x01h\x02R", 200_000, b"t."), Ok(())),
        ("storages", many(TENSOR, b"h\x00Q", 200_000, b"t."), Ok(())),
        ("numbers in a set", set, Ok(())),
        ("numbers in a dict", dict, Ok(())),
        (
            "long ints",
            many(b"\x80\x02(", b"\x8a\x09\x01\x02\x03\x04\x05\x06\x07\x08\x09", 200_000, b"t."),
            Ok(()),
        ),
        ("devices", many(DEVICE, b"h\x00h\x01R", 200_000, b"t."), Ok(())),
        ("one long int", many(&long_int, b"h\x00", 500_000, b"t."), often),
        ("one text", many(&text, b"h\x00", 500_000, b"t."), often),
        ("bytes of one text", many(&encode, b"h\x01h\x00h\x02\x86R", 100, b"t."), Err("copies")),
        (
            "a tuple twice",
            many(b"\x80\x02)q\x00", b"h\x00h\x00\x86q\x00", 100, b"."),
            Err("leaves"),
        ),
        (
            "a tuple within tuples",
            many(b"\x80\x02(Nq\x00", b"h\x00h\x00\x86q\x00", 100, b"t."),
            often,
        ),
    ] {
        let file = archive(&[("data.pkl", &pickle), ("data/0", &[0; 4])]);
        drop(pickle);
        let (length, reader) = (file.len() as i64, Reader::new().allow("a.b"));
        let (result, peak) = read(&reader, file.clone());
        match (&result, expected) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(reason)) => {
                assert!(error.to_string().contains(reason), "{what}: {error}");
            }
            (Ok(value), _) => panic!("{what}: {}, {peak} bytes", value.type_name()),
            (Err(error), _) => panic!("{what}: {error}"),
        }
        assert!(peak < (64 << 20) + length + SLACK, "{what}: {peak} bytes for {length}");
        let (_, peak) = read(&reader.max_memory(3 << 20), file);
        assert!(peak < (3 << 20) + SLACK, "{what}: {peak} bytes where 3 MiB are allowed");
    }
    Ok(())
}

#[test]
fn bytes_are_read_where_they_stay_and_texts_are_copied_once() {
    let most = Reader::new().max_memory(3 << 20);
    let part = vec![b'a'; 5 << 19];
    let length = (part.len() as u32).to_le_bytes();
    for (opcode, fits) in [(b'B', true), (b'X', false)] {
        let pickle = [b"\x80\x03", &[opcode][..], &length, &part, b"."].concat();
        let (value, peak) = read(&most, archive(&[("data.pkl", &pickle)]));
        assert_eq!(value.is_ok(), fits, "{}", opcode as char);
        assert!(peak < (3 << 20) + SLACK, "{peak}");
    }
}

#[test]
fn whoever_trusts_a_file_allows_it_more() -> Result<()> {
    // The data of Python's pickler that takes the most memory for its length: batches of 1000, texts used again.
    let batch = |part: &[u8]| [b"(".to_vec(), part.repeat(1000), b"e".to_vec()].concat();
    for (what, part) in [
        ("None", &b"N"[..]),
        ("small integers", b"K\x07"),
        ("pairs", b"K\x01K\x02\x86\x94"),
        ("lists", b"]\x94"),
        ("dicts", b"}\x94(h\x01K\x01h\x01K\x02u"),
    ] {
        let batches = batch(part).repeat(2000);
        let pickle = [b"\x80\x04]\x94\x8c\x01k\x94a", &batches[..], b"."].concat();
        let file = archive(&[("data.pkl", &pickle)]);
        let error = Reader::new().read_bytes(file.clone()).unwrap_err().to_string();
        assert!(error.contains("Reader::max_memory"), "{what}: {error}");
        assert!(!error.contains("damaged"), "{what}: {error}");
        let value = Reader::new().max_memory(1 << 30).read_bytes(file);
        let value = value.map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
        assert_eq!(value.as_slice().map(<[_]>::len), Some(2_000_001), "{what}");
    }
    Ok(())
}
