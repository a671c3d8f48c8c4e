//! Kind `schedule_resume`: saved after k events, loaded into a new scheduler, the rest is the same.

use anyhow::Result;
use serde_json::Value;

use super::Outcome;
use super::json::{count, floats, object, same_object, text};
use super::optimizer::{Params, beside, missing_class, store};
use super::schedule::same_rows;

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    let spec = &config["scheduler"];
    if let Some(reason) = missing_class(spec) {
        return Outcome::skipped(reason);
    }
    let name = text(&config["record"][0])?;
    let k = count(&config["k"])?.unwrap_or(0);
    let total = count(&config["total"])?.unwrap_or(0);

    let rows = [&expect["values_before"], &expect["values_after"]];
    let beside = beside(&config["optimizer"], std::iter::once(spec), &rows);
    *defect = beside.and_then(|(_, defect)| defect);
    let fresh = || -> Result<_> {
        let vs = store(&config["optimizer"])?;
        let params = Params::new(&config["optimizer"], &vs, beside.map(|(name, _)| name))?;
        Ok((params.scheduler(spec)?, params))
    };
    let (mut first, first_params) = fresh()?;
    let mut before = vec![];
    for _ in 0..k {
        first.advance()?;
        before.push(first_params.values(name)?);
    }
    let mut saved = first.state_dict();

    let (mut second, second_params) = fresh()?;
    if config["restore_optimizer_lr"] == true {
        let lrs = floats(&expect["optimizer_lr_at_k"])?;
        for (group, lr) in second_params.optimizer.groups()?.iter().zip(lrs) {
            group.set_lr(lr)?;
        }
    }
    second.load_state_dict(&saved)?;
    let mut after = vec![];
    for _ in k..total {
        second.advance()?;
        after.push(second_params.values(name)?);
    }
    let mut end = second.state_dict();
    if beside.is_some() {
        // A knob of one's own is in no group.
        for state in [&mut saved, &mut end] {
            state.insert("param_group_index".into(), spec["param_group_index"].clone());
        }
    }
    let compared = same_object("state_dict", &saved, object(&expect["state_dict"])?)
        .and(same_rows("values_before", &before, &expect["values_before"])?)
        .and(same_rows("values_after", &after, &expect["values_after"])?)
        .and(same_object(
            "state_dict_end",
            &second.state_dict(),
            object(&expect["state_dict_end"])?,
        ));
    Ok(compared.into())
}
