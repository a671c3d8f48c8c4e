/// Lets the process keep up to so many bytes of freed memory at the end of its heap, and take tensors of up to 32 MiB from
/// the heap, on Linux with glibc; says whether it does. Once, at the start of the program.
///
/// A training step allocates and frees the same tensors again and again. glibc gives their memory back to the system each
/// time, and gets it back page by page, zeroed: a fifth of the time of a small model's training on the CPU. What is kept
/// is memory that the process had already. A setting of the whole process, so no part of this crate makes it by itself;
/// `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` are the same from outside, and other allocators (jemalloc,
/// tcmalloc) do not need it.
///
/// ```
/// let kept = tch_ignite::keep_freed_memory(512 << 20);
/// assert_eq!(kept, cfg!(all(target_os = "linux", target_env = "gnu")));
/// ```
pub fn keep_freed_memory(bytes: usize) -> bool {
    crate::bridge::keep_freed(bytes)
}
