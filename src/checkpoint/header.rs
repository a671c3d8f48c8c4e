//! The JSON at the beginning of a file, read without trust: memory is bounded, whatever it says.

use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tch::Kind;

/// libtorch's own limit for most operations.
const MAX_DIMENSIONS: usize = 64;
/// The memory that the state of a file may take besides the elements of its tensors.
const MAX_MEMORY: usize = 130_000_000;
/// The memory of a value, at most: its place in a list that grows or in half a node of a map, and its text.
const VALUE: usize = 150;
/// The memory of an object: a map has room for eleven from the first on.
const OBJECT: usize = 900;
/// The memory of a tensor: libtorch's objects, and its names.
const TENSOR: usize = 900;

/// safetensors' names of the types that libtorch shares with it.
pub(super) const TYPES: [(&str, Kind); 10] = [
    ("F64", Kind::Double),
    ("I64", Kind::Int64),
    ("F32", Kind::Float),
    ("I32", Kind::Int),
    ("F16", Kind::Half),
    ("BF16", Kind::BFloat16),
    ("I16", Kind::Int16),
    ("I8", Kind::Int8),
    ("U8", Kind::Uint8),
    ("BOOL", Kind::Bool),
];

/// A tensor: what it is, and where it lies after the header.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) shape: Vec<i64>,
    pub(super) from: u64,
}

/// How many texts of the metadata that are not ours are kept: other programs write a few, and other names of
/// tensors.
const MAX_TEXTS: usize = 1 << 16;

/// What the metadata may hold that is of interest.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// `tch-ignite`: the version of the layout.
    pub(super) version: Option<String>,
    pub(super) state: Option<String>,
    pub(super) crc32c: Option<String>,
    pub(super) written: Option<String>,
    pub(super) kept: Option<String>,
    /// Texts that are not ours: other names of tensors may be among them.
    pub(super) others: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    dtype: Type,
    shape: Shape,
    data_offsets: (u64, u64),
}

#[derive(Default)]
struct Header {
    metadata: Option<Metadata>,
    tensors: Vec<(String, Described)>,
}

/// Metadata, and tensors in the order of their places, checked against each other and the `data` bytes
/// that follow.
pub(super) fn parsed(header: &[u8], data: u64) -> Result<(Metadata, Vec<Entry>), String> {
    let Header { metadata, mut tensors } =
        serde_json::from_slice(header).map_err(|error| format!("its header: {error}"))?;
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("there are two tensors '{}'", pair[0].0));
    }
    tensors.sort_by_key(|(_, described)| described.data_offsets);
    let (mut end, mut entries) = (0, Vec::with_capacity(tensors.len()));
    for (name, Described { dtype: Type(kind), shape: Shape(shape), data_offsets }) in tensors {
        let (from, to) = data_offsets;
        let size = kind.elt_size_in_bytes() as u64;
        // What is empty may have any other dimensions, but none that i64 cannot hold.
        let len = shape.iter().try_fold(size, |len, dim| len.checked_mul(*dim as u64));
        if from != end || len.is_none_or(|len| from.checked_add(len) != Some(to)) {
            return Err(format!(
                "tensor '{name}' of shape {shape:?} does not fit into bytes {from} to {to}"
            ));
        }
        end = to;
        entries.push(Entry { name, kind, shape, from });
    }
    if end != data {
        return Err(format!("it should hold {end} bytes of tensors, and holds {data}"));
    }
    Ok((metadata.unwrap_or_default(), entries))
}

/// Refuses a state that would take too much memory when it is read: its JSON, what that becomes, and so many
/// tensors besides their elements.
pub(super) fn check_memory(json: &str, tensors: usize) -> Result<(), String> {
    let (mut values, mut objects, mut in_text, mut escaped) = (0, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' | b'[' if !in_text => values += 1,
            b'{' if !in_text => objects += 1,
            _ => {}
        }
    }
    let memory = json.len() + values * VALUE + objects * OBJECT + tensors * TENSOR;
    match memory > MAX_MEMORY {
        true => Err(format!(
            "its state has {tensors} tensors and {} values or more, which could take {} MB of memory, and {} is the limit: put long lists into tensors",
            values + objects,
            memory / 1_000_000,
            MAX_MEMORY / 1_000_000
        )),
        false => Ok(()),
    }
}

/// Cuts a text to the length that an error may have: a file can hold names of any length.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

struct Type(Kind);

impl<'de> Deserialize<'de> for Type {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let known = TYPES.iter().find(|(dtype, _)| *dtype == name);
        let unknown = || de::Error::custom(format!("it is of unknown type '{name:.20}'"));
        known.map(|(_, kind)| Self(*kind)).ok_or_else(unknown)
    }
}

struct Shape(Vec<i64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Dimensions;

        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut shape = vec![];
                while let Some(size) = list.next_element::<u64>()? {
                    let size = i64::try_from(size).map_err(de::Error::custom)?;
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(de::Error::invalid_length(shape.len() + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }
        from.deserialize_seq(Dimensions)
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("texts by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut metadata = Metadata::default();
                while let Some((key, text)) = map.next_entry::<String, String>()? {
                    let place = match key.as_str() {
                        "tch-ignite" => &mut metadata.version,
                        "state" => &mut metadata.state,
                        "crc32c" => &mut metadata.crc32c,
                        "written" => &mut metadata.written,
                        "kept" => &mut metadata.kept,
                        _ if metadata.others.len() < MAX_TEXTS => {
                            metadata.others.push((key, text));
                            continue;
                        }
                        _ => {
                            return Err(de::Error::custom(format!(
                                "its metadata has more than {MAX_TEXTS} texts"
                            )));
                        }
                    };
                    if place.replace(text).is_some() {
                        return Err(de::Error::custom(format!("it has two '{key}'")));
                    }
                }
                Ok(metadata)
            }
        }
        from.deserialize_map(Texts)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Parts;

        impl<'de> Visitor<'de> for Parts {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name != "__metadata__" {
                        let of_tensor =
                            |error| de::Error::custom(format!("tensor '{name:.100}': {error}"));
                        let described = map.next_value().map_err(of_tensor)?;
                        header.tensors.push((name, described));
                    } else if header.metadata.replace(map.next_value()?).is_some() {
                        return Err(de::Error::custom("it has metadata twice"));
                    }
                }
                Ok(header)
            }
        }
        from.deserialize_map(Parts)
    }
}
