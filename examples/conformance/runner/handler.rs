//! Runs the cases of kind `handler`; each handler has a file.

pub(super) mod checkpoint;
mod early_stopping;
pub(super) mod ema;
mod epoch_output_store;
mod progress_bar;
mod running_average;
mod tensorboard;
mod terminate_on_nan;

use anyhow::Result;
use serde_json::Value;

use super::Outcome;
use super::json::text;

pub fn run(config: &Value, expect: &Value, defect: &mut Option<&'static str>) -> Result<Outcome> {
    match text(&config["handler"])? {
        "Checkpoint" => checkpoint::run(config, expect, defect),
        "ModelCheckpoint" => checkpoint::run_model(config, expect, defect),
        "setup_filename_pattern" => checkpoint::run_pattern(config, expect),
        "global_step_from_engine" => checkpoint::run_global_step(config, expect),
        "EarlyStopping" => early_stopping::run(config, expect, defect),
        "EMA" => ema::run(config, expect, defect),
        "EpochOutputStore" => epoch_output_store::run(config, expect),
        "ProgressBar" => progress_bar::run(config, expect, defect),
        "RunningAverage" => running_average::run(config, expect),
        "Tensorboard" => tensorboard::run(config, expect, defect),
        "TerminateOnNan" => terminate_on_nan::run(config, expect),
        other => Outcome::skipped(format!("handler {other} is not known")),
    }
}
