//! Tests of the MLflow logger, with a server of our own that fails on demand, and with a real one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, nn};
use tch_ignite::engine::{Engine, Event, Until};
use tch_ignite::loggers::{Image, Logger, MLflowLogger, OptimizerParamsHandler, OutputHandler};
use tch_ignite::metrics::Mean;
use tch_ignite::optim::Optimizer;

/// A server that answers like MLflow, one request after the other.
struct Server {
    address: String,
    /// The answer to requests that log: an HTTP status, or 0 to cut the connection.
    status: Arc<AtomicU16>,
    /// Path and body of each request that was accepted.
    requests: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Server {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let server = Self { address, status: Arc::new(200.into()), requests: Arc::default() };
        let (status, requests) = (server.status.clone(), server.requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (status, requests) = (status.clone(), requests.clone());
                std::thread::spawn(move || while answer(&stream, &status, &requests).is_some() {});
            }
        });
        Ok(server)
    }

    fn set(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    fn bodies(&self, path: &str) -> Vec<Value> {
        let requests = self.requests.lock().unwrap();
        let of_path = requests.iter().filter(|request| request.0.ends_with(path));
        of_path.map(|request| request.1.clone()).collect()
    }

    fn metrics(&self) -> Vec<Value> {
        let batches = self.bodies("runs/log-batch").into_iter();
        batches.flat_map(|batch| batch["metrics"].as_array().cloned().unwrap_or_default()).collect()
    }
}

fn answer(
    mut stream: &TcpStream,
    status: &AtomicU16,
    requests: &Mutex<Vec<(String, Value)>>,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (mut code, mut text) = (status.load(Ordering::SeqCst), json!({}));
    if path.contains("get-by-name") {
        (code, text) = (404, json!({"error_code": "RESOURCE_DOES_NOT_EXIST"}));
    } else if path.ends_with("experiments/create") {
        (code, text) = (200, json!({"experiment_id": "7"}));
    } else if path.ends_with("runs/create") {
        let info = json!({"run_id": "abc", "artifact_uri": "mlflow-artifacts:/7/abc/artifacts"});
        (code, text) = (200, json!({"run": {"info": info}}));
    } else if path.contains("runs/get?") {
        let mut last = std::collections::BTreeMap::<String, Value>::new();
        for (_, body) in requests.lock().unwrap().iter() {
            for metric in body["metrics"].as_array().into_iter().flatten() {
                let entry = last.entry(metric["key"].to_string()).or_insert_with(|| metric.clone());
                if metric["step"].as_u64() > entry["step"].as_u64() {
                    *entry = metric.clone();
                }
            }
        }
        let info = json!({"run_id": "abc", "artifact_uri": "mlflow-artifacts:/7/abc/artifacts"});
        let metrics: Vec<_> = last.into_values().collect();
        text = json!({"run": {"info": info, "data": {"metrics": metrics}}});
    } else if code == 400 {
        text = json!({"message": "as asked"});
    }
    if code == 0 {
        return None;
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    if code == 200 && path.ends_with("runs/log-batch") && !is_accepted(&body) {
        (code, text) = (400, json!({"message": "as MLflow does"}));
    }
    if code == 200 {
        requests.lock().unwrap().push((path, body));
    }
    let text = text.to_string();
    let head = format!("HTTP/1.1 {code} so\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    stream.write_all(head.as_bytes()).ok()
}

/// Whether MLflow would accept a batch: each parameter and tag comes once, and no name has an empty part.
fn is_accepted(batch: &Value) -> bool {
    ["params", "tags"].into_iter().all(|kind| {
        let items = batch[kind].as_array().into_iter().flatten();
        let mut names: Vec<_> = items.filter_map(|item| item["key"].as_str()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        names.len() == count && names.iter().all(|name| !name.contains("//"))
    })
}

fn trainer<'a>(mlflow: &MLflowLogger) -> Engine<'a, (), f64, f64> {
    let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
    let every = Event::IterationCompleted;
    trainer
        .attach(OutputHandler::new(mlflow, "training", every).output("loss", |loss: &f64| *loss))
        .attach(mlflow.clone());
    trainer
}

#[test]
fn a_run_is_started_filled_and_finished() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::builder(&server.address)
        .experiment("digits")
        .run_name("one")
        .tag("who", "me")
        .start()?;
    assert_eq!(mlflow.run_id(), "abc");
    mlflow.config(&json!({"lr": 0.1, "optimizer": {"name": "sgd", "nesterov": true}}))?;
    let summary = trainer(&mlflow).run(&mut (), vec![0.5, f64::NAN], Until::epochs(1))?;
    assert!(summary.warnings.is_empty(), "{summary}");
    mlflow.scalar("val/accuracy", 0.25, 1)?;
    mlflow.close()?;

    assert_eq!(server.bodies("experiments/create"), [json!({"name": "digits"})]);
    assert_eq!(server.bodies("runs/create")[0]["run_name"], "one");
    let metrics = server.metrics();
    let metrics: Vec<_> = metrics.iter().map(|m| (&m["key"], &m["value"], &m["step"])).collect();
    let (training, accuracy) = (&json!("training loss"), &json!("val accuracy"));
    let expected = [
        (training, &json!(0.5), &json!(1)),
        (training, &json!("NaN"), &json!(2)),
        (accuracy, &json!(0.25), &json!(1)),
    ];
    assert_eq!(metrics, expected);
    let batches = server.bodies("runs/log-batch");
    let params: Vec<_> =
        batches.iter().filter_map(|b| b["params"].as_array()).flatten().cloned().collect();
    let expected = [
        json!({"key": "lr", "value": "0.1"}),
        json!({"key": "optimizer/name", "value": "sgd"}),
        json!({"key": "optimizer/nesterov", "value": "true"}),
    ];
    assert_eq!(params, expected);
    assert_eq!(server.bodies("runs/update").last().context("the end")?["status"], "FINISHED");
    assert!(mlflow.scalar("late", 0., 1).is_ok() && mlflow.close().is_err());
    Ok(())
}

#[test]
fn a_run_that_is_resumed_has_each_step_once() -> Result<()> {
    let server = Server::start()?;
    let builder = || MLflowLogger::builder(&server.address);
    let data = || vec![0.5; 4];
    let steps = || -> Vec<_> { server.metrics().iter().map(|m| m["step"].clone()).collect() };
    let takes_nothing_back = |summary: tch_ignite::engine::Summary| {
        assert!(summary.warnings[0].contains("keep the values that are there"), "{summary}");
    };

    let mlflow = builder().start()?;
    let mut first = trainer(&mlflow);
    first.run(&mut (), data(), Until::epochs(1))?;
    let saved = first.checkpoint(&())?.copy()?;
    first.run(&mut (), data(), Until::epochs(2))?;
    // The same process goes back, and further than before.
    first.restore(&mut (), saved.copy()?, true)?;
    takes_nothing_back(first.run(&mut (), data(), Until::epochs(3))?);
    // A step that was there before the checkpoint is the user's own wish.
    mlflow.scalar("training/loss", 0.5, 4)?;
    mlflow.close()?;
    drop((first, mlflow));
    assert_eq!(steps(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 4]);

    // Another process goes on with the run.
    let mlflow = builder().run_id("abc").start()?;
    let mut second = trainer(&mlflow);
    second.restore(&mut (), saved.copy()?, true)?;
    takes_nothing_back(second.run(&mut (), data(), Until::epochs(4))?);
    mlflow.close()?;
    drop((second, mlflow));
    assert_eq!(steps()[13..], [13, 14, 15, 16]);

    // Nothing was logged after this checkpoint.
    let mlflow = builder().run_id("abc").start()?;
    let mut third = trainer(&mlflow);
    third.run(&mut (), data(), Until::epochs(5))?;
    let saved = third.checkpoint(&())?.copy()?;
    third.restore(&mut (), saved, true)?;
    assert_eq!(third.run(&mut (), data(), Until::epochs(6))?.warnings, [""; 0]);
    Ok(())
}

#[test]
fn a_run_that_fails_is_marked() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::new(&server.address)?;
    let mut trainer = trainer(&mlflow);
    trainer.on(Event::EpochCompleted, |_, _| anyhow::bail!("as asked"));
    assert!(trainer.run(&mut (), vec![0.5], Until::epochs(1)).is_err());
    drop((trainer, mlflow));
    assert_eq!(server.bodies("runs/update").last().context("the end")?["status"], "FAILED");
    Ok(())
}

#[test]
fn an_outage_is_bridged() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::new(&server.address)?;
    server.set(0);
    trainer(&mlflow); // the trainer is never run
    for step in 0..100 {
        mlflow.scalar("a", step as f64, step)?;
    }
    mlflow.flush()?;
    std::thread::sleep(Duration::from_millis(300));
    server.set(503);
    std::thread::sleep(Duration::from_millis(300));
    server.set(200);
    mlflow.close()?;
    assert_eq!(server.metrics().len(), 100);
    Ok(())
}

#[test]
fn a_server_that_is_gone_neither_stops_nor_delays_a_run() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::new(&server.address)?;
    server.set(0);
    let begun = Instant::now();
    let mut training = None;
    let mut trainer = trainer(&mlflow);
    trainer.on(Event::IterationCompleted.once(20_000), |_, engine| {
        training = Some(begun.elapsed());
        // TERMINATE and COMPLETED are one end, which waits for ten seconds.
        engine.terminate();
        Ok(())
    });
    let summary = trainer.run(&mut (), vec![0.5; 20_000], Until::epochs(2))?;
    assert_eq!(summary.iterations, 20_000);
    drop(trainer);
    let training = training.context("an epoch")?;
    assert!(training < Duration::from_secs(5), "{training:?}");
    assert!(begun.elapsed() - training < Duration::from_secs(18));
    // At least the values for which the queue had no room are lost.
    let warning = summary.warnings.join("\n");
    assert!(warning.contains("values were lost"), "{warning}");
    let error = mlflow.close().unwrap_err().to_string();
    assert!(error.contains("20000 values were lost") || error.contains("20001"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(40));
    Ok(())
}

#[test]
fn what_the_server_refuses_is_told_and_the_rest_is_sent() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::new(&server.address)?;
    server.set(400);
    mlflow.scalar("a", 1., 1)?;
    mlflow.flush()?;
    std::thread::sleep(Duration::from_millis(500));
    server.set(200);
    mlflow.scalar("b", 1., 1)?;
    mlflow.scalar("not (allowed)", 1., 1)?;
    let error = mlflow.close().unwrap_err().to_string();
    assert!(error.contains("2 values were lost") && error.contains("not (allowed)"), "{error}");
    assert_eq!(server.metrics().len(), 1);
    Ok(())
}

#[test]
fn one_refused_value_takes_no_others_with_it() -> Result<()> {
    let server = Server::start()?;
    let mlflow = MLflowLogger::new(&server.address)?;
    for number in 0..7 {
        mlflow.log_param(&format!("p{number}"), number);
        mlflow.log_param(if number == 4 { "a//b" } else { "p1" }, 1);
        mlflow.set_tag("tag", number);
    }
    let error = mlflow.close().unwrap_err().to_string();
    assert!(error.contains("1 value was lost") && error.contains("as MLflow does"), "{error}");
    let logged = |kind: &str| {
        let batches = server.bodies("runs/log-batch").into_iter();
        let all = batches.flat_map(|batch| batch[kind].as_array().cloned().unwrap_or_default());
        all.map(|item| format!("{}={}", item["key"], item["value"])).collect::<Vec<_>>()
    };
    let params = logged("params");
    for number in 0..7 {
        assert!(params.contains(&format!("\"p{number}\"=\"{number}\"")), "{params:?}");
    }
    assert_eq!(logged("tags").last().context("a tag")?, "\"tag\"=\"6\"");
    Ok(())
}

#[test]
fn a_server_that_is_none_is_told_before_training() -> Result<()> {
    for address in ["localhost:5000", "http://127.0.0.1:1", "http://"] {
        let error = MLflowLogger::new(address).err().context("no server")?.to_string();
        assert!(error.contains(address), "{error}");
    }
    let mlflow = MLflowLogger::new(&Server::start()?.address)?;
    for path in ["", "a//b", "../a", "/a", "a:b"] {
        assert!(mlflow.log_artifact(path, "").is_err(), "{path}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a server (pip install mlflow; mlflow server --port 5000): MLFLOW_TRACKING_URI=http://127.0.0.1:5000 cargo test --release --features mlflow --test integration mlflow -- --ignored"]
fn a_real_server_has_it_all() -> Result<()> {
    let uri = std::env::var("MLFLOW_TRACKING_URI").context("MLFLOW_TRACKING_URI")?;
    let experiment = format!("tch-ignite-{}", std::process::id());
    let mlflow = MLflowLogger::builder(&uri).experiment(&experiment).run_name("real").start()?;
    mlflow.config(&json!({"lr": 0.1, "net": {"layers": 2, "name": "net"}}))?;
    mlflow.set_tag("kind", "test");
    mlflow.log_artifact("notes/a note.txt", "text")?;
    let pixels = Tensor::zeros([8, 8], (Kind::Float, Device::Cpu));
    mlflow.image("samples/grid", &Image::from_tensor(&pixels)?, 3)?;

    let vs = nn::VarStore::new(Device::Cpu);
    nn::linear(vs.root(), 1, 1, Default::default());
    let optimizer = Optimizer::sgd(&vs).lr(0.125).build()?;
    let mut evaluator = trainer(&mlflow);
    evaluator
        .metric("mean", Mean::new())
        .attach(OutputHandler::each_epoch(&mlflow, "validation").metric("mean"))
        .attach(OptimizerParamsHandler::new(&mlflow, "", &optimizer, Event::IterationStarted));
    let values: Vec<_> = (0..2500).map(|i| if i == 7 { f64::NAN } else { i as f64 / 3. }).collect();
    let summary = evaluator.run(&mut (), values.clone(), Until::epochs(1))?;
    assert!(summary.warnings.is_empty(), "{summary}");
    mlflow.close()?;

    let get = |path: &str| -> Result<Value> {
        let url = format!("{uri}/api/2.0/{path}");
        Ok(serde_json::from_str(&ureq::get(url).call()?.body_mut().read_to_string()?)?)
    };
    let id = mlflow.run_id();
    let run = get(&format!("mlflow/runs/get?run_id={id}"))?["run"].take();
    assert_eq!(run["info"]["status"], "FINISHED");
    let params = run["data"]["params"].as_array().context("params")?;
    assert_eq!(params.len(), 3);
    assert!(params.contains(&json!({"key": "net/name", "value": "net"})), "{params:?}");
    let tags = run["data"]["tags"].as_array().context("tags")?;
    assert!(tags.contains(&json!({"key": "kind", "value": "test"})));
    assert!(tags.contains(&json!({"key": "mlflow.runName", "value": "real"})));
    let metrics = run["data"]["metrics"].as_array().context("metrics")?;
    let last = |key: &str| metrics.iter().find(|m| m["key"] == key).map(|m| m["value"].clone());
    assert_eq!(last("lr group_0"), Some(json!(0.125)));
    assert!(last("validation mean").is_some(), "{metrics:?}");
    let history = get(&format!(
        "mlflow/metrics/get-history?run_id={id}&metric_key=training%20loss&max_results=5000"
    ))?;
    let history = history["metrics"].as_array().context("history")?;
    ensure!(history.len() == 2500, "{} values", history.len());
    for metric in history {
        let step = metric["step"].as_u64().context("a step")? as usize;
        match values[step - 1] {
            value if value.is_nan() => assert_eq!(metric["value"], "NaN"),
            value => assert_eq!(metric["value"].as_f64(), Some(value)),
        }
    }
    let files = get(&format!("mlflow/artifacts/list?run_id={id}&path=images/samples/grid"))?;
    assert_eq!(files["files"][0]["path"], "images/samples/grid/3.png", "{files}");
    let files = get(&format!("mlflow/artifacts/list?run_id={id}&path=notes"))?;
    assert_eq!(files["files"][0]["path"], "notes/a note.txt", "{files}");

    let again = MLflowLogger::builder(&uri).run_id(id).start()?;
    again.scalar("more", 1., 1)?;
    again.close()?;
    let gone = MLflowLogger::builder(&uri).run_id("none").start().err().context("no run")?;
    assert!(gone.to_string().contains("none"), "{gone}");
    Ok(())
}
