use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// For a whole request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Talks to an MLflow server.
pub(super) struct Client {
    agent: ureq::Agent,
    server: String,
    headers: Vec<(String, String)>,
}

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// It may work later: the server was not reached, or is out of order.
    pub(super) passes: bool,
    code: Option<String>,
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self { reason: error.to_string(), passes: true, code: None }
    }
}

impl Client {
    pub(super) fn new(server: &str, headers: Vec<(String, String)>) -> Result<Self> {
        let secure = server.starts_with("https://");
        if secure && !cfg!(feature = "mlflow-tls") {
            return Err(Error::invalid(format!("{server}: https needs the feature mlflow-tls")));
        }
        if !secure && !server.starts_with("http://") {
            return Err(Error::invalid(format!(
                "'{server}' is no address of an MLflow server, such as http://127.0.0.1:5000"
            )));
        }
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .build();
        let server = server.trim_end_matches('/').to_owned();
        Ok(Self { agent: config.into(), server, headers })
    }

    /// The id of the experiment of this name, which is made where there is none.
    pub(super) fn experiment(&self, name: &str) -> Result<Value, Failure> {
        match self.get("experiments/get-by-name", &[("experiment_name", name)]) {
            Ok(answer) => Ok(answer["experiment"]["experiment_id"].clone()),
            Err(failure) if failure.code.as_deref() == Some("RESOURCE_DOES_NOT_EXIST") => {
                let answer = self.post("experiments/create", &json!({"name": name}))?;
                Ok(answer["experiment_id"].clone())
            }
            Err(failure) => Err(failure),
        }
    }

    pub(super) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let mut request = self.agent.get(format!("{}/api/2.0/mlflow/{path}", self.server));
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        answer(request.query_pairs(query.iter().copied()).call()?)
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let mut request = self.agent.post(format!("{}/api/2.0/mlflow/{path}", self.server));
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        answer(request.content_type("application/json").send(body.to_string())?)
    }

    /// `artifacts` is where the run has its files, by the server.
    pub(super) fn put_artifact(
        &self,
        artifacts: &str,
        path: &str,
        bytes: &[u8],
    ) -> Result<Value, Failure> {
        let Some(folder) = artifacts.strip_prefix("mlflow-artifacts:/") else {
            return Err(Failure {
                reason: format!(
                    "'{path}': the server takes no artifacts; it keeps them in {artifacts}"
                ),
                passes: false,
                code: None,
            });
        };
        // Without a host: mlflow-artifacts:/0/… . With one: mlflow-artifacts://host/0/… .
        let folder = match folder.strip_prefix('/') {
            Some(rest) => rest.split_once('/').map_or("", |(_, folder)| folder),
            None => folder,
        };
        let path = format!("{folder}/{path}").replace(' ', "%20");
        let url = format!("{}/api/2.0/mlflow-artifacts/artifacts/{path}", self.server);
        let mut request = self.agent.put(url);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        answer(request.content_type("application/octet-stream").send(bytes)?)
    }
}

fn answer(mut response: ureq::http::Response<ureq::Body>) -> Result<Value, Failure> {
    let status = response.status();
    let text = response.body_mut().read_to_string()?;
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    if status.is_success() {
        return Ok(answer);
    }
    let reason = answer["message"].as_str().unwrap_or(&text);
    let reason: String = reason.chars().take(300).collect();
    Err(Failure {
        reason: format!("{status}: {reason}"),
        passes: status.is_server_error() || status.as_u16() == 429,
        code: answer["error_code"].as_str().map(str::to_owned),
    })
}
