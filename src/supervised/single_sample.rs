use std::sync::PoisonError;

use crate::bridge::{BatchNormWatch, TensorId};
use crate::error::{Error, Result};
use crate::optim::Optimizer;

/// Refuses batches of one sample that leave a layer of batch normalisation with one value for each channel.
#[derive(Default)]
pub(super) struct SingleSample {
    /// The shapes of the last batch of one sample that passed the check, so that it need not be checked again.
    passed: Option<Vec<Vec<i64>>>,
    /// The number of variables when the store was last searched for batch normalisation, and whether it had any.
    batch_norm: Option<(usize, bool)>,
}

impl SingleSample {
    /// Calls `forward`, and checks it where the input, of these shapes, has one sample.
    ///
    /// # Errors
    /// The batch is refused: parameters and running averages are unchanged. Also the errors of `forward`.
    pub(super) fn checked<R>(
        &mut self,
        optimizer: &Optimizer,
        shapes: Vec<Vec<i64>>,
        forward: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let single = shapes.first().is_some_and(|shape| shape.first() == Some(&1));
        let looks =
            single && self.passed.as_ref() != Some(&shapes) && self.has_batch_norm(optimizer);
        let watch = looks.then(BatchNormWatch::looking_for_single_values).transpose();
        let watch = watch.map_err(|text| Error::libtorch("watching batch normalisation", text))?;
        let result = forward()?;
        if let Some(watch) = watch {
            refuse(optimizer, &watch.single_values())?;
            let kept = watch.keep();
            kept.map_err(|text| Error::libtorch("watching batch normalisation", text))?;
            self.passed = Some(shapes);
        }
        Ok(result)
    }

    /// Whether the store has a layer of batch normalisation, by the names of the variables.
    fn has_batch_norm(&mut self, optimizer: &Optimizer) -> bool {
        let variables = optimizer.variables();
        let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
        let named = &variables.named_variables;
        match self.batch_norm {
            Some((count, has)) if count == named.len() => has,
            _ => {
                let has = named.keys().any(|name| name.ends_with("running_var"));
                self.batch_norm = Some((named.len(), has));
                has
            }
        }
    }
}

/// Refuses a batch if layers of batch normalisation (given by their running variances) got a single value for each
/// channel.
fn refuse(optimizer: &Optimizer, running_variances: &[TensorId]) -> Result<()> {
    if running_variances.is_empty() {
        return Ok(());
    }
    let variables = optimizer.variables();
    let variables = variables.lock().unwrap_or_else(PoisonError::into_inner);
    let name_of = |id: &TensorId| {
        let mut all = variables.named_variables.iter();
        let name = all.find(|(_, tensor)| TensorId::of(tensor) == *id)?.0;
        Some(format!("'{}'", name.strip_suffix(".running_var").unwrap_or(name)))
    };
    let names: Vec<_> = running_variances
        .iter()
        .map(|id| name_of(id).unwrap_or_else(|| "a layer of another store".into()))
        .collect();
    Err(Error::invalid(format!(
        "batch normalisation has one value for each channel in this batch of one sample ({}): they have no variance, and the running variance would be NaN from then on. Leave the last batch out (`drop_last`), or choose another batch size; the running averages are as they were",
        names.join(", ")
    )))
}
