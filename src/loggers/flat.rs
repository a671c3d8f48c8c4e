use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// Numbers, texts and switches of a configuration, with their places: `optimizer/lr`.
pub(super) fn values(config: &impl Serialize) -> Result<Vec<(String, Value)>> {
    let mut found = vec![];
    flatten("", &to_json(config)?, &mut found);
    Ok(found)
}

pub(super) fn to_json(config: &impl Serialize) -> Result<Value> {
    serde_json::to_value(config)
        .map_err(|error| Error::invalid(format!("the configuration is no JSON: {error}")))
}

fn flatten(place: &str, value: &Value, found: &mut Vec<(String, Value)>) {
    let inner = |key: &str| if place.is_empty() { key.into() } else { format!("{place}/{key}") };
    match value {
        Value::Object(parts) => {
            parts.iter().for_each(|(key, part)| flatten(&inner(key), part, found));
        }
        Value::Null => {}
        _ => found
            .push((if place.is_empty() { "config".into() } else { place.into() }, value.clone())),
    }
}
