use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::awaited::warn_of_missing;
use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::fs::write_atomically;
use crate::metrics::MetricValue;
use crate::optim::Knob;
use crate::state::StateDict;

/// Largest number of tensors of a series that are kept unread, to save host syncs.
const UNREAD: usize = 1024;

/// Records knobs and metrics over a run, for a CSV file, a plot or your own code.
///
/// Clones share one record: attach one, and read the other during or after the run.
///
/// ```
/// # use tch::{Device, nn};
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::History;
/// use tch_ignite::metrics::{Mean, RunningAverage};
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::schedule::{CosineAnnealing, ParamScheduler};
///
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # nn::linear(vs.root(), 1, 1, Default::default());
/// # let optimizer = Optimizer::sgd(&vs).build()?;
/// let lr = optimizer.knob("lr")?;
/// let history = History::new().knob("lr", lr.clone()).metric("loss").epoch_metric("mean loss");
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer
///     .metric("loss", RunningAverage::new().alpha(0.5))
///     .metric("mean loss", Mean::new())
///     .attach(ParamScheduler::new("lr", lr, CosineAnnealing::new(1.0, 0.0, 4)))
///     .attach(history.clone());
/// trainer.run(&mut (), vec![4.0, 2.0], Until::epochs(2))?;
///
/// assert_eq!(history.series("loss")?, [(1, 4.0), (2, 3.0), (3, 3.5), (4, 2.75)]);
/// assert_eq!(history.series("mean loss")?, [(2, 3.0), (4, 3.0)]);
/// # let folder = std::env::temp_dir().join(format!("tch-ignite-history-{}", std::process::id()));
/// history.write_csv(folder.join("history.csv"))?;
/// # #[cfg(feature = "plots")]
/// history.plot(folder.join("history.svg"), &[("learning rate", &["lr"]), ("loss", &["loss", "mean loss"])])?;
/// # std::fs::remove_dir_all(folder).ok();
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Knobs and metrics are recorded at ITERATION_COMPLETED, as the step and the handlers attached before this one left them:
/// attach it after metrics, and before schedulers of ITERATION_COMPLETED. A scheduler of OPTIMIZER_STEPPED has written
/// the value of the next update by then. Epoch metrics are recorded once an epoch, after all
/// handlers of its end were called, wherever these are attached.
///
/// A run that starts anew, or goes on from an earlier position, replaces what was recorded after that position.
///
/// An iteration costs a read of each knob and a look-up of each metric, no host sync, and 16 bytes plus 16 for each
/// value. Values on a device stay there unread until the end of the epoch, and are then read in one transfer for each
/// metric. At most 1024 values of a metric are kept unread, so very long epochs have a few more transfers. A metric of
/// your own must not change in place a tensor that it returned as its value.
#[derive(Clone, Default)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct History {
    sources: Vec<Source>,
    record: Arc<Mutex<Record>>,
    /// The (iteration, epoch) at which an epoch ended whose metrics are still to be recorded.
    ended: Option<(u64, u64)>,
}

/// Where the values of a column come from.
#[derive(Clone)]
struct Source {
    column: usize,
    what: What,
}

#[derive(Clone)]
enum What {
    Knob(Knob),
    Metric(String),
    EpochMetric(String),
}

impl History {
    /// A history that records nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a series of this name with the knob's value in each iteration.
    pub fn knob(self, name: impl Into<String>, knob: Knob) -> Self {
        self.with(name.into(), What::Knob(knob))
    }

    /// Adds a series with the metric's value after each iteration, for metrics that have one then, such as
    /// [`RunningAverage`](crate::metrics::RunningAverage).
    pub fn metric(self, name: impl Into<String>) -> Self {
        let name = name.into();
        self.with(name.clone(), What::Metric(name))
    }

    /// Adds a series with the metric's value after each epoch, such as an evaluator's (`"val/accuracy"`). The value is
    /// recorded at the last iteration of the epoch.
    pub fn epoch_metric(self, name: impl Into<String>) -> Self {
        let name = name.into();
        self.with(name.clone(), What::EpochMetric(name))
    }

    fn with(mut self, name: String, what: What) -> Self {
        let column = {
            let mut record = self.record();
            record.columns.push(Column { name, points: vec![], unread: vec![] });
            record.columns.len() - 1
        };
        self.sources.push(Source { column, what });
        self
    }

    /// The names of all series.
    pub fn names(&self) -> Vec<String> {
        self.record().columns.iter().map(|column| column.name.clone()).collect()
    }

    /// The values of a series with their iterations. Waits for the device if some values are not read yet.
    ///
    /// # Errors
    /// There is no such series (the text lists those there are), or a value cannot be read.
    pub fn series(&self, name: &str) -> Result<Vec<(u64, f64)>> {
        let mut record = self.record();
        record.read()?;
        let Some(column) = record.columns.iter().find(|column| column.name == name) else {
            let names: Vec<_> = record.columns.iter().map(|c| format!("'{}'", c.name)).collect();
            return Err(Error::invalid(format!(
                "no series '{name}' in the history; there are: {}",
                names.join(", ")
            )));
        };
        Ok(column.points.iter().map(|(row, value)| (record.rows[*row].iteration, *value)).collect())
    }

    /// Writes all series as CSV: a row for each iteration with its number, its epoch and the values; a cell is empty
    /// where a series has no value. Makes missing folders. A file that exists is replaced when the new one is complete.
    ///
    /// # Errors
    /// A value cannot be read, or the file cannot be written.
    pub fn write_csv(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut record = self.record();
        record.read()?;
        write_atomically(path.as_ref(), |file| record.write(file))
    }

    /// Plots series over the iterations as SVG: a panel for each title, with the series named for it. Values that are
    /// not finite are gaps. Of a long series only points that can be told apart are drawn. The file is written like
    /// that of [`write_csv`](Self::write_csv).
    ///
    /// # Errors
    /// There is no panel, or no such series, or the file cannot be written.
    #[cfg(feature = "plots")]
    pub fn plot(&self, path: impl AsRef<Path>, panels: &[(&str, &[&str])]) -> Result<()> {
        use crate::plot::{Curve, Panel, write_svg};
        let curve = |name: &&str| Ok(Curve::new(*name, self.series(name)?));
        let panels: Vec<_> = panels
            .iter()
            .map(|(title, names)| {
                let curves = names.iter().map(curve).collect::<Result<Vec<_>>>()?;
                Ok(Panel::new(*title, curves))
            })
            .collect::<Result<_>>()?;
        write_svg(path, &panels)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // A panic leaves nothing in the record half-changed.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Warns of metrics without a recorded value, at the end of a run (not where it is suspended).
    fn warn_of_empty_series<C, B, O>(&self, event: Event, engine: &mut Engine<'_, C, B, O>) {
        let record = self.record();
        if record.rows.is_empty() || !matches!(event, Event::Terminate | Event::Completed) {
            return;
        }
        let empty = self.sources.iter().filter(|source| {
            let column = record.columns.get(source.column);
            column.is_some_and(|column| column.points.is_empty())
        });
        let missing: Vec<_> = empty
            .filter_map(|source| match &source.what {
                What::Metric(name) | What::EpochMetric(name) => Some(name.as_str()),
                What::Knob(_) => None,
            })
            .collect();
        warn_of_missing("history", &missing, engine);
    }

    fn record_iteration<C, B, O>(&self, engine: &Engine<'_, C, B, O>) -> anyhow::Result<()> {
        let row = self.record().row(engine.state.iteration, engine.state.epoch);
        for source in &self.sources {
            // The record is locked for each value, because a knob may run user code.
            let value = match &source.what {
                What::Knob(knob) => Some(knob.get()?.into()),
                What::Metric(name) => shared(engine, name)?,
                What::EpochMetric(_) => None,
            };
            if let Some(value) = value {
                self.record().push(source.column, row, value)?;
            }
        }
        Ok(())
    }

    fn record_epoch<C, B, O>(&mut self, engine: &Engine<'_, C, B, O>) -> anyhow::Result<()> {
        let Some((iteration, epoch)) = self.ended.take() else {
            return Ok(());
        };
        let mut record = self.record();
        let row = record.row(iteration, epoch);
        for source in &self.sources {
            if let What::EpochMetric(name) = &source.what
                && let Some(value) = shared(engine, name)?
            {
                record.push(source.column, row, value)?;
            }
        }
        Ok(())
    }
}

/// The metric's value without reading it from its device; `None` if the metric has no value.
fn shared<C, B, O>(
    engine: &Engine<'_, C, B, O>,
    name: &str,
) -> anyhow::Result<Option<MetricValue>> {
    Ok(match engine.state.metrics.value(name) {
        Some(MetricValue::Tensor(tensor)) => {
            anyhow::ensure!(
                tensor.numel() == 1,
                "metric '{name}' must be a single value to be recorded, but has shape {:?}",
                tensor.size()
            );
            // The value is detached, so that it keeps no graph alive.
            Some(tensor.f_detach()?.into())
        }
        value => value.map(MetricValue::share),
    })
}

impl<C, B, O> Handler<C, B, O> for History {
    fn spec(&self) -> Result<HandlerSpec> {
        let mut names = self.names();
        names.extend(["iteration".into(), "epoch".into()]);
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::invalid(format!(
                "the history has two columns '{}'; give each series a name of its own, other than 'iteration' and 'epoch'",
                pair[0]
            ))),
            None => {
                use Event::*;
                let after = EpochStarted | Terminate | Completed | ExceptionRaised | Interrupt;
                let events = Started | IterationCompleted | EpochCompleted | after;
                Ok(HandlerSpec::new("history", events))
            }
        }
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = self.record().save()?;
        state.set_value("ended", self.ended)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.ended = state.value("ended")?;
        self.record().load(&state)
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        match event {
            Event::Started => self.record().truncate(engine.state.iteration),
            Event::IterationCompleted => self.record_iteration(engine)?,
            Event::EpochCompleted => {
                self.ended = Some((engine.state.iteration, engine.state.epoch));
            }
            Event::ExceptionRaised => {
                // The last handlers of this epoch's end were not called, so metrics may be those of the epoch before.
                if let Some(Error::Handler { event: Event::EpochCompleted, .. }) =
                    engine.exception()
                {
                    self.ended = None;
                }
                // Nothing is read from devices here: a device that failed would only fail again.
                self.record_epoch(engine)?;
            }
            _ => {
                // A signal may stop an evaluation whose values belong to this epoch: they come when the run goes on.
                if !(event == Event::Interrupt && engine.is_within_event()) {
                    self.record_epoch(engine)?;
                }
                self.record().read()?;
                self.warn_of_empty_series(event, engine);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = self.record();
        let names: Vec<_> = record.columns.iter().map(|column| &column.name).collect();
        f.debug_struct("History").field("series", &names).field("rows", &record.rows.len()).finish()
    }
}

/// The recorded rows and columns.
#[derive(Default)]
struct Record {
    rows: Vec<Row>,
    columns: Vec<Column>,
}

#[derive(Clone, Copy, PartialEq)]
struct Row {
    iteration: u64,
    epoch: u64,
}

struct Column {
    name: String,
    /// Points (index of the row, value), in order.
    points: Vec<(usize, f64)>,
    /// Values that are not read yet: (index of the point, its value).
    unread: Vec<(usize, Tensor)>,
}

impl Record {
    /// The index of the row of this iteration: the last row, or a new one.
    fn row(&mut self, iteration: u64, epoch: u64) -> usize {
        let row = Row { iteration, epoch };
        if self.rows.last() != Some(&row) {
            self.rows.push(row);
        }
        self.rows.len() - 1
    }

    fn push(&mut self, column: usize, row: usize, value: MetricValue) -> Result<()> {
        let Some(column) = self.columns.get_mut(column) else {
            return Ok(());
        };
        let value = match value {
            MetricValue::Number(value) => value,
            MetricValue::Named(_) => value.read()?,
            MetricValue::Tensor(tensor) => {
                column.unread.push((column.points.len(), tensor));
                f64::NAN
            }
        };
        column.points.push((row, value));
        if column.unread.len() >= UNREAD { column.read() } else { Ok(()) }
    }

    fn read(&mut self) -> Result<()> {
        self.columns.iter_mut().try_for_each(Column::read)
    }

    /// Reads what is unread, and returns the whole record.
    fn save(&mut self) -> Result<StateDict> {
        self.read()?;
        let failed = |error| Error::libtorch("saving the history", error);
        let rows: Vec<_> =
            self.rows.iter().flat_map(|r| [r.iteration as i64, r.epoch as i64]).collect();
        let mut state = StateDict::new();
        state.set_tensor("rows", Tensor::f_from_slice(&rows).map_err(failed)?);
        for column in &self.columns {
            let (at, values): (Vec<_>, Vec<_>) =
                column.points.iter().map(|(row, value)| (*row as i64, *value)).unzip();
            let mut points = StateDict::new();
            points.set_tensor("rows", Tensor::f_from_slice(&at).map_err(failed)?);
            points.set_tensor("values", Tensor::f_from_slice(&values).map_err(failed)?);
            state.set_part(&column.name, points);
        }
        Ok(state)
    }

    /// Loads a saved record. Nothing is changed on error.
    fn load(&mut self, state: &StateDict) -> Result<()> {
        let odd = || Error::State("the saved history is not what it should be".into());
        let integers = |tensor: &Tensor| Vec::<i64>::try_from(tensor).map_err(|_| odd());
        let rows: Vec<_> = integers(state.tensor("rows")?)?
            .chunks(2)
            .map(|row| match *row {
                [iteration, epoch] => Ok(Row { iteration: iteration as u64, epoch: epoch as u64 }),
                _ => Err(odd()),
            })
            .collect::<Result<_>>()?;
        let unknown = state.parts.keys().find(|part| self.columns.iter().all(|c| c.name != **part));
        if let Some(name) = unknown {
            return Err(Error::State(format!("there is no series '{name}' here")));
        }
        let mut columns = vec![];
        for Column { name, .. } in &self.columns {
            let saved = state.part(name)?;
            let at = integers(saved.tensor("rows")?)?;
            let values = Vec::<f64>::try_from(saved.tensor("values")?).map_err(|_| odd())?;
            let known = |row: &i64| usize::try_from(*row).is_ok_and(|row| row < rows.len());
            if at.len() != values.len() || !at.is_sorted() || !at.iter().all(known) {
                return Err(odd());
            }
            let points = at.into_iter().map(|row| row as usize).zip(values).collect();
            columns.push(Column { name: name.clone(), points, unread: vec![] });
        }
        (self.rows, self.columns) = (rows, columns);
        Ok(())
    }

    /// Removes what was recorded after an iteration.
    fn truncate(&mut self, iteration: u64) {
        let rows = self.rows.iter().take_while(|row| row.iteration <= iteration).count();
        self.rows.truncate(rows);
        for column in &mut self.columns {
            let points = column.points.partition_point(|(row, _)| *row < rows);
            column.points.truncate(points);
            column.unread.retain(|(point, _)| *point < points);
        }
    }

    fn write(&self, file: &mut impl Write) -> io::Result<()> {
        write!(file, "iteration,epoch")?;
        for column in &self.columns {
            write!(file, ",{}", quoted(&column.name))?;
        }
        let mut points: Vec<_> =
            self.columns.iter().map(|column| column.points.iter().peekable()).collect();
        for (index, row) in self.rows.iter().enumerate() {
            write!(file, "\n{},{}", row.iteration, row.epoch)?;
            for points in &mut points {
                match points.next_if(|(row, _)| *row == index) {
                    // `{:?}` writes the shortest text that reads back as the same number.
                    Some((_, value)) => write!(file, ",{value:?}")?,
                    None => write!(file, ",")?,
                }
            }
        }
        writeln!(file)
    }
}

/// Quotes a name as RFC 4180 demands.
fn quoted(name: &str) -> String {
    match name.contains([',', '"', '\r', '\n']) {
        true => format!("\"{}\"", name.replace('"', "\"\"")),
        false => name.into(),
    }
}

impl Column {
    /// Reads the unread values. On error they are kept for another try.
    fn read(&mut self) -> Result<()> {
        let values = match &self.unread[..] {
            [] => return Ok(()),
            unread => in_one_transfer(unread)
                .or_else(|_| unread.iter().map(|(_, t)| t.f_double_value(&[])).collect())
                .map_err(|error| Error::libtorch(format!("reading '{}'", self.name), error))?,
        };
        for ((point, _), value) in self.unread.drain(..).zip(values) {
            self.points[point].1 = value;
        }
        Ok(())
    }
}

/// Reads all values in one transfer. Fails where the tensors are not on one device.
fn in_one_transfer(unread: &[(usize, Tensor)]) -> std::result::Result<Vec<f64>, tch::TchError> {
    let scalars: Vec<_> = unread
        .iter()
        .map(|(_, t)| t.f_reshape([0i64; 0]))
        .collect::<std::result::Result<_, _>>()?;
    // The conversion to f64 is done on the CPU, because some devices lack f64.
    let all = Tensor::f_stack(&scalars, 0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Vec::try_from(all)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::*;
    use crate::engine::Until;
    use crate::metrics::{Mean, RunningAverage};

    type Trainer<'a> = Engine<'a, (), f64, f64>;

    fn trainer<'a>() -> Trainer<'a> {
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.metric("last", RunningAverage::new().alpha(1e-9));
        trainer
    }

    fn run(trainer: &mut Trainer<'_>, batches: &[f64], until: Until) -> Result<()> {
        trainer.run(&mut (), batches.to_vec(), until)?;
        Ok(())
    }

    fn counting() -> Knob {
        let count = Mutex::new(0.);
        let next = move || {
            let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
            *count += 0.1;
            *count
        };
        Knob::new("count", next, |_| {})
    }

    #[test]
    fn csv_has_a_row_an_iteration_and_no_value_where_there_is_none() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("new/folders/history.csv");
        let history = History::new()
            .knob("a \"knob\", counting", counting())
            .metric("never")
            .epoch_metric("mean");
        let mut trainer = trainer();
        trainer.attach(history.clone()).metric("mean", Mean::new());
        run(&mut trainer, &[1., 1e-7], Until::epochs(2))?;
        history.write_csv(&path)?;
        let expected = "iteration,epoch,\"a \"\"knob\"\", counting\",never,mean\n\
            1,1,0.1,,\n\
            2,1,0.2,,0.50000005\n\
            3,2,0.30000000000000004,,\n\
            4,2,0.4,,0.50000005\n";
        assert_eq!(std::fs::read_to_string(&path)?, expected);
        history.write_csv(&path)?;
        assert_eq!(std::fs::read_dir(folder.path().join("new/folders"))?.count(), 1);
        Ok(())
    }

    #[test]
    fn epoch_metrics_are_those_of_the_epoch_wherever_it_is_attached() -> Result<()> {
        let epoch_number = |trainer: &mut Trainer<'_>| {
            trainer.on(Event::EpochCompleted, |_, engine| {
                engine.state.metrics.set("n", engine.state.epoch as f64);
                Ok(())
            });
        };
        let (first, last) =
            (History::new().epoch_metric("n"), History::new().epoch_metric("n").epoch_metric("no"));
        let mut trainer = trainer();
        trainer.attach(first.clone());
        epoch_number(&mut trainer);
        trainer.attach(last.clone());
        run(&mut trainer, &[0.; 3], Until::epochs(2))?;
        assert_eq!(first.series("n")?, [(3, 1.), (6, 2.)]);
        assert_eq!(last.series("n")?, first.series("n")?);
        assert_eq!(last.series("no")?, []);
        Ok(())
    }

    #[test]
    fn a_failed_epoch_gets_no_metrics_and_a_terminated_one_does() -> Result<()> {
        let history = History::new().metric("last").epoch_metric("mean");
        let mut trainer = trainer();
        trainer.metric("mean", Mean::new()).attach(history.clone());
        trainer.on(Event::EpochCompleted, |_, engine| {
            anyhow::ensure!(engine.state.epoch < 2, "fails once");
            Ok(())
        });
        assert!(run(&mut trainer, &[1., 3.], Until::epochs(3)).is_err());
        assert_eq!(history.series("mean")?, [(2, 2.)]);
        assert_eq!(history.series("last")?.len(), 4);

        let history = History::new().epoch_metric("mean");
        let mut trainer = self::trainer();
        trainer.attach(history.clone()).metric("mean", Mean::new());
        trainer.on(Event::EpochCompleted, |_, engine| {
            engine.terminate_skip_completed();
            Ok(())
        });
        run(&mut trainer, &[1., 3.], Until::epochs(3))?;
        assert_eq!(history.series("mean")?, [(2, 2.)]);
        Ok(())
    }

    #[test]
    fn tensors_are_read_in_order_with_numbers_between_them() -> Result<()> {
        let history = History::new().metric("x");
        let mut trainer = Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, _>, x: f64| {
            let value = match engine.state.iteration % 4 {
                0 => MetricValue::Number(x),
                1 => Tensor::from(x as f32).into(),
                2 => Tensor::from(x).reshape([1, 1]).set_requires_grad(true).into(),
                _ => Tensor::from(x as i64).into(),
            };
            engine.state.metrics.set("x", value);
            Ok(())
        });
        trainer.attach(history.clone());
        let during = history.clone();
        trainer.on(Event::IterationCompleted.once(5), move |_, _| {
            assert_eq!(during.series("x")?.len(), 5);
            Ok(())
        });
        let batches: Vec<_> = (1..=2 * UNREAD as u64).map(|n| n as f64).collect();
        trainer.run(&mut (), batches, Until::epochs(1))?;
        let series = history.series("x")?;
        assert_eq!(series.len(), 2 * UNREAD);
        assert!(series.iter().all(|(iteration, value)| *iteration as f64 == *value));
        Ok(())
    }

    #[test]
    fn what_is_not_one_value_is_refused() -> Result<()> {
        let mut trainer = trainer();
        trainer.on(Event::Started, |_, engine| {
            engine.state.metrics.set("x", Tensor::from_slice(&[1., 2.]));
            Ok(())
        });
        trainer.attach(History::new().metric("x"));
        let error = run(&mut trainer, &[0.], Until::epochs(1)).unwrap_err();
        assert!(format!("{error:#}").contains("metric 'x' must be a single value"), "{error:#}");
        Ok(())
    }

    #[test]
    fn a_new_run_replaces_the_record_and_a_continued_one_adds_to_it() -> Result<()> {
        let history = History::new().metric("last");
        let mut trainer = trainer();
        trainer.attach(history.clone());
        run(&mut trainer, &[1., 2.], Until::epochs(1))?;
        run(&mut trainer, &[3., 4.], Until::epochs(2))?;
        assert_eq!(history.series("last")?.len(), 4);
        run(&mut trainer, &[5., 6.], Until::epochs(2))?;
        let values: Vec<_> = history.series("last")?.iter().map(|(_, v)| v.round()).collect();
        assert_eq!(values, [5., 6., 5., 6.]);
        Ok(())
    }

    #[test]
    fn unknown_and_double_names_are_errors_that_list_them() -> Result<()> {
        let history = History::new().metric("loss").epoch_metric("val/accuracy");
        assert_eq!(history.names(), ["loss", "val/accuracy"]);
        let error = history.series("Loss").unwrap_err().to_string();
        assert_eq!(error, "no series 'Loss' in the history; there are: 'loss', 'val/accuracy'");
        for twice in [History::new().metric("a").metric("a"), History::new().metric("epoch")] {
            let error = trainer().add_handler(twice).unwrap_err().to_string();
            assert!(error.contains("two columns"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_file_in_the_way_is_an_error_that_names_the_path() -> Result<()> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("runs"), "")?;
        let path = folder.path().join("runs/history.csv");
        let error = History::new().write_csv(&path).unwrap_err();
        assert!(matches!(&error, Error::Io { path: named, .. } if *named == path), "{error}");
        Ok(())
    }

    #[test]
    fn handles_are_send() {
        fn check<T: Send + Sync>() {}
        check::<History>();
    }
}
