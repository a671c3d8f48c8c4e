//! States of metrics as messages between processes, and how the states of all ranks are joined.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{Accumulated, Reduce};
use crate::bridge::dense_on_cpu;

/// The types that can be sent; a message names a type by its index in this list.
const KINDS: [Kind; 10] = [
    Kind::Double,
    Kind::Int64,
    Kind::Float,
    Kind::Int,
    Kind::Half,
    Kind::BFloat16,
    Kind::Int16,
    Kind::Int8,
    Kind::Uint8,
    Kind::Bool,
];

#[derive(Serialize, Deserialize)]
struct Part {
    name: String,
    kind: usize,
    shape: Vec<i64>,
    reduce: Reduce,
}

/// Writes the states of several metrics as one message: the length of a JSON header, the header, and the bytes of all
/// tensors. Waits for the devices.
pub(crate) fn write(states: &[Vec<Accumulated>]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![];
    let mut part = |part: &Accumulated| {
        let tensor = dense_on_cpu(&part.value)?;
        let kind = KINDS.iter().position(|kind| *kind == tensor.kind());
        let kind = kind.ok_or_else(|| {
            anyhow::anyhow!("'{}' is of type {:?}, which cannot be sent", part.name, tensor.kind())
        })?;
        let start = bytes.len();
        bytes.resize(start + tensor.numel() * KINDS[kind].elt_size_in_bytes(), 0);
        tensor.f_copy_data_u8(&mut bytes[start..], tensor.numel())?;
        anyhow::Ok(Part {
            name: part.name.clone(),
            kind,
            shape: tensor.size(),
            reduce: part.reduce,
        })
    };
    let mut parts: Vec<Vec<Part>> = vec![];
    for state in states {
        parts.push(state.iter().map(&mut part).collect::<anyhow::Result<_>>()?);
    }
    let header = serde_json::to_vec(&parts)?;
    let mut message = (header.len() as u64).to_le_bytes().to_vec();
    message.extend(header);
    message.extend(bytes);
    Ok(message)
}

/// Reads a message that [`write`] made; the tensors are on the CPU.
pub(crate) fn read(message: &[u8]) -> anyhow::Result<Vec<Vec<Accumulated>>> {
    let short = || anyhow::anyhow!("a message of another rank is too short");
    let (length, rest) = message.split_first_chunk::<8>().ok_or_else(short)?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    let (header, mut bytes) = rest.split_at_checked(length).ok_or_else(short)?;
    let parts: Vec<Vec<Part>> = serde_json::from_slice(header)?;
    let mut part = |part: Part| {
        let kind = *KINDS.get(part.kind).ok_or_else(short)?;
        let elements = part.shape.iter().product::<i64>();
        let length = usize::try_from(elements)? * kind.elt_size_in_bytes();
        let (own, rest) = bytes.split_at_checked(length).ok_or_else(short)?;
        bytes = rest;
        let value = Tensor::f_from_data_size(own, &part.shape, kind)?;
        anyhow::Ok(Accumulated::new(part.name, value, part.reduce))
    };
    let mut states = vec![];
    for state in parts {
        states.push(state.into_iter().map(&mut part).collect::<anyhow::Result<_>>()?);
    }
    Ok(states)
}

/// Joins the state of one metric over all ranks, in their order, so that all ranks get the same bits. A rank adds
/// nothing to a part that it does not list, because it had no sample for it.
///
/// # Errors
/// Parts that do not fit together; the error names the first.
pub(crate) fn join(ranks: &[&Vec<Accumulated>]) -> anyhow::Result<Vec<Accumulated>> {
    let mut joined: Vec<Accumulated> = vec![];
    for part in ranks.iter().copied().flatten() {
        if joined.iter().any(|known| known.name == part.name) {
            continue;
        }
        let own = |state: &&Vec<Accumulated>| state.iter().position(|own| own.name == part.name);
        let all = ranks.iter().filter_map(|state| own(state).map(|index| &state[index]));
        let values = all.map(|other| {
            let alike = other.reduce == part.reduce && other.value.kind() == part.value.kind();
            anyhow::ensure!(alike, "'{}' is not the same kind of thing on all ranks", part.name);
            Ok(&other.value)
        });
        let values: Vec<&Tensor> = values.collect::<anyhow::Result<_>>()?;
        let value = join_part(part.reduce, &values).map_err(|error| {
            anyhow::Error::from(error).context(format!("'{}' of all ranks", part.name))
        })?;
        joined.push(Accumulated::new(part.name.clone(), value, part.reduce));
    }
    Ok(joined)
}

/// Makes the state that a rank keeps where the main rank keeps the joined one: sums become 0 and lists become
/// empty, so that no sample counts twice. Other parts stay, because they are the same on all ranks.
pub(crate) fn nothing_of(state: &[Accumulated]) -> anyhow::Result<Vec<Accumulated>> {
    let part = |part: &Accumulated| {
        let value = match part.reduce {
            Reduce::Sum => part.value.f_zeros_like()?,
            Reduce::Concat if part.value.dim() > 0 => part.value.f_narrow(0, 0, 0)?,
            _ => part.value.shallow_clone(),
        };
        Ok(Accumulated::new(part.name.clone(), value, part.reduce))
    };
    state.iter().map(part).collect()
}

fn join_part(reduce: Reduce, values: &[&Tensor]) -> Result<Tensor, tch::TchError> {
    let fold = |with: fn(&Tensor, &Tensor) -> Result<Tensor, tch::TchError>| {
        values[1..].iter().try_fold(values[0].shallow_clone(), |sum, value| with(&sum, value))
    };
    match reduce {
        Reduce::Sum => fold(Tensor::f_add),
        Reduce::Mean => fold(Tensor::f_add)?.f_div_scalar(values.len() as f64),
        Reduce::Max => fold(Tensor::f_maximum),
        Reduce::Min => fold(Tensor::f_minimum),
        Reduce::Concat => Tensor::f_cat(values, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_travel_and_are_joined() -> anyhow::Result<()> {
        let state = |sum: f64, count: i64, seen: &[f32]| {
            vec![
                Accumulated::new("sum", Tensor::from(sum), Reduce::Sum),
                Accumulated::new("count", Tensor::from(count), Reduce::Sum),
                Accumulated::new("average", Tensor::from(sum), Reduce::Mean),
                Accumulated::new("largest", Tensor::from(count), Reduce::Max),
                Accumulated::new("seen", Tensor::from_slice(seen), Reduce::Concat),
                Accumulated::new("wrong", Tensor::from_slice(&[count > 2]), Reduce::Max),
            ]
        };
        let ranks = [state(0.25, i64::MAX - 5, &[1., 2.]), vec![], state(0.5, 3, &[3.])];
        let ranks = ranks.map(|state| read(&write(&[vec![], state]).unwrap()).unwrap().remove(1));
        let joined = join(&ranks.iter().collect::<Vec<_>>())?;
        let part = |name: &str| Accumulated::find(&joined, name).unwrap();
        assert_eq!(f64::try_from(part("sum"))?, 0.75);
        assert_eq!(i64::try_from(part("count"))?, i64::MAX - 2);
        assert_eq!(f64::try_from(part("average"))?, 0.375);
        assert_eq!(i64::try_from(part("largest"))?, i64::MAX - 5);
        assert_eq!(Vec::<f32>::try_from(part("seen"))?, [1., 2., 3.]);
        assert_eq!(Vec::<bool>::try_from(part("wrong"))?, [true]);
        assert!(join(&[&vec![], &vec![]])?.is_empty());
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let of = |name: &str, value: Tensor| vec![Accumulated::new(name, value, Reduce::Sum)];
        let (a, b) = (of("a", Tensor::from(1.)), of("b", Tensor::from(1.)));
        let names = |parts: Vec<Accumulated>| parts.into_iter().map(|part| part.name);
        assert!(names(join(&[&a, &b]).unwrap()).eq(["a", "b"]), "each has samples of its own");
        let other = of("a", Tensor::from(1i64));
        assert!(join(&[&a, &other]).unwrap_err().to_string().contains("'a'"));
        let (two, three) =
            (of("a", Tensor::from_slice(&[1., 2.])), of("a", Tensor::from_slice(&[1., 2., 3.])));
        assert!(join(&[&two, &three]).is_err());
        assert!(read(&[1, 2]).is_err() && read(&[9; 40]).is_err());
        let whole = write(&[two]).unwrap();
        assert!(read(&whole[..whole.len() - 1]).is_err());
    }
}
