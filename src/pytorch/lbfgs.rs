//! The state of LBFGS, which Python keeps with the first parameter.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::value::{Dict, Value};
use crate::error::{Error, Result};
use crate::state::StateDict;

/// The values of our state, as optim/lbfgs.rs saves them.
#[derive(Serialize, Deserialize)]
struct Values {
    parameters: Vec<String>,
    func_evals: i64,
    n_iter: i64,
    t: f64,
    prev_loss: f64,
    #[serde(rename = "H_diag")]
    h_diag: f64,
    ro: Vec<f64>,
}

const VECTORS: [&str; 2] = ["d", "prev_flat_grad"];
const LISTS: [&str; 2] = ["old_dirs", "old_stps"];

fn failed(error: tch::TchError) -> Error {
    Error::libtorch("converting the state of LBFGS", error)
}

fn fault(why: impl std::fmt::Display) -> Error {
    Error::State(format!("the state of LBFGS: {why}"))
}

/// The sizes of the parameters, by name.
type Sizes = HashMap<String, i64>;

/// The vectors of all parameters (the last dimension of a tensor), with the parameters in another order.
fn reordered(vector: &Tensor, from: &[String], to: &[String], sizes: &Sizes) -> Result<Tensor> {
    let size = |name: &String| {
        sizes.get(name).copied().ok_or_else(|| fault(format!("it has no parameter '{name}'")))
    };
    let (mut places, mut end) = (HashMap::new(), 0);
    for name in from {
        places.insert(name, end);
        end += size(name)?;
    }
    if vector.size().last() != Some(&end) {
        return Err(fault(format!(
            "a vector is of shape {:?}, not of {end} elements",
            vector.size()
        )));
    }
    let part = |name: &String| {
        let place = places.get(name).ok_or_else(|| fault(format!("'{name}' is not in it")))?;
        vector.f_narrow(-1, *place, size(name)?).map_err(failed)
    };
    let parts = to.iter().map(part).collect::<Result<Vec<_>>>()?;
    Tensor::f_cat(&parts, -1).map_err(failed)
}

/// Makes the state that Python keeps for its first parameter; `order` is Python's order of all parameters.
pub(super) fn to_python(state: &StateDict, order: &[String], sizes: &Sizes) -> Result<Dict> {
    let values: Values = state.value("values")?;
    let mut dict = Dict::new();
    dict.insert("func_evals", values.func_evals);
    dict.insert("n_iter", values.n_iter);
    if values.n_iter == 0 {
        return Ok(dict);
    }
    let kind = state.tensor("d")?.kind();
    let number = |number: f64| Value::tensor(&Tensor::from(number).to_kind(kind));
    let vectors = |name: &str| reordered(state.tensor(name)?, &values.parameters, order, sizes);
    for name in VECTORS {
        dict.insert(name, Value::tensor(&vectors(name)?)?);
    }
    for name in LISTS {
        let mut rows = vec![];
        if !values.ro.is_empty() {
            let all = vectors(name)?;
            for row in 0..values.ro.len() as i64 {
                rows.push(Value::tensor(&all.f_select(0, row).map_err(failed)?)?);
            }
        }
        dict.insert(name, Value::list(rows));
    }
    dict.insert("t", values.t);
    dict.insert("prev_loss", values.prev_loss);
    dict.insert("H_diag", number(values.h_diag)?);
    let ro = values.ro.iter().map(|ro| number(*ro)).collect::<Result<Vec<_>>>()?;
    dict.insert("ro", Value::list(ro));
    Ok(dict)
}

/// Makes the state that Python would keep before the first step.
pub(super) fn nothing() -> Dict {
    let mut dict = Dict::new();
    dict.insert("func_evals", 0i64);
    dict.insert("n_iter", 0i64);
    dict
}

/// Our state of what Python keeps for its first parameter. `template` is the state of the optimizer here.
pub(super) fn of_python(
    saved: &Dict,
    template: &StateDict,
    order: &[String],
    sizes: &Sizes,
) -> Result<StateDict> {
    let ours: Values = template.value("values")?;
    let required = |name: &str| saved.get(name).ok_or_else(|| fault(format!("it has no {name}")));
    let count = |name: &str| {
        let count = required(name)?.as_i64().filter(|count| (0..1 << 53).contains(count));
        count.ok_or_else(|| fault(format!("{name} is no count")))
    };
    let mut state = StateDict::new();
    let mut values = Values {
        func_evals: count("func_evals")?,
        n_iter: count("n_iter")?,
        t: 0.,
        prev_loss: 0.,
        h_diag: 0.,
        ro: vec![],
        ..ours
    };
    if values.n_iter > 0 {
        values.t = number(required("t")?)?;
        values.prev_loss = number(required("prev_loss")?)?;
        values.h_diag = number(required("H_diag")?)?;
        let list = |name: &str| {
            required(name)?.as_slice().ok_or_else(|| fault(format!("{name} is no list")))
        };
        values.ro = list("ro")?.iter().map(number).collect::<Result<_>>()?;
        // A few bytes may claim to be a tensor of any shape, so a tensor is read only if its shape fits.
        let length: i64 = order.iter().filter_map(|name| sizes.get(name)).sum();
        let vector = |value: &Value| {
            let stored = value.as_tensor().filter(|stored| stored.size() == [length]);
            let stored =
                stored.ok_or_else(|| fault(format!("{value} is no vector of {length}")))?;
            let vector = stored.tensor()?.f_detach_copy().map_err(failed)?;
            reordered(&vector, order, &values.parameters, sizes)
        };
        for name in VECTORS {
            state.set_tensor(name, vector(required(name)?)?);
        }
        for name in LISTS {
            let rows = list(name)?.iter().map(vector).collect::<Result<Vec<_>>>()?;
            if rows.len() != values.ro.len() {
                return Err(fault(format!("{name} and ro differ in length")));
            }
            if !rows.is_empty() {
                state.set_tensor(name, Tensor::f_stack(&rows, 0).map_err(failed)?);
            }
        }
    }
    state.set_value("values", values)?;
    Ok(state)
}

/// A number, which Python may have as a tensor.
fn number(value: &Value) -> Result<f64> {
    match value.as_tensor() {
        Some(stored) if stored.numel() == 1 => {
            let number = stored.tensor()?.detach().reshape([]);
            f64::try_from(number).map_err(failed)
        }
        _ => value.as_f64().ok_or_else(|| fault(format!("{value} is no number"))),
    }
}
