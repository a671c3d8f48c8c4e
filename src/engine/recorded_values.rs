//! The values that a run has recorded, metrics and histories of parameters, as part of an engine's state.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{Engine, MetricValue};
use crate::error::{Error, Result};
use crate::state::StateDict;

impl<'a, C, B, O> Engine<'a, C, B, O> {
    pub(super) fn metric_values(&self) -> Result<StateDict> {
        fn add(values: &mut StateDict, name: &str, value: &MetricValue) -> Result<()> {
            match value {
                MetricValue::Number(value) => values.set_value(name, value)?,
                MetricValue::Tensor(tensor) => values.set_tensor(name, tensor.shallow_clone()),
                MetricValue::Named(named) => {
                    let mut part = StateDict::new();
                    named.iter().try_for_each(|(name, value)| add(&mut part, name, value))?;
                    values.set_part(name, part);
                }
            }
            Ok(())
        }
        let mut values = StateDict::new();
        self.state.metrics.iter().try_for_each(|(name, value)| add(&mut values, name, value))?;
        Ok(values)
    }

    pub(super) fn load_metric_values(&mut self, saved: StateDict) -> Result<()> {
        fn values_of(state: StateDict) -> Result<Vec<(String, MetricValue)>> {
            let mut values = vec![];
            for name in state.values.keys() {
                values.push((name.clone(), state.value::<f64>(name)?.into()));
            }
            values.extend(state.tensors.into_iter().map(|(name, tensor)| (name, tensor.into())));
            for (name, part) in state.parts {
                values.push((name, MetricValue::Named(values_of(part)?)));
            }
            Ok(values)
        }
        let values = values_of(saved)?;
        self.state.metrics.clear();
        values.into_iter().for_each(|(name, value)| self.state.metrics.set(&name, value));
        Ok(())
    }

    pub(super) fn saved_history(&self) -> Result<StateDict> {
        let mut saved = StateDict::new();
        for (name, rows) in &self.state.param_history {
            // A row has a value for each parameter group, and groups may be added; so rows differ in length.
            let lens: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
            let mut history = StateDict::new();
            let failed = |error| Error::libtorch("saving the history of a parameter", error);
            history.set_tensor("lens", Tensor::f_from_slice(&lens).map_err(failed)?);
            history.set_tensor("values", Tensor::f_from_slice(&rows.concat()).map_err(failed)?);
            saved.set_part(name, history);
        }
        Ok(saved)
    }

    pub(super) fn load_history(&mut self, saved: StateDict) -> Result<()> {
        let mut all = BTreeMap::new();
        for (name, history) in &saved.parts {
            let odd = || Error::State(format!("the history of '{name}' is not what it should be"));
            let lens = Vec::<i64>::try_from(history.tensor("lens")?).map_err(|_| odd())?;
            let values = Vec::<f64>::try_from(history.tensor("values")?).map_err(|_| odd())?;
            let mut rest = values.as_slice();
            let mut rows = Vec::with_capacity(lens.len());
            for len in lens {
                let len = usize::try_from(len).map_err(|_| odd())?;
                let (row, others) = rest.split_at_checked(len).ok_or_else(odd)?;
                rows.push(row.to_vec());
                rest = others;
            }
            all.insert(name.clone(), rows);
        }
        self.state.param_history = all;
        Ok(())
    }
}
