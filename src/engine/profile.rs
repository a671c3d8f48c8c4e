use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use super::{Event, HandlerId, TimeSpent};

/// Where the time of an engine's runs goes: ignite's `BasicTimeProfiler` and `HandlersTimeProfiler`.
///
/// [`Engine::profile`](super::Engine::profile) makes a profile; clones share one record. `Display` writes two tables:
/// one of the loop (fetching of data, steps, handlers by event), and one of each handler.
///
/// Work on a GPU is measured only where something waits for it: the first call that waits gets all of that time. The
/// time of handlers of events that are fired within a step or a handler counts for that step or handler, too.
#[derive(Debug, Clone, Default)]
pub struct Profile {
    record: Rc<RefCell<Record>>,
}

#[derive(Debug, Default)]
struct Record {
    data: Stats,
    steps: Stats,
    events: Vec<(Event, Stats)>,
    handlers: HashMap<(HandlerId, Event), (String, Stats)>,
    /// The times that `reset` forgot, so that the summary of a run still has all of its own.
    forgotten: TimeSpent,
}

/// Statistics of the times of repeated calls.
#[derive(Debug, Clone, PartialEq)]
pub struct ProfileRow {
    /// The name of what was called: `"data"`, `"step"`, `"handlers"`, or a handler's name.
    pub name: String,
    /// The event, for handlers.
    pub event: Option<Event>,
    /// Number of calls.
    pub count: u64,
    /// Total time of all calls.
    pub total: Duration,
    /// Time of the shortest call, and its number, from 1.
    pub min: (Duration, u64),
    /// Time of the longest call, and its number, from 1.
    pub max: (Duration, u64),
    /// Mean time of a call.
    pub mean: Duration,
    /// Standard deviation of the times (with Bessel's correction).
    pub std: Duration,
}

/// Running statistics, in seconds. Mean and variance are updated by Welford's method.
#[derive(Debug, Clone, Default)]
struct Stats {
    count: u64,
    total: Duration,
    min: (Duration, u64),
    max: (Duration, u64),
    mean: f64,
    squares: f64,
}

impl Stats {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.total += time;
        if self.count == 1 || time < self.min.0 {
            self.min = (time, self.count);
        }
        if self.count == 1 || time > self.max.0 {
            self.max = (time, self.count);
        }
        let seconds = time.as_secs_f64();
        let off = seconds - self.mean;
        self.mean += off / self.count as f64;
        self.squares += off * (seconds - self.mean);
    }

    fn row(&self, name: &str, event: Option<Event>) -> ProfileRow {
        let variance = self.squares / self.count.saturating_sub(1).max(1) as f64;
        ProfileRow {
            name: name.to_owned(),
            event,
            count: self.count,
            total: self.total,
            min: self.min,
            max: self.max,
            mean: Duration::from_secs_f64(self.mean.max(0.)),
            std: Duration::from_secs_f64(variance.max(0.).sqrt()),
        }
    }
}

impl Profile {
    pub(super) fn note_data(&self, time: Duration) {
        self.record.borrow_mut().data.add(time);
    }

    pub(super) fn note_step(&self, time: Duration) {
        self.record.borrow_mut().steps.add(time);
    }

    pub(super) fn note_event(&self, event: Event, time: Duration) {
        let events = &mut self.record.borrow_mut().events;
        match events.iter_mut().find(|(known, _)| *known == event) {
            Some((_, stats)) => stats.add(time),
            None => {
                let mut stats = Stats::default();
                stats.add(time);
                events.push((event, stats));
            }
        }
    }

    pub(super) fn note_handler(
        &self,
        id: HandlerId,
        event: Event,
        time: Duration,
        name: impl FnOnce() -> String,
    ) {
        let handlers = &mut self.record.borrow_mut().handlers;
        handlers.entry((id, event)).or_insert_with(|| (name(), Stats::default())).1.add(time);
    }

    /// Returns the times of data, steps and handlers so far, also those before a `reset`.
    pub(super) fn spent(&self) -> TimeSpent {
        let record = self.record.borrow();
        // Events of a program are fired within steps, whose time has theirs.
        let own = record.events.iter().filter(|(event, _)| event.built_in().is_some());
        let handlers = own.map(|(_, stats)| stats.total).sum();
        let spent = TimeSpent { data: record.data.total, steps: record.steps.total, handlers };
        spent.plus(record.forgotten)
    }

    /// Forgets all times. [`Summary::time`](super::Summary::time) of a run under way still counts them.
    pub fn reset(&self) {
        let forgotten = self.spent();
        *self.record.borrow_mut() = Record { forgotten, ..Record::default() };
    }

    /// Rows for the loop: `"data"`, `"step"`, and `"handlers"` for each event that has some.
    pub fn basic(&self) -> Vec<ProfileRow> {
        let record = self.record.borrow();
        let mut rows = vec![record.data.row("data", None), record.steps.row("step", None)];
        rows.extend(record.events.iter().map(|(event, stats)| stats.row("handlers", Some(*event))));
        rows
    }

    /// Rows for each handler at each of its events, sorted by total time, largest first.
    pub fn handlers(&self) -> Vec<ProfileRow> {
        let record = self.record.borrow();
        let rows = record.handlers.iter();
        let mut rows: Vec<_> =
            rows.map(|((_, event), (name, stats))| stats.row(name, Some(*event))).collect();
        rows.sort_by(|a, b| (b.total, &a.name).cmp(&(a.total, &b.name)));
        rows
    }
}

/// Formats a time with up to four significant digits, in the unit that fits.
fn short(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        _ if seconds == 0. => "0".into(),
        ..1e-3 => format!("{:.1} µs", seconds * 1e6),
        1e-3..1. => format!("{:.2} ms", seconds * 1e3),
        _ => format!("{seconds:.3} s"),
    }
}

fn table(f: &mut fmt::Formatter<'_>, title: &str, rows: &[ProfileRow]) -> fmt::Result {
    let name = |row: &ProfileRow| match row.event {
        Some(event) => format!("{} {event}", row.name),
        None => row.name.clone(),
    };
    let width = rows.iter().map(|row| name(row).chars().count()).max().unwrap_or(0);
    let width = width.max(title.chars().count());
    writeln!(
        f,
        "{title:width$} {:>8} {:>10} {:>19} {:>19} {:>10} {:>10}",
        "calls", "total", "min (call)", "max (call)", "mean", "std"
    )?;
    let at = |(time, call): (Duration, u64)| format!("{} ({call})", short(time));
    for row in rows {
        writeln!(
            f,
            "{:width$} {:>8} {:>10} {:>19} {:>19} {:>10} {:>10}",
            name(row),
            row.count,
            short(row.total),
            at(row.min),
            at(row.max),
            short(row.mean),
            short(row.std)
        )?;
    }
    Ok(())
}

/// Writes the two tables.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        table(f, "loop", &self.basic())?;
        writeln!(f)?;
        table(f, "handlers", &self.handlers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_spent_outlasts_a_reset() {
        let profile = Profile::default();
        let millis = Duration::from_millis;
        for _ in 0..2 {
            profile.note_data(millis(1));
            profile.note_step(millis(2));
            profile.note_event(Event::IterationCompleted, millis(3));
            profile.reset();
        }
        profile.note_step(millis(5));
        assert_eq!((profile.basic()[0].count, profile.basic()[1].total), (0, millis(5)));
        let expected = TimeSpent { data: millis(2), steps: millis(9), handlers: millis(6) };
        assert_eq!(profile.spent(), expected);
    }

    #[test]
    fn moments_are_those_of_the_definition() {
        let mut stats = Stats::default();
        for millis in [2, 4, 4, 4, 5, 5, 7, 9] {
            stats.add(Duration::from_millis(millis));
        }
        let row = stats.row("step", None);
        let millis = Duration::from_millis;
        assert_eq!((row.count, row.total, row.mean), (8, millis(40), millis(5)));
        assert_eq!((row.min, row.max), ((millis(2), 1), (millis(9), 8)));
        approx::assert_abs_diff_eq!(
            row.std.as_secs_f64(),
            (32f64 / 7.).sqrt() * 1e-3,
            epsilon = 1e-9
        );
    }
}
