//! How much memory the plain data of a pickle may take.

/// Small files may take this much in any case.
const FREE: u64 = 64 << 20;
/// The bytes of memory that each byte read adds. A list of `None` takes 72 bytes for each, and no other data that Python writes takes more.
const FOR_EACH_BYTE: u64 = 96;
/// The bytes that the allocator and the counts of an `Arc` add to a piece of memory.
const OVERHEAD: usize = 32;

/// Memory is asked for here before it is taken: a few bytes of a program can stand for a container, or for a copy of
/// one.
#[derive(Default)]
pub(super) struct Budget {
    taken: u64,
    read: u64,
}

impl Budget {
    /// So many bytes of the program have been read.
    pub(super) fn has_read(&mut self, bytes: u64) {
        self.read = bytes;
    }

    /// Counts memory that is about to be taken.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), String> {
        let taken = self.taken.saturating_add(bytes as u64);
        if taken > FREE.saturating_add(self.read.saturating_mul(FOR_EACH_BYTE)) {
            return Err(format!(
                "its data would take {taken} bytes after {} that were read",
                self.read
            ));
        }
        self.taken = taken;
        Ok(())
    }

    /// Counts a piece of memory of its own.
    pub(super) fn take_piece(&mut self, bytes: usize) -> Result<(), String> {
        self.take(bytes.saturating_add(OVERHEAD))
    }

    /// Counts memory that is no longer needed.
    pub(super) fn give_back(&mut self, bytes: usize) {
        self.taken = self.taken.saturating_sub(bytes as u64);
    }

    /// Makes room for more elements, twice what there was where that is more, as a `Vec` does.
    pub(super) fn reserve<T>(&mut self, vec: &mut Vec<T>, more: usize) -> Result<(), String> {
        let (length, capacity) = (vec.len(), vec.capacity());
        if capacity - length < more {
            let new = length.saturating_add(more).max(2 * capacity).max(4);
            self.take((new - capacity).saturating_mul(size_of::<T>()))?;
            vec.reserve_exact(new - length);
        }
        Ok(())
    }

    /// Makes room for so many elements in an empty vector.
    pub(super) fn reserve_exact<T>(
        &mut self,
        vec: &mut Vec<T>,
        count: usize,
    ) -> Result<(), String> {
        self.take(count.saturating_mul(size_of::<T>()))?;
        vec.reserve_exact(count);
        Ok(())
    }
}

/// Memory of a hash table for so many entries.
pub(super) fn table<K, V>(entries: usize) -> usize {
    // Seven of eight places may be used, and there is a power of two of them.
    let places = (entries.saturating_mul(8) / 7).max(4).next_power_of_two();
    places.saturating_mul(size_of::<(K, V)>() + 1)
}
