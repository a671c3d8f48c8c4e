//! The container that torch wrote before 1.6: five pickles behind each other, then the storages.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::budget::Budget;
use super::freeze::freeze;
use super::machine::Machine;
use super::source::{Input, Source};
use super::storage::Place;
use super::value::Value;

/// The number that the first pickle holds, lowest byte first.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// Whether a file begins as this container does: with a pickle of the magic number.
pub(super) fn begins_like_one(begin: &[u8]) -> bool {
    begin.len() >= 14 && begin[0] == 0x80 && begin[2..4] == [0x8a, 10] && begin[4..14] == MAGIC
}

pub(super) fn read(
    source: &Arc<Source>,
    allowed: &BTreeSet<String>,
    budget: &mut Budget,
) -> Result<Value, String> {
    let mut input = Input::new(source, 0, source.length());
    let none = BTreeSet::new();
    let plain = |input: &mut Input<'_>, budget: &mut Budget| -> Result<Value, String> {
        let mut made = Machine::new(input, &none, budget).run()?;
        match made.storages.is_empty() {
            true => freeze(&mut made, budget),
            false => Err("it has a storage where there can be none".into()),
        }
    };
    match plain(&mut input, budget)? {
        Value::BigInt(magic) if magic.bytes[..] == MAGIC => {}
        _ => return Err("it is no file of torch.save".into()),
    }
    match plain(&mut input, budget)?.as_i64() {
        Some(PROTOCOL) => {}
        _ => return Err("it is of a version that torch does not know either".into()),
    }
    let system = plain(&mut input, budget)?;
    let little = system.get("little_endian").and_then(Value::as_bool).unwrap_or(true);

    let mut made = Machine::new(&mut input, allowed, budget).run()?;
    let keys = plain(&mut input, budget)?;
    let keys = keys.as_slice().ok_or("its list of storages is damaged")?;

    let mut storages: HashMap<Arc<str>, _> =
        made.storages.iter().map(|referred| (referred.key.clone(), &referred.storage)).collect();
    for key in keys {
        let key = match key {
            Value::Str(key) => key.clone(),
            Value::Int(key) => key.to_string().into(),
            _ => return Err("its list of storages is damaged".into()),
        };
        let unknown = "its list of storages has one twice, or one that no tensor uses";
        let storage = storages.remove(&key).ok_or(unknown)?;
        // The number of elements stands before each storage.
        let count = u64::from_le_bytes(input.array()?);
        if count.checked_mul(storage.dtype.size()) != Some(storage.length) {
            return Err(format!(
                "a storage should have {} bytes, and has {count} elements",
                storage.length
            ));
        }
        let begin = input.position();
        input.skip(storage.length)?;
        storage.put_at(Place {
            source: source.clone(),
            begin,
            crc: None,
            swapped: little == cfg!(target_endian = "big"),
        });
    }
    match storages.is_empty() {
        true => freeze(&mut made, budget),
        false => Err("its list of storages is not whole".into()),
    }
}
