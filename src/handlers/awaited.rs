use std::cell::Cell;

use crate::engine::{Engine, Metrics};
use crate::event::Event;
use crate::metrics::MetricValue;

/// Metrics that a handler looks for by name, and which of them have had a value.
#[derive(Debug, Default)]
pub(crate) struct Awaited {
    names: Vec<(String, Cell<bool>)>,
    /// The handler has looked for them in this run.
    looked: Cell<bool>,
}

impl Awaited {
    pub(crate) fn push(&mut self, name: String) {
        self.names.push((name, Cell::new(false)));
    }

    /// The names and values of those that have one now.
    pub(crate) fn values<'s>(
        &'s self,
        metrics: &'s Metrics,
    ) -> impl Iterator<Item = (&'s str, &'s MetricValue)> {
        self.looked.set(true);
        self.names.iter().filter_map(|(name, seen)| {
            let value = metrics.value(name)?;
            seen.set(true);
            Some((name.as_str(), value))
        })
    }

    /// Warns of names that never had a value, when a run was not merely suspended.
    pub(crate) fn warn_at_end<C, B, O>(
        &self,
        handler: &str,
        event: Event,
        engine: &mut Engine<'_, C, B, O>,
    ) {
        if matches!(event, Event::Terminate | Event::Completed) && self.looked.take() {
            let missing = self.names.iter().filter(|(_, seen)| !seen.get());
            let missing: Vec<_> = missing.map(|(name, _)| name.as_str()).collect();
            warn_of_missing(handler, &missing, engine);
        }
    }
}

/// Warns that these metrics never had a value, and says which have one.
pub(crate) fn warn_of_missing<C, B, O>(
    handler: &str,
    missing: &[&str],
    engine: &mut Engine<'_, C, B, O>,
) {
    if missing.is_empty() {
        return;
    }
    let quoted = |names: Vec<String>| names.join(", ");
    let there: Vec<_> = engine.state.metrics.iter().map(|(name, _)| format!("'{name}'")).collect();
    let there = match there.is_empty() {
        true => "there are no metrics at all".into(),
        false => format!("there are: {}", quoted(there)),
    };
    let names = quoted(missing.iter().map(|name| format!("'{name}'")).collect());
    let (metrics, had) = if missing.len() == 1 { ("metric", "it") } else { ("metrics", "they") };
    engine.warn(format!(
        "{handler}: {metrics} {names} never had a value when {had} should have been shown; {there}"
    ));
}
