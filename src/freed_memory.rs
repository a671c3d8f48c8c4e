/// Lets the process keep up to `bytes` of freed memory at the end of its heap, and take tensors of up to 32 MiB from
/// the heap, on Linux with glibc. Returns whether the settings were made. Call this once, at the start of the program.
///
/// A training step allocates and frees the same tensors again and again. By default glibc returns their memory to the
/// system each time, and gets it back page by page, zeroed: a fifth of the training time of a small model on the CPU.
/// The process only keeps memory that it had already. The settings apply to the whole process, so no other part of this
/// crate makes them. The environment variables `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` do the same from
/// outside; other allocators (jemalloc, tcmalloc) do not need this.
///
/// ```
/// let kept = tch_ignite::keep_freed_memory(512 << 20);
/// assert_eq!(kept, cfg!(all(target_os = "linux", target_env = "gnu")));
/// ```
pub fn keep_freed_memory(bytes: usize) -> bool {
    crate::bridge::keep_freed(bytes)
}
