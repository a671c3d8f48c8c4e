//! The container of Hugging Face's weights: a header of JSON, then the elements of all tensors.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::dtype::DType;
use super::source::Source;
use super::storage::{Place, Storage};
use super::tensor::{Memory, StoredTensor};
use crate::error::{Error, Result};
use crate::fs::write_atomically;

/// As in the implementation of safetensors.
const MAX_HEADER: u64 = 100_000_000;
const METADATA: &str = "__metadata__";
/// As libtorch's own loops over dimensions.
const MAX_DIMENSIONS: usize = 64;

const TYPES: [(&str, DType); 18] = [
    ("F64", DType::Float64),
    ("F32", DType::Float32),
    ("F16", DType::Float16),
    ("BF16", DType::BFloat16),
    ("F8_E4M3", DType::Float8E4M3Fn),
    ("F8_E4M3FNUZ", DType::Float8E4M3FnUz),
    ("F8_E5M2", DType::Float8E5M2),
    ("F8_E5M2FNUZ", DType::Float8E5M2FnUz),
    ("F8_E8M0", DType::Float8E8M0FnU),
    ("C64", DType::Complex64),
    ("I64", DType::Int64),
    ("I32", DType::Int32),
    ("I16", DType::Int16),
    ("I8", DType::Int8),
    ("U64", DType::UInt64),
    ("U32", DType::UInt32),
    ("U16", DType::UInt16),
    ("U8", DType::UInt8),
];
const BOOL: &str = "BOOL";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Default)]
struct Header {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Described>,
}

/// Each entry becomes what it is at once: one that is kept aside first takes many times its length.
impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        header.metadata = map.next_value()?;
                    } else if header.tensors.insert(name, map.next_value()?).is_some() {
                        return Err(de::Error::custom("two tensors have one name"));
                    }
                }
                Ok(header)
            }
        }
        from.deserialize_map(Entries)
    }
}

fn dtype_of(name: &str) -> Option<DType> {
    match name {
        BOOL => Some(DType::Bool),
        name => TYPES.iter().find(|(own, _)| *own == name).map(|(_, dtype)| *dtype),
    }
}

fn name_of(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::Bool => Some(BOOL),
        dtype => TYPES.iter().find(|(_, own)| *own == dtype).map(|(name, _)| *name),
    }
}

type Tensors = Vec<(String, Arc<StoredTensor>)>;

/// The tensors of a file in their order there, not read yet, and under their other names those that its metadata says
/// are tied.
pub(super) fn read(path: &Path) -> Result<Tensors> {
    let (mut tensors, metadata) = with_metadata(path)?;
    let places: HashMap<String, usize> =
        tensors.iter().enumerate().map(|(place, (name, _))| (name.clone(), place)).collect();
    let mut tied: Vec<_> =
        metadata.into_iter().filter(|(name, _)| !places.contains_key(name)).collect();
    tied.sort();
    for (name, kept) in tied {
        if let Some(place) = places.get(&kept) {
            let tensor = tensors[*place].1.clone();
            tensors.push((name, tensor));
        }
    }
    Ok(tensors)
}

/// The tensors of a file in their order there, not read yet, and its metadata.
pub(super) fn with_metadata(path: &Path) -> Result<(Tensors, HashMap<String, String>)> {
    let source =
        Source::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    of(Arc::new(source)).map_err(|why| Error::State(format!("{}: {why}", path.display())))
}

fn of(source: Arc<Source>) -> Result<(Tensors, HashMap<String, String>), String> {
    let mut length = [0; 8];
    source.read_at(&mut length, 0).map_err(|_| "it is no safetensors file")?;
    let length = u64::from_le_bytes(length);
    let data = source.length() - 8;
    if length > MAX_HEADER.min(data) {
        return Err(format!("it is no safetensors file, or damaged: a header of {length} bytes"));
    }
    let mut header = vec![0; length as usize];
    source.read_at(&mut header, 8).map_err(|error| error.to_string())?;
    if header.first() != Some(&b'{') {
        return Err("it is no safetensors file: its header is no JSON".into());
    }
    let Header { metadata, tensors } =
        serde_json::from_slice(&header).map_err(|error| format!("its header: {error}"))?;
    let (begin, data) = (8 + length, data - length);
    let mut found = Vec::with_capacity(tensors.len());
    for (name, described) in tensors {
        let tensor = stored(&source, begin, data, &described)
            .map_err(|why| format!("tensor '{}': {why}", name.escape_default()))?;
        found.push((described.data_offsets, name, Arc::new(tensor)));
    }
    found.sort_by_key(|(offsets, ..)| *offsets);
    let mut end = 0;
    for ((from, to), name, _) in &found {
        if *from != end {
            let name = name.escape_default();
            return Err(format!(
                "tensor '{name}' begins at {from}, and the one before ends at {end}"
            ));
        }
        end = *to;
    }
    if end != data {
        return Err(format!("its tensors have {end} bytes, and there are {data}"));
    }
    let tensors = found.into_iter().map(|(_, name, tensor)| (name, tensor)).collect();
    Ok((tensors, metadata))
}

/// The tensor of an entry: a storage of its own.
fn stored(
    source: &Arc<Source>,
    begin: u64,
    data: u64,
    described: &Described,
) -> Result<StoredTensor, String> {
    let Described { dtype, shape, data_offsets: (from, to) } = described;
    let dtype = dtype_of(dtype)
        .ok_or_else(|| format!("its type {} is not known", dtype.escape_default()))?;
    let shape: Option<Vec<i64>> = shape.iter().map(|length| i64::try_from(*length).ok()).collect();
    let shape = shape.filter(|shape| shape.len() <= MAX_DIMENSIONS);
    let shape = shape.ok_or("its shape is damaged")?;
    // The strides must be numbers, too, where it is empty.
    let count = shape.iter().try_fold(1i64, |count, length| count.checked_mul((*length).max(1)));
    count.ok_or("its shape is damaged")?;
    let length = shape.iter().product::<i64>() as u64;
    if length.checked_mul(dtype.size()) != to.checked_sub(*from) || *to > data {
        return Err(format!("bytes {from} to {to} are not those of shape {shape:?}"));
    }
    let storage = Storage::new(dtype, to - from);
    storage.put_at(Place {
        source: source.clone(),
        begin: begin + from,
        crc: None,
        swapped: cfg!(target_endian = "big"),
    });
    let mut strides = vec![1; shape.len()];
    for dimension in (1..shape.len()).rev() {
        strides[dimension - 1] = strides[dimension] * shape[dimension].max(1);
    }
    Ok(StoredTensor {
        memory: Memory::File(Arc::new(storage)),
        dtype,
        shape,
        strides,
        offset: 0,
        requires_grad: false,
        parameter: false,
        conjugate: false,
        negative: false,
        bare: false,
    })
}

/// Bytes of the elements of a tensor.
pub(super) fn length(tensor: &StoredTensor) -> u64 {
    (tensor.numel() as u64).saturating_mul(tensor.dtype().size())
}

/// Writes tensors, each as a dense one, with the mark by which Python's libraries know that they are PyTorch's.
pub(super) fn write(path: &Path, tensors: &[(&str, &StoredTensor)]) -> Result<()> {
    let failed = |why: String| Error::State(format!("{}: {why}", path.display()));
    // Larger types come first, so that all are aligned.
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(name, tensor)| (std::cmp::Reverse(tensor.dtype().size()), *name));
    let mut header = serde_json::Map::new();
    header.insert(METADATA.into(), serde_json::json!({ "format": "pt" }));
    let mut at = 0u64;
    for (name, tensor) in &order {
        let dtype = name_of(tensor.dtype()).ok_or_else(|| {
            failed(format!("'{name}': safetensors has no type for {}", tensor.dtype()))
        })?;
        let end = at.saturating_add(length(tensor));
        let shape = tensor.size().iter().map(|length| *length as u64).collect();
        let described = Described { dtype: dtype.into(), shape, data_offsets: (at, end) };
        let described =
            serde_json::to_value(described).map_err(|error| failed(error.to_string()))?;
        if *name == METADATA || header.insert((*name).into(), described).is_some() {
            return Err(failed(format!("there are two tensors '{name}'")));
        }
        at = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(|error| failed(error.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() as u64 > MAX_HEADER {
        return Err(failed("it has too many tensors for a safetensors file".into()));
    }
    write_atomically(path, |file| {
        use io::Write;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (name, tensor) in &order {
            let bytes = tensor.to_bytes();
            let mut bytes =
                bytes.map_err(|error| io::Error::other(format!("'{name}': {error}")))?;
            let size = tensor.dtype().number_size();
            if cfg!(target_endian = "big") && size > 1 {
                bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
            }
            file.write_all(&bytes)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(header: &str, data: usize) -> Result<Tensors, String> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        of(Arc::new(Source::Memory(bytes))).map(|(tensors, _)| tensors)
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            let entry = format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}"#);
            parsed(&format!(r#"{{"w":{{{entry}}}}}"#), 16)
        };
        assert_eq!(
            one("F32", "[2,2]", "[0,16]").map(|found| found[0].1.size().to_vec()),
            Ok(vec![2, 2])
        );
        assert_eq!(
            parsed(
                r#"{"w":{"dtype":"F64","shape":[0,4611686018427387904],"data_offsets":[0,0]}}"#,
                0
            )
            .map(|found| found.len()),
            Ok(1)
        );
        for (result, reason) in [
            (one("F32", "[2,2]", "[0,12]"), "are not those of shape [2, 2]"),
            (one("F32", "[5]", "[0,20]"), "are not those"),
            (one("F32", "[]", "[4,8]"), "begins at 4, and the one before ends at 0"),
            (one("F32", "[3]", "[0,12]"), "have 12 bytes, and there are 16"),
            (
                parsed(
                    r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
                    2,
                ),
                "tensor 'b' begins at 0",
            ),
            (
                parsed(
                    r#"{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#,
                    1,
                ),
                "two tensors have one name",
            ),
            (one("F32", "[1]", "[4,0]"), "are not those"),
            (one("F4", "[1]", "[0,1]"), "type F4 is not known"),
            (one("F32", "[9223372036854775808]", "[0,4]"), "shape is damaged"),
            (one("F32", "[0,4611686018427387904,4]", "[0,0]"), "shape is damaged"),
            (one("F32", "[-1]", "[0,4]"), "its header"),
            (parsed("[]", 0), "no JSON"),
            (parsed("{", 0), "its header"),
            (of(Arc::new(Source::Memory(vec![1; 4]))).map(|found| found.0), "no safetensors file"),
            (
                of(Arc::new(Source::Memory(vec![255; 40]))).map(|found| found.0),
                "no safetensors file",
            ),
        ] {
            let error = result.map(|found| found.len()).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn no_change_of_a_file_makes_a_panic() {
        let header =
            r#"{"__metadata__":{"b":"a"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
        let mut whole = (header.len() as u64).to_le_bytes().to_vec();
        whole.extend(header.as_bytes());
        whole.extend([1; 8]);
        let (mut random, mut read) = (0x9e37_79b9_7f4a_7c15u64, 0);
        let mut below = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % below as u64) as usize
        };
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + below(3) {
                let (at, length) = (below(bytes.len()), bytes.len());
                match below(5) {
                    0 => bytes.truncate(at.max(1)),
                    1 => bytes[at] = below(256) as u8,
                    2 => bytes[at] = b"0123456789-,[]{}\":"[below(18)],
                    3 => bytes.extend_from_within(at..(at + 4).min(length)),
                    _ => bytes[at] ^= 1,
                }
            }
            let Ok((found, _)) = of(Arc::new(Source::Memory(bytes))) else { continue };
            read += 1;
            for (_, tensor) in found {
                let _ = tensor.to_bytes();
                let _ = tensor.tensor();
            }
        }
        assert!(read > 100, "{read}");
    }
}
