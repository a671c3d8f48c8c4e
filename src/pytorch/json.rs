//! Plain values of Python as JSON and back.

use serde_json::{Map, Value as Json};

use super::value::{Dict, Value};
use crate::error::{Error, Result};
use crate::state::json_floats;

/// A value without tensors as JSON; keys are texts, or numbers as texts.
pub(super) fn to_json(value: &Value) -> Result<Json> {
    Ok(match value {
        Value::None => Json::Null,
        Value::Bool(bool) => (*bool).into(),
        Value::Int(int) => (*int).into(),
        Value::Float(float) => {
            json_floats::to_value(float).map_err(|error| Error::State(error.to_string()))?
        }
        Value::Str(text) => (**text).into(),
        Value::List(values) | Value::Tuple(values) => {
            values.iter().map(to_json).collect::<Result<Vec<_>>>()?.into()
        }
        Value::Dict(dict) => object(dict)?.into(),
        other => {
            return Err(Error::State(format!("a {} is no plain value", other.type_name())));
        }
    })
}

/// A dict without tensors as JSON.
pub(super) fn object(dict: &Dict) -> Result<Map<String, Json>> {
    let entry = |(key, value): (&Value, &Value)| {
        let key = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
        let value = to_json(value).map_err(|error| Error::State(format!("'{key}': {error}")))?;
        Ok((key, value))
    };
    dict.iter().map(entry).collect()
}

/// JSON as a plain value.
pub(super) fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::None,
        Json::Bool(bool) => (*bool).into(),
        Json::Number(number) => match number.as_i64() {
            Some(int) => int.into(),
            None => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(values) => Value::list(values.iter().map(from_json)),
        Json::Object(object) => match json_floats::from_value::<f64>(json) {
            Ok(float) => float.into(),
            Err(_) => dict(object).into(),
        },
    }
}

/// A JSON object as a dict.
pub(super) fn dict(object: &Map<String, Json>) -> Dict {
    let mut dict = Dict::new();
    object.iter().for_each(|(key, value)| dict.push(key.as_str(), from_json(value)));
    dict
}
