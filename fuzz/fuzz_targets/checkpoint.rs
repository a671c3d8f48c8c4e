//! Fuzzes the reader of checkpoints: whatever the bytes, it must return an error or a state, and never panic, hang or
//! take much memory. `scripts/fuzz.sh checkpoint` runs it.
//!
//! The first byte of the input says whether this program corrects the checksum and the length of the header, so that
//! the code behind these checks is reached too. The rest is the file.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tch::{Device, nn::VarStore};
use tch_ignite::checkpoint::{load_weights, read_state, verify, write_state};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
    folder.join(format!("tch-ignite-fuzz-{}", std::process::id()))
});

thread_local! {
    static STORE: VarStore = {
        let vs = VarStore::new(Device::Cpu);
        let _ = vs.root().ones("weight", &[2, 3]);
        vs
    };
}

/// The range of the checksum's eight digits in the file.
fn digits(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let key = b"\"crc32c\":\"";
    let at = bytes.windows(key.len()).position(|window| window == key)? + key.len();
    (at + 8 <= bytes.len()).then_some(at..at + 8)
}

fn mended(how: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = rest.to_vec();
    if how & 1 != 0 && bytes.len() > 8 {
        // The header is taken to end with the last brace.
        let end = bytes.iter().rposition(|byte| *byte == b'}').map_or(8, |at| at + 1).max(8);
        bytes[..8].copy_from_slice(&(end as u64 - 8).to_le_bytes());
    }
    if how & 2 != 0
        && let Some(digits) = digits(&bytes)
    {
        bytes[digits.clone()].copy_from_slice(b"00000000");
        let crc = format!("{:08x}", crc32c::crc32c(&bytes[8..]));
        bytes[digits].copy_from_slice(crc.as_bytes());
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let Some((how, rest)) = data.split_first() else { return };
    std::fs::write(&*FILE, mended(*how, rest)).expect("a file in memory");
    let whole = verify(&*FILE).is_ok();
    if let Ok(state) = read_state(&*FILE) {
        assert!(whole, "read, but not whole");
        // A state that could be read can be written, and read again.
        write_state(&*FILE, &state).expect("written");
        read_state(&*FILE).expect("read again");
    }
    let _ = STORE.with(|vs| load_weights(vs, &*FILE));
});
