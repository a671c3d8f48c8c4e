//~ samples `Sample` cannot be put together into a batch
//~ collate
use tch_ignite::data::{DataLoader, from_fn};

pub struct Sample;

pub fn loader() {
    let _ = DataLoader::new(from_fn(10, |_, _| Ok(Sample)), 2);
}
