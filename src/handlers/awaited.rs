use std::cell::Cell;

use crate::engine::{Engine, Metrics};
use crate::event::Event;
use crate::metrics::MetricValue;

/// Metrics that a handler looks up by name, with whether each has had a value.
#[derive(Debug, Default)]
pub(crate) struct Awaited {
    names: Vec<(String, Cell<bool>)>,
    /// Whether the handler has looked the metrics up in this run.
    looked: Cell<bool>,
}

impl Awaited {
    pub(crate) fn push(&mut self, name: String) {
        self.names.push((name, Cell::new(false)));
    }

    /// The names and values of the metrics that have a value now. The name of a group stands for all of its values.
    pub(crate) fn values<'s>(
        &'s self,
        metrics: &'s Metrics,
    ) -> impl Iterator<Item = (&'s str, &'s MetricValue)> {
        self.looked.set(true);
        self.names.iter().flat_map(move |(name, seen)| {
            let own = metrics.value(name).map(|value| (name.as_str(), value));
            let parts = own.is_none().then(|| {
                let is_part = |rest: &str| rest.starts_with('/');
                metrics.iter().filter(move |(all, _)| all.strip_prefix(name).is_some_and(is_part))
            });
            own.into_iter().chain(parts.into_iter().flatten()).inspect(|_| seen.set(true))
        })
    }

    /// Warns of metrics that never had a value, at the end of a run (not where it is suspended).
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

/// Adds a warning that these metrics never had a value, with the names of the metrics that have
/// one.
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
