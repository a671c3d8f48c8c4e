use serde_json::{Map, Value};

use crate::engine::{Engine, Handler, HandlerSpec, Metrics};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::schedule::ThresholdMode;
use crate::state::StateDict;

/// Ends the run when a score has stopped getting better: ignite's `EarlyStopping`. Attach it to the trainer.
///
/// The handler reads the score at the end of each epoch, so attach it after the handler that computes the score.
/// Reading a score on a GPU is a host sync. A score is better if it passes the best one by more than the threshold.
/// After `patience` scores in a row that are not better, the run is terminated. NaN is never better. A run that starts
/// anew counts from the beginning; a run that goes on keeps its count.
///
/// Attach it only at events at which the score is new, because an old score is not better.
///
/// ```
/// use tch_ignite::engine::{Engine, Until};
/// use tch_ignite::handlers::{EarlyStopping, Evaluate};
/// use tch_ignite::metrics::Mean;
///
/// let mut evaluator = Engine::new(|epoch: &mut f64, _, _: ()| Ok((*epoch - 3.0).abs()));
/// evaluator.metric("loss", Mean::new());
/// let mut trainer = Engine::new(|epoch: &mut f64, _, _: ()| { *epoch += 1.0; Ok(()) });
/// trainer
///     .attach(Evaluate::each_epoch("val", evaluator, vec![()]))
///     .attach(EarlyStopping::min("val/loss", 2));
/// let summary = trainer.run(&mut 0.0, vec![()], Until::epochs(100))?;
/// assert_eq!(summary.epochs, 5); // the third was best
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[doc(alias = "NoImprovementHandler")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct EarlyStopping {
    score: Score,
    mode: Mode,
    patience: u64,
    threshold: f64,
    threshold_mode: ThresholdMode,
    cumulative_delta: bool,
    min_evaluations: u64,
    events: Events,
    counter: u64,
    evaluations: u64,
    best: Option<f64>,
}

crate::debug::opaque_debug!(EarlyStopping);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Min,
    Max,
}

enum Score {
    Metric(String),
    Of(ScoreFn),
}

type ScoreFn = Box<dyn Fn(&Metrics) -> anyhow::Result<f64>>;

impl EarlyStopping {
    /// Watches a metric that is better when smaller, such as `"val/loss"`.
    pub fn min(metric: impl Into<String>, patience: u64) -> Self {
        Self::new(Score::Metric(metric.into()), Mode::Min, patience)
    }

    /// Watches a metric that is better when larger, such as `"val/accuracy"`.
    pub fn max(metric: impl Into<String>, patience: u64) -> Self {
        Self::new(Score::Metric(metric.into()), Mode::Max, patience)
    }

    /// Watches a score that `score` computes from the metrics, and that is better when smaller.
    ///
    /// ```
    /// use tch_ignite::handlers::EarlyStopping;
    /// let stop = EarlyStopping::min_of(|m| Ok(m.get("val/loss")? + m.get("val/penalty")?), 5);
    /// # let _ = stop;
    /// ```
    pub fn min_of(
        score: impl Fn(&Metrics) -> anyhow::Result<f64> + 'static,
        patience: u64,
    ) -> Self {
        Self::new(Score::Of(Box::new(score)), Mode::Min, patience)
    }

    /// Watches a score that `score` computes from the metrics, and that is better when larger.
    pub fn max_of(
        score: impl Fn(&Metrics) -> anyhow::Result<f64> + 'static,
        patience: u64,
    ) -> Self {
        Self::new(Score::Of(Box::new(score)), Mode::Max, patience)
    }

    fn new(score: Score, mode: Mode, patience: u64) -> Self {
        Self {
            score,
            mode,
            patience,
            threshold: 0.,
            threshold_mode: ThresholdMode::Abs,
            cumulative_delta: false,
            min_evaluations: 0,
            events: Event::EpochCompleted.into(),
            counter: 0,
            evaluations: 0,
            best: None,
        }
    }

    /// Sets by how much a score has to be better; by default any gain counts. It must not be negative.
    /// [`ThresholdMode::Rel`] compares with `best * (1 ± threshold)`, as PyTorch's plateau scheduler does. For negative
    /// scores that is worse than the best one, so use [`ThresholdMode::Abs`] there.
    pub fn threshold(mut self, threshold: f64, mode: ThresholdMode) -> Self {
        (self.threshold, self.threshold_mode) = (threshold, mode);
        self
    }

    /// Whether the gain is measured from the last score that was better by the threshold; the default is false.
    /// Otherwise a smaller gain moves the best score, without resetting the count.
    pub fn cumulative_delta(mut self, on: bool) -> Self {
        self.cumulative_delta = on;
        self
    }

    /// Does not end the run before this many scores were seen. Scores before that are counted.
    pub fn min_evaluations(mut self, evaluations: u64) -> Self {
        self.min_evaluations = evaluations;
        self
    }

    /// Reads the score at these events instead of the end of each epoch. Use for example
    /// `Event::EpochCompleted.every(5)` where the score is computed every five epochs.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    /// Number of scores in a row that were not better.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// The best score. After small gains it may be newer than the last score that was better by the threshold.
    pub fn best_score(&self) -> Option<f64> {
        self.best
    }

    fn check(&self) -> Result<()> {
        if self.patience < 1 {
            return Err(Error::invalid(
                "Argument patience should be positive integer. Given 0: the run stops after so many scores in a row that are not better, so 1 stops at the first",
            ));
        }
        if self.threshold < 0. || !self.threshold.is_finite() {
            return Err(Error::invalid(format!(
                "Argument threshold should not be a negative number. It should be finite; given {}",
                self.threshold
            )));
        }
        Ok(())
    }

    fn is_better(&self, score: f64, best: f64, threshold: f64) -> bool {
        match (self.mode, self.threshold_mode) {
            (Mode::Max, ThresholdMode::Abs) => score > best + threshold,
            (Mode::Max, ThresholdMode::Rel) => score > best * (1. + threshold),
            (Mode::Min, ThresholdMode::Abs) => score < best - threshold,
            (Mode::Min, ThresholdMode::Rel) => score < best * (1. - threshold),
        }
    }

    /// Takes in one score, without an engine. Returns true if it is time to stop.
    ///
    /// # Errors
    /// A `patience` of 0, or a `threshold` that is negative or not finite.
    pub fn advance(&mut self, score: f64) -> Result<bool> {
        self.check()?;
        self.evaluations += 1;
        let better = match self.best {
            None => !score.is_nan(),
            Some(best) => self.is_better(score, best, self.threshold),
        };
        if better {
            self.best = Some(score);
            self.counter = 0;
            return Ok(false);
        }
        self.counter += 1;
        if !self.cumulative_delta && self.best.is_some_and(|best| self.is_better(score, best, 0.)) {
            self.best = Some(score);
        }
        Ok(self.counter >= self.patience && self.evaluations >= self.min_evaluations)
    }

    /// Forgets all scores.
    pub fn reset(&mut self) {
        (self.counter, self.evaluations, self.best) = (0, 0, None);
    }

    /// ignite's `counter`, `best_score` and `threshold_mode`, and the count of scores as `evaluations`. An infinite
    /// score is saved as a text, because JSON has no number for it.
    pub fn state_dict(&self) -> Map<String, Value> {
        let best = match self.best {
            Some(best) if best.is_finite() => best.into(),
            Some(best) => if best > 0. { "Infinity" } else { "-Infinity" }.into(),
            None => Value::Null,
        };
        Map::from_iter([
            ("counter".to_owned(), self.counter.into()),
            ("best_score".to_owned(), best),
            ("threshold_mode".to_owned(), self.threshold_mode_name().into()),
            ("evaluations".to_owned(), self.evaluations.into()),
        ])
    }

    fn threshold_mode_name(&self) -> &'static str {
        match self.threshold_mode {
            ThresholdMode::Abs => "abs",
            ThresholdMode::Rel => "rel",
        }
    }

    /// Loads a saved count. Nothing is changed on error.
    ///
    /// # Errors
    /// A key is missing or has a wrong value, or the state belongs to a handler with another threshold mode.
    pub fn load_state_dict(&mut self, state: &Map<String, Value>) -> Result<()> {
        let get = |key: &str| {
            state.get(key).ok_or_else(|| {
                Error::State(format!(
                    "Required state attribute '{key}' is absent in provided state_dict"
                ))
            })
        };
        let wrong = |key: &str, value: &Value| {
            Error::State(format!("state of EarlyStopping: {value} is no value of '{key}'"))
        };
        let count = |key| -> Result<u64> {
            let value = get(key)?;
            value.as_u64().ok_or_else(|| wrong(key, value))
        };
        let (counter, best) = (count("counter")?, get("best_score")?);
        let best = match best {
            Value::Null => None,
            Value::String(text) if text == "Infinity" => Some(f64::INFINITY),
            Value::String(text) if text == "-Infinity" => Some(f64::NEG_INFINITY),
            other => Some(other.as_f64().ok_or_else(|| wrong("best_score", other))?),
        };
        let mode = get("threshold_mode")?;
        if mode != self.threshold_mode_name() {
            return Err(Error::State(format!(
                "the state is of an EarlyStopping with threshold_mode {mode}, but this one has {:?}",
                self.threshold_mode_name()
            )));
        }
        // ignite's states lack this count.
        let evaluations = match state.contains_key("evaluations") {
            true => count("evaluations")?,
            false => 0,
        };
        (self.counter, self.evaluations, self.best) = (counter, evaluations, best);
        Ok(())
    }
}

impl<C, B, O> Handler<C, B, O> for EarlyStopping {
    fn spec(&self) -> Result<HandlerSpec> {
        self.check()?;
        let name = match &self.score {
            Score::Metric(metric) => format!("early stopping on {metric}"),
            Score::Of(_) => "early stopping".into(),
        };
        Ok(HandlerSpec::new(name, Event::Started | self.events.clone()))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        Ok(Some(self.state_dict().into()))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.load_state_dict(state.values())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if event == Event::Started {
            if engine.state.iteration == 0 {
                self.reset();
            }
            return Ok(());
        }
        let score = match &self.score {
            Score::Metric(metric) => engine.state.metrics.get(metric)?,
            Score::Of(score) => score(&engine.state.metrics)?,
        };
        if self.advance(score)? {
            engine.terminate();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::engine::{Stop, Until};

    fn trainer<'a>() -> Engine<'a, (), f64, f64> {
        Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, f64>, x: f64| {
            engine.state.metrics.set("score", x);
            Ok(x)
        })
    }

    #[test]
    fn a_new_run_counts_anew_and_one_that_goes_on_does_not() -> anyhow::Result<()> {
        let stop = Rc::new(RefCell::new(EarlyStopping::max("score", 3)));
        let mut trainer = trainer();
        trainer.attach(stop.clone());
        trainer.run(&mut (), vec![1.], Until::epochs(3))?;
        assert_eq!(stop.borrow().counter(), 2);
        let summary = trainer.run(&mut (), vec![1.], Until::epochs(9))?;
        assert_eq!((summary.epochs, summary.stop), (4, Stop::Terminated));
        trainer.reset()?;
        let summary = trainer.run(&mut (), vec![1.], Until::epochs(9))?;
        assert_eq!(summary.epochs, 4);
        Ok(())
    }

    #[test]
    fn it_waits_for_the_first_evaluations_and_nan_is_never_better() -> anyhow::Result<()> {
        let mut stop = EarlyStopping::max("score", 1).min_evaluations(4);
        let scores = [f64::NAN, 0.5, f64::NAN, 0.5, 0.6, f64::NAN];
        let stops: Vec<_> =
            scores.map(|score| stop.advance(score)).into_iter().collect::<Result<_>>()?;
        assert_eq!(stops, [false, false, false, true, false, true]);
        assert_eq!(stop.best_score(), Some(0.6));
        Ok(())
    }

    #[test]
    fn what_it_cannot_read_is_an_error_that_lists_the_metrics() {
        let mut trainer = trainer();
        trainer.attach(EarlyStopping::min("val/loss", 3));
        let error = trainer.run(&mut (), vec![1.], Until::epochs(1)).unwrap_err();
        let text = format!("{error}");
        assert!(text.contains("early stopping on val/loss") && text.contains("'score'"), "{text}");
    }

    #[test]
    fn a_state_that_does_not_fit_changes_nothing() -> Result<()> {
        let mut saved = EarlyStopping::min("score", 3).state_dict();
        saved.insert("counter".into(), 2.into());
        let mut stop = EarlyStopping::min("score", 3).threshold(0.1, ThresholdMode::Rel);
        assert!(stop.load_state_dict(&saved).unwrap_err().to_string().contains("threshold_mode"));
        assert_eq!(stop.counter(), 0);
        saved.remove("best_score");
        let mut stop = EarlyStopping::min("score", 3);
        assert!(stop.load_state_dict(&saved).unwrap_err().to_string().contains("'best_score'"));
        saved.insert("best_score".into(), "-Infinity".into());
        stop.load_state_dict(&saved)?;
        assert_eq!((stop.counter(), stop.best_score()), (2, Some(f64::NEG_INFINITY)));
        assert_eq!(stop.state_dict(), saved);
        Ok(())
    }
}
