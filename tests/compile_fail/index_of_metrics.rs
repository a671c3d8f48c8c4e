//~ cannot index into a value of type `&Metrics`
use tch_ignite::engine::Metrics;

pub fn read(metrics: &Metrics) {
    let _ = metrics["accuracy"];
}
