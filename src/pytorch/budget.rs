//! How much memory the plain data of a file may take.

/// The bytes that the allocator and the counts of an `Arc` add to a piece of memory.
const OVERHEAD: usize = 32;

/// Memory is asked for here before it is taken: a few bytes of a program can stand for a container, or for a copy of
/// one.
pub(super) struct Budget {
    allowed: u64,
    taken: u64,
    exceeded: bool,
}

impl Budget {
    pub(super) fn new(allowed: u64) -> Self {
        Self { allowed, taken: 0, exceeded: false }
    }

    /// Whether memory was refused, so that the file need not be damaged.
    pub(super) fn is_exceeded(&self) -> bool {
        self.exceeded
    }

    /// Counts memory that is about to be taken.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), String> {
        let taken = self.taken.saturating_add(bytes as u64);
        if taken > self.allowed {
            self.exceeded = true;
            return Err(format!(
                "its data beside the tensors would take {taken} bytes of memory, and may take {}: \
                 Reader::max_memory allows more to a file that you trust",
                self.allowed
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
            // The old elements are there until they have been moved.
            self.take(new.saturating_mul(size_of::<T>()))?;
            vec.reserve_exact(new - length);
            self.give_back(capacity * size_of::<T>());
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
