use std::sync::{Arc, Mutex};

use serde_json::json;

use super::queue::Queue;
use super::rest::Client;
use super::steps::Steps;
use super::{MLflowLogger, Run, now};
use crate::error::{Error, Result};

/// The settings of an MLflow run that is to be started. [`MLflowLogger::builder`] makes it.
pub struct MLflowBuilder {
    tracking_uri: String,
    experiment: String,
    run_name: Option<String>,
    run_id: Option<String>,
    tags: Vec<(String, String)>,
    headers: Vec<(String, String)>,
}

crate::debug::opaque_debug!(MLflowBuilder);

impl MLflowBuilder {
    pub(super) fn new(tracking_uri: String) -> Self {
        Self {
            tracking_uri,
            experiment: "Default".into(),
            run_name: None,
            run_id: None,
            tags: vec![],
            headers: vec![],
        }
    }

    /// Sets the experiment that the run belongs to; the default is `Default`. An experiment that does not exist is
    /// created.
    pub fn experiment(mut self, name: impl Into<String>) -> Self {
        self.experiment = name.into();
        self
    }

    /// Sets the name of the run. By default the server invents one.
    pub fn run_name(mut self, name: impl Into<String>) -> Self {
        self.run_name = Some(name.into());
        self
    }

    /// Goes on with an existing run of the server, for example after a restart, instead of starting a new one.
    pub fn run_id(mut self, id: impl Into<String>) -> Self {
        self.run_id = Some(id.into());
        self
    }

    /// Adds a tag to the run.
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.push((name.into(), value.into()));
        self
    }

    /// Adds a header to every request, such as `("Authorization", "Bearer …")`.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Starts the run: two or three requests, of ten seconds at most each.
    ///
    /// # Errors
    /// The address is not valid, or the server does not answer or refuses; the text has address and reason.
    pub fn start(self) -> Result<MLflowLogger> {
        let client = Client::new(&self.tracking_uri, self.headers)?;
        let failed = |failure: super::rest::Failure| {
            Error::State(format!("MLflow at {}: {}", self.tracking_uri, failure.reason))
        };
        let run = match &self.run_id {
            Some(id) => {
                let request = json!({"run_id": id, "status": "RUNNING"});
                client.post("runs/update", &request).map_err(failed)?;
                client.get("runs/get", &[("run_id", id)]).map_err(failed)?["run"].clone()
            }
            None => {
                let experiment = client.experiment(&self.experiment).map_err(failed)?;
                let request = json!({
                    "experiment_id": experiment,
                    "run_name": self.run_name,
                    "start_time": now(),
                });
                client.post("runs/create", &request).map_err(failed)?["run"].clone()
            }
        };
        let Some(id) = run["info"]["run_id"].as_str() else {
            return Err(Error::State(format!(
                "MLflow at {}: the answer has no run; is it an MLflow server?",
                self.tracking_uri
            )));
        };
        let artifacts = run["info"]["artifact_uri"].as_str().unwrap_or_default();
        let queue = Arc::new(Queue::default());
        let worker = queue.clone().serve(client, id.to_owned(), artifacts.to_owned());
        let worker = worker.map_err(|error| {
            Error::State(format!("the thread that talks to MLflow cannot start: {error}"))
        })?;
        let logger = MLflowLogger(Arc::new(Run {
            id: id.to_owned(),
            queue,
            worker: Mutex::new(Some(worker)),
            until: Mutex::default(),
            steps: Mutex::new(Steps::of(&run)),
        }));
        self.tags.iter().for_each(|(name, value)| logger.set_tag(name, value));
        Ok(logger)
    }
}
