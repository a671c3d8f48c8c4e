//! Fuzzes the reader of PyTorch's files: whatever the bytes, it must return an error or a value, and never panic,
//! hang, write a file, or take more memory than twice the file and a mebibyte: the description takes as much as it is
//! allowed, and the tensors as much as the file has. `scripts/fuzz.sh pytorch` runs it, with the files of
//! `tests/golden/interop` to begin with.
//!
//! Checksums are taken out of the archives first, so that the code behind them is reached.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use libfuzzer_sys::fuzz_target;
use tch_ignite::pytorch::{Reader, Value, Weights};

/// Counts the bytes that Rust has, and the most it has had. libtorch's own memory is that of the tensors, which are
/// counted by their storages.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: forwards to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What small files may take in any case.
const FREE: usize = 1 << 20;
/// The part of it that the description may take. The rest is for buffers, and for what the allocator adds.
const FREE_FOR_DESCRIPTION: usize = 3 << 18;
/// libtorch takes up to this much for a tensor beside its elements.
const FOR_A_TENSOR: usize = 1 << 10;

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

/// How much memory this process has, of Rust and of libtorch.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn allocated() -> usize {
    // SAFETY: it only reads counters.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// Other C libraries do not say how much they have given out. Rust's share is counted everywhere.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn allocated() -> usize {
    0
}

fuzz_target!(|data: &[u8]| {
    let bytes = without_checksums(data);
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    // The bytes are in memory, and count as the file.
    let allowed = data.len() + FREE_FOR_DESCRIPTION;
    let read = Reader::new().max_memory(allowed as u64).read_bytes(bytes);
    let peak = PEAK.load(Relaxed) - before;
    assert!(peak <= data.len() + FREE, "{peak} bytes for a file of {}", data.len());
    let Ok(value) = read else { return };
    let described = allocated();
    // Storages keep what they read.
    let mut tensors = 0;
    value.walk(&mut |_, value| {
        tensors += usize::from(value.as_tensor().map(|stored| stored.tensor()).is_some());
    });
    let taken = allocated().saturating_sub(described);
    assert!(
        peak + taken <= 2 * data.len() + FREE + tensors * FOR_A_TENSOR,
        "{peak} bytes, and {taken} of tensors, for a file of {}",
        data.len()
    );
    use_all(&value);
});
