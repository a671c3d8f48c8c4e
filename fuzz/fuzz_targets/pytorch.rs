//! Fuzzes the reader of PyTorch's files: whatever the bytes, it must return an error or a value, and never panic,
//! hang, write a file or take much memory. Run it from the repository's root, with files that Python wrote to begin
//! with: `cargo +nightly fuzz run pytorch fuzz/corpus/pytorch tests/golden/interop -- -rss_limit_mb=2000`.
//!
//! Checksums are taken out of the archives first, so that the code behind them is reached.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tch_ignite::pytorch::{Reader, Value, Weights};

/// Sets the checksums in an archive's directory to 0, which says that there are none.
fn without_checksums(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    let is_entry = |at: &usize| data[*at..].starts_with(b"PK\x01\x02") && data.len() >= at + 20;
    for at in (0..data.len()).filter(is_entry) {
        bytes[at + 16..at + 20].fill(0);
    }
    bytes
}

fn use_all(value: &Value) {
    let mut tensors = vec![];
    value.walk(&mut |_, value| tensors.extend(value.as_tensor()));
    for tensor in tensors {
        // A few bytes may claim a tensor of any number of elements, by strides of 0; the storage that it reads is no
        // larger than the file.
        if tensor.tensor().is_ok() && tensor.numel() < 1 << 16 {
            tensor.to_bytes().expect("read before");
        }
    }
    let _ = Weights::of(value);
    let _ = value.to_string();
}

fuzz_target!(|data: &[u8]| {
    if let Ok(value) = Reader::new().read_bytes(without_checksums(data)) {
        use_all(&value);
    }
});
