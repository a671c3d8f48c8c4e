use super::{AnySchedule, PiecewiseLinear, Schedule};
use crate::error::{Error, Result};

/// A warm-up before a schedule: ignite's function of that name, for one parameter group.
///
/// A line from `warmup_start_value` at event 0 to `warmup_end_value` at event `warmup_duration - 1`,
/// then the schedule. Where that begins with the end value, it is not given twice; torch's schedules
/// go on with their second value after it. [`Schedule::warmup`] ends the line at the schedule's own
/// first value.
///
/// # Errors
/// Fewer than 2 events, values that are not finite, or a schedule with wrong arguments.
pub fn create_lr_scheduler_with_warmup(
    schedule: impl Into<AnySchedule>,
    warmup_start_value: f64,
    warmup_duration: u64,
    warmup_end_value: f64,
) -> Result<AnySchedule> {
    let schedule = schedule.into();
    schedule.validate()?;
    if warmup_duration < 2 {
        return Err(Error::invalid(format!(
            "Argument warmup_duration should be at least 2 events, but given {warmup_duration}"
        )));
    }
    let duration = i64::try_from(warmup_duration).unwrap_or(i64::MAX);
    let (start, end, last) = (warmup_start_value, warmup_end_value, duration - 1);
    let first = schedule.at(0);
    let mut line = vec![(0, start), (last, end)];
    let rest = if is_torchs(&schedule) {
        // Its first value is the end of the line, or follows it.
        if first != end {
            line.push((duration, first));
        }
        schedule.skip(1).into()
    } else {
        if first == end {
            line.truncate(1);
            if last > 1 {
                line.push((last - 1, end - (end - start) / last as f64));
            }
        }
        schedule
    };
    let events = line.last().map_or(0, |(event, _)| event.unsigned_abs() + 1);
    let line = PiecewiseLinear::new(line);
    line.validate()?;
    Ok(line.then(rest, events).into())
}

/// Whether ignite gets it from torch.optim.lr_scheduler.
fn is_torchs(schedule: &AnySchedule) -> bool {
    use AnySchedule::*;
    schedule.recurrence().is_some()
        || matches!(
            schedule,
            LambdaLR(_) | CosineAnnealingWarmRestarts(_) | CyclicLR(_) | OneCycleLR(_)
        )
}
