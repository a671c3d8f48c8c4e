//! Turns the numbered containers that the pickle machine made into values.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use super::budget::{Budget, table};
use super::machine::{DictNode, Item, MAX_DEPTH, Made, Node, ObjectNode};
use super::tensor::StoredTensor;
use super::value::{BigInt, Dict, Object, Value};

/// How many values there may be at least, counting shared ones as often as they are met: somebody will walk over them,
/// or print them.
const MIN_VALUES: u64 = 1 << 20;
/// So many bytes of a text count as a value.
const BYTES_OF_A_VALUE: usize = 16;
/// How many parts a key may have, counted in the same way.
const MAX_KEY: u64 = 1000;

/// Makes the value of a program's result. A container that several others refer to becomes one value that they share.
pub(super) fn freeze(made: &mut Made, budget: &mut Budget) -> Result<Value, String> {
    let result = mem::replace(&mut made.result, Item::Plain(Value::None));
    let nodes = mem::take(&mut made.nodes);
    let mut places = vec![];
    budget.reserve(&mut places, nodes.len())?;
    let moved = nodes.capacity() * size_of::<Node>();
    places.extend(nodes.into_iter().map(Place::Node));
    budget.give_back(moved);
    let mut freezer = Freezer { places, made, budget, nans: 0 };
    let frozen = freezer.item(result, 0)?;
    let limit = made.length.max(MIN_VALUES);
    match frozen.count > limit {
        true => Err(format!(
            "it refers to the same containers so often that it has more than {limit} values"
        )),
        false => Ok(frozen.value),
    }
}

#[derive(Clone)]
struct Frozen {
    value: Value,
    /// The value itself and all values in it; a shared one counts each time.
    count: u64,
    /// How many containers are nested in each other; 0 for a value that is no container.
    depth: usize,
}

enum Place {
    Node(Node),
    /// The container is being frozen: whoever meets it again has found a cycle.
    Busy,
    Done(Frozen),
}

struct Freezer<'m> {
    places: Vec<Place>,
    made: &'m Made,
    budget: &'m mut Budget,
    /// How many NaN were met among keys.
    nans: u64,
}

/// The `count` and `depth` of a container, summed up while its parts are frozen.
struct Sums {
    count: u64,
    depth: usize,
}

impl Freezer<'_> {
    fn item(&mut self, item: Item, depth: usize) -> Result<Frozen, String> {
        match item {
            Item::Plain(value) => Ok(Frozen { count: count_of(&value), value, depth: 0 }),
            Item::Node(number) => self.node(number as usize, depth),
            Item::Global(name, _) => self.item(Item::Plain(Value::Constant(name)), depth),
            Item::Storage(number) => {
                self.budget.take_piece(size_of::<StoredTensor>() + 16)?;
                let storage = self.made.bare_storage(number).ok_or("a storage is damaged")?;
                Ok(Frozen { value: storage.into(), count: 1, depth: 0 })
            }
        }
    }

    fn node(&mut self, number: usize, depth: usize) -> Result<Frozen, String> {
        let too_deep = || format!("its containers are more than {MAX_DEPTH} deep in each other");
        let node = match mem::replace(&mut self.places[number], Place::Busy) {
            Place::Busy => return Err("a container is within itself".into()),
            Place::Done(frozen) => {
                self.places[number] = Place::Done(frozen.clone());
                return match depth + frozen.depth > MAX_DEPTH {
                    true => Err(too_deep()),
                    false => Ok(frozen),
                };
            }
            Place::Node(node) => node,
        };
        if depth >= MAX_DEPTH {
            return Err(too_deep());
        }
        // The parts of the node are let go of when those of the value are there.
        let memory = node.memory();
        self.budget.take_piece(match &node {
            Node::List(_) | Node::Tuple(_) | Node::Set(_) => size_of::<Vec<Value>>(),
            Node::Dict(_) => size_of::<Dict>(),
            Node::Object(_) => size_of::<Object>(),
        })?;
        let mut sums = Sums { count: 1, depth: 0 };
        let value = match node {
            Node::List(items) => Value::List(Arc::new(self.items(items, depth, &mut sums)?)),
            Node::Tuple(items) => Value::Tuple(Arc::new(self.items(items, depth, &mut sums)?)),
            Node::Set(items) => {
                // A set is a dict without values, which takes three times its memory for a while.
                let (mut pairs, mut elements) = (vec![], vec![]);
                self.budget.reserve_exact::<(Item, Item)>(&mut pairs, items.len())?;
                let bytes = pairs.capacity() * size_of::<(Item, Item)>();
                pairs.extend(items.into_iter().map(|item| (item, Item::Plain(Value::None))));
                let entries = self.entries(pairs, depth, &mut sums)?;
                self.budget.give_back(bytes);
                self.budget.reserve_exact(&mut elements, entries.len())?;
                let bytes = entries.capacity() * size_of::<(Value, Value)>();
                elements.extend(entries.into_iter().map(|(element, _)| element));
                self.budget.give_back(bytes);
                Value::Set(Arc::new(elements))
            }
            Node::Dict(dict) => {
                let DictNode { class, entries, attributes } = *dict;
                let entries = self.entries(entries, depth, &mut sums)?;
                let attributes =
                    attributes.map(|state| self.part(state, depth, &mut sums)).transpose()?;
                Value::Dict(Arc::new(Dict { class, entries, attributes }))
            }
            Node::Object(object) => {
                let ObjectNode { class, new, arguments, state, elements, entries } = *object;
                sums.count += (class.len() / BYTES_OF_A_VALUE) as u64;
                Value::Object(Arc::new(Object {
                    class,
                    new,
                    arguments: self.part(arguments, depth, &mut sums)?,
                    elements: self.items(elements, depth, &mut sums)?,
                    entries: self.entries(entries, depth, &mut sums)?,
                    state: state.map(|state| self.part(state, depth, &mut sums)).transpose()?,
                }))
            }
        };
        self.budget.give_back(memory);
        let frozen = Frozen { value, count: sums.count, depth: sums.depth + 1 };
        self.places[number] = Place::Done(frozen.clone());
        Ok(frozen)
    }

    fn part(&mut self, item: Item, depth: usize, sums: &mut Sums) -> Result<Value, String> {
        let frozen = self.item(item, depth + 1)?;
        sums.count = sums.count.saturating_add(frozen.count);
        sums.depth = sums.depth.max(frozen.depth);
        Ok(frozen.value)
    }

    fn items(
        &mut self,
        items: Vec<Item>,
        depth: usize,
        sums: &mut Sums,
    ) -> Result<Vec<Value>, String> {
        let mut values = vec![];
        self.budget.reserve_exact(&mut values, items.len())?;
        for item in items {
            values.push(self.part(item, depth, sums)?);
        }
        Ok(values)
    }

    /// As in Python, a key that comes again takes the later value and keeps its place.
    fn entries(
        &mut self,
        items: Vec<(Item, Item)>,
        depth: usize,
        sums: &mut Sums,
    ) -> Result<Vec<(Value, Value)>, String> {
        let mut entries: Vec<(Value, Value)> = vec![];
        self.budget.reserve_exact(&mut entries, items.len())?;
        let table = table::<Key, usize>(items.len());
        self.budget.take(table)?;
        let mut places = HashMap::with_capacity(items.len());
        for (key, value) in items {
            let key = self.item(key, depth + 1)?;
            if let Value::Tuple(_) = key.value {
                if key.count > MAX_KEY {
                    return Err("a key is too large".into());
                }
                self.budget.take(key.count as usize * size_of::<Key>())?;
            }
            sums.count = sums.count.saturating_add(key.count);
            sums.depth = sums.depth.max(key.depth);
            let value = self.part(value, depth, sums)?;
            match places.entry(Key::of(&key.value, &mut self.nans)?) {
                std::collections::hash_map::Entry::Occupied(place) => {
                    let place: &usize = place.get();
                    entries[*place].1 = value;
                }
                std::collections::hash_map::Entry::Vacant(place) => {
                    place.insert(entries.len());
                    entries.push((key.value, value));
                }
            }
        }
        self.budget.give_back(table);
        Ok(entries)
    }
}

/// How many values a plain one counts as: what is long when printed counts as several.
fn count_of(value: &Value) -> u64 {
    let more = match value {
        Value::Str(text) | Value::Constant(text) | Value::Device(text) => {
            text.len() / BYTES_OF_A_VALUE
        }
        Value::Bytes(bytes) => bytes.len() / BYTES_OF_A_VALUE,
        // Decimal digits take the square of the length.
        Value::BigInt(int) => int.bytes.len(),
        Value::Tensor(tensor) => tensor.size().len(),
        _ => 0,
    };
    1 + more as u64
}

/// Two keys are equal here where Python takes them for equal, as it does `1`, `1.0` and `True`.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    None,
    Int(i64),
    BigInt(BigInt),
    Float(u64),
    /// Equals no other key, not even that of another NaN.
    Nan(u64),
    Complex(u64, u64),
    Text(Arc<str>),
    Bytes(Arc<[u8]>),
    Name(Arc<str>),
    Tuple(Vec<Key>),
}

impl Key {
    /// The key that a value is; `nans` numbers those that equal no other.
    fn of(value: &Value, nans: &mut u64) -> Result<Self, String> {
        Ok(match value {
            Value::None => Self::None,
            Value::Bool(bool) => Self::Int((*bool).into()),
            Value::Int(int) => Self::Int(*int),
            Value::BigInt(int) => match int.as_float() {
                Some(float) => Self::Float(float.to_bits()),
                None => Self::BigInt(int.clone()),
            },
            Value::Float(float) if float.is_nan() => Self::nan(nans),
            // 2^63, which the highest i64 is rounded to, is no i64.
            Value::Float(float) if *float == (*float as i64) as f64 && *float < i64::MAX as f64 => {
                Self::Int(*float as i64)
            }
            Value::Float(float) => Self::Float(float.to_bits()),
            Value::Complex(real, 0.) => Self::of(&Value::Float(*real), nans)?,
            Value::Complex(real, imaginary) if real.is_nan() || imaginary.is_nan() => {
                Self::nan(nans)
            }
            // Adding 0 makes 0 of -0, which it equals.
            Value::Complex(real, imaginary) => {
                Self::Complex((real + 0.).to_bits(), imaginary.to_bits())
            }
            Value::Str(text) => Self::Text(text.clone()),
            Value::Bytes(bytes) => Self::Bytes(bytes.clone()),
            Value::Constant(name) | Value::Device(name) => Self::Name(name.clone()),
            Value::Tuple(values) => {
                // The room is exact, as it was counted.
                let mut keys = Vec::with_capacity(values.len());
                for value in values.iter() {
                    keys.push(Self::of(value, nans)?);
                }
                Self::Tuple(keys)
            }
            other => return Err(format!("a {} cannot be a key", other.type_name())),
        })
    }

    fn nan(nans: &mut u64) -> Self {
        *nans += 1;
        Self::Nan(*nans)
    }
}
