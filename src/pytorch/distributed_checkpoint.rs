//! Files of `torch.distributed.checkpoint` in the form of safetensors: each rank's has parts of tensors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tch::{Device, Tensor};

use super::safetensors;
use super::tensor::{StoredTensor, text};
use crate::error::{Error, Result};

/// The metadata that says where the parts of a file belong.
const PLACES: &str = "DCP_SHARDING_INFO";
/// More parts than any run has ranks.
const MAX_PARTS: usize = 1 << 14;

#[derive(Deserialize)]
struct PlaceOf {
    saved_offsets: Vec<i64>,
}

struct Part {
    offset: Vec<i64>,
    tensor: Arc<StoredTensor>,
}

/// The first file that may be missing, by the numbers in the names, `shard-RANK-model-INDEX-of-COUNT`. It need not be: a rank
/// that saved no part of a tensor writes no file. How many ranks there were is told nowhere.
fn gap(files: &[String]) -> Option<String> {
    let numbers = |file: &String| -> Option<[usize; 3]> {
        let (rank, rest) = file.strip_prefix("shard-")?.split_once("-model-")?;
        let (index, count) = rest.strip_suffix(".safetensors")?.split_once("-of-")?;
        Some([rank.parse().ok()?, index.parse().ok()?, count.parse().ok()?])
    };
    let all: Vec<_> = files.iter().filter_map(numbers).collect();
    let first_missing = |numbers: BTreeSet<usize>| {
        (1..)
            .zip(&numbers)
            .find(|(at, number)| at != *number)
            .map_or(numbers.len() + 1, |(at, _)| at)
    };
    let ranks: BTreeSet<_> = all.iter().map(|[rank, ..]| *rank).collect();
    let (last, missing) = (ranks.last().copied().unwrap_or(0), first_missing(ranks));
    if missing <= last {
        return Some(format!(
            "perhaps the files of rank {missing} of at least {last} are missing (shard-{missing:05}-…)"
        ));
    }
    let count = all.iter().map(|[.., count]| *count).max().unwrap_or(0);
    match first_missing(all.iter().map(|[_, index, _]| *index).collect()) {
        missing if missing <= count => Some(format!(
            "perhaps a file {missing} of {count} is missing (…-model-{missing:05}-of-{count:05})"
        )),
        _ => None,
    }
}

/// The tensors of all these files. Those that are whole are read when they are asked for, the others put together at
/// once.
pub(super) fn read(folder: &Path, files: &[String]) -> Result<Vec<(String, Arc<StoredTensor>)>> {
    let mut all: BTreeMap<String, Vec<Part>> = BTreeMap::new();
    for file in files {
        let path = folder.join(file);
        let (tensors, metadata) = safetensors::with_metadata(&path)?;
        let failed = |why: String| Error::State(format!("{}: {why}", path.display()));
        let places: Option<HashMap<String, PlaceOf>> = metadata
            .get(PLACES)
            .map(|json| serde_json::from_str(json))
            .transpose()
            .map_err(|error| failed(format!("its {PLACES}: {error}")))?;
        for (name, tensor) in tensors {
            let offset = match &places {
                None => vec![0; tensor.size().len()],
                Some(places) => places.get(&name).map_or(vec![], |at| at.saved_offsets.clone()),
            };
            let fits = offset.len() == tensor.size().len()
                && offset.iter().zip(tensor.size()).all(|(from, length)| {
                    *from >= 0 && from.checked_add(*length).is_some_and(|end| end < 1 << 53)
                });
            if !fits {
                return Err(failed(format!("the place of '{name}' is not told, or damaged")));
            }
            all.entry(name).or_default().push(Part { offset, tensor });
        }
    }
    let hint = gap(files).map_or_else(String::new, |gap| format!("; {gap}"));
    let joined = all.into_iter().map(|(name, parts)| {
        let tensor = joined(parts).map_err(|why| {
            let folder = folder.display();
            Error::State(format!("{folder}: '{name}' cannot be put together: {why}{hint}"))
        })?;
        Ok((name, tensor))
    });
    joined.collect()
}

/// A tensor from its parts, which have each of its elements once.
fn joined(parts: Vec<Part>) -> Result<Arc<StoredTensor>, String> {
    let first = parts.first().ok_or("it has no parts")?;
    let (dtype, dimensions) = (first.tensor.dtype(), first.offset.len());
    if let ([one], true) = (&parts[..], first.offset.iter().all(|from| *from == 0)) {
        return Ok(one.tensor.clone());
    }
    if parts.len() > MAX_PARTS {
        return Err(format!("it has {} parts", parts.len()));
    }
    if parts.iter().any(|part| part.offset.len() != dimensions || part.tensor.dtype() != dtype) {
        return Err("its parts have different types or dimensions".into());
    }
    let end = |part: &Part, d: usize| part.offset[d] + part.tensor.size()[d];
    let shape: Vec<i64> =
        (0..dimensions).map(|d| parts.iter().map(|part| end(part, d)).max().unwrap_or(0)).collect();
    let count = shape.iter().try_fold(1i64, |count, length| count.checked_mul(*length));
    let there: i64 = parts.iter().map(|part| part.tensor.numel()).sum();
    let meet = |a: &Part, b: &Part| {
        let within = |d: usize| a.offset[d] < end(b, d) && b.offset[d] < end(a, d);
        (0..dimensions).all(within)
    };
    let overlap = || {
        let pairs =
            parts.iter().enumerate().flat_map(|(i, a)| parts[..i].iter().map(move |b| (a, b)));
        pairs.into_iter().any(|(a, b)| meet(a, b))
    };
    if count != Some(there) || overlap() {
        return Err(format!("its parts have {there} elements, and its shape is {shape:?}"));
    }
    let kind = dtype.kind().ok_or_else(|| format!("tch has no type for {dtype}"))?;
    let whole = Tensor::f_empty(&shape[..], (kind, Device::Cpu)).map_err(text)?;
    for part in &parts {
        let mut place = whole.shallow_clone();
        for (d, from) in part.offset.iter().enumerate() {
            place = place.f_narrow(d as i64, *from, part.tensor.size()[d]).map_err(text)?;
        }
        let part = part.tensor.view()?;
        tch::no_grad(|| place.f_copy_(&part)).map_err(text)?;
    }
    StoredTensor::new(&whole).map(Arc::new).map_err(|error| error.to_string())
}
