use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressDrawTarget, ProgressStyle};

use super::awaited::warn_of_missing;
use crate::engine::{Engine, Handler, HandlerSpec, Ranks, State};
use crate::error::Result;
use crate::event::Event;
use crate::optim::Knob;

/// Time between two drawings of the bar.
const PERIOD: Duration = Duration::from_millis(100);
/// Time between two lines within an epoch, where there is no bar.
const LINE_PERIOD: Duration = Duration::from_secs(60);

/// Shows the progress of a run on stderr: the epoch and its iterations, the rate, the remaining time of the epoch,
/// metrics and knobs.
///
/// ```text
/// epoch 2/5 [==========>             ] 61/141  44.2 it/s, 0:01 left  loss 0.1514  lr (base) 0.0045
/// ```
///
/// At the end of each epoch a line with the final values stays. The values are read after all handlers of the epoch's
/// end were called, so the bar may be attached before handlers that compute them. Metrics without a value are left out.
/// Where stderr is not a terminal there is no bar, but only that line, and a line a minute within an epoch. The bar of
/// an evaluator is a [`child`](Self::child) of the trainer's.
///
/// ```
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::handlers::ProgressBar;
/// use tch_ignite::metrics::RunningAverage;
///
/// let mut trainer = Engine::new(|_: &mut (), _, loss: f64| Ok(loss));
/// trainer.metric("loss", RunningAverage::new());
/// let bar = ProgressBar::new().metric("loss");
/// trainer.attach(bar.clone());
/// trainer.on(Event::EpochCompleted, move |_, engine| {
///     bar.suspend(|| println!("epoch {} is done", engine.state.epoch));
///     Ok(())
/// });
/// trainer.run(&mut (), vec![0.5; 100], Until::epochs(3))?;
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// An iteration costs a count. About ten times a second the clock is read, metrics are read (a host sync for those on
/// CUDA) and the bar is drawn, and only where it is shown.
#[derive(Debug, Clone)]
#[doc(alias = "TQDMProgressBar")]
#[doc(alias = "tqdm")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct ProgressBar {
    /// The bars of a trainer and its evaluators.
    screens: MultiProgress,
    screen: indicatif::ProgressBar,
    /// Where lines go if there is no terminal.
    lines: Option<Lines>,
    /// Name of the evaluator; `None` for a trainer.
    name: Option<String>,
    values: Vec<(String, Value)>,
    stage: Stage,
    pace: Pace,
    /// The text before the bar, such as `"epoch 2/5"`.
    title: String,
    /// Number of iterations of the epoch that are done.
    done: u64,
    /// Number of iterations before the first that was seen; where a run goes on, that one came some time after the
    /// epoch began.
    before: Option<u64>,
}

#[derive(Clone)]
struct Lines(Arc<dyn Fn(&str) + Send + Sync>);

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lines")
    }
}

#[derive(Debug, Clone)]
enum Value {
    Metric,
    Knob(Knob),
}

/// The text that the screen shows.
#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Nothing, because no epoch is under way.
    Idle,
    /// Nothing, because the bar is hidden.
    Hidden,
    /// Lines instead of a bar, for an epoch that began at this time.
    Lines(Instant),
    /// The bar of an epoch that began at this time.
    Running(Instant),
    /// The bar of an epoch whose iterations took this long.
    Ended(Duration),
}

impl Default for ProgressBar {
    fn default() -> Self {
        Self::new()
    }
}

impl ProgressBar {
    /// A bar on stderr that shows epochs and iterations.
    pub fn new() -> Self {
        let screens = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let lines = Lines(Arc::new(|line: &str| eprintln!("{line}")));
        Self::among(screens, Some(lines), None)
    }

    fn among(screens: MultiProgress, lines: Option<Lines>, name: Option<String>) -> Self {
        let screen = screens.add(indicatif::ProgressBar::no_length());
        // Nothing is shown before the first epoch.
        screen.finish_and_clear();
        Self {
            screens,
            screen,
            lines,
            name,
            values: vec![],
            stage: Stage::Idle,
            pace: Pace::new(PERIOD),
            title: String::new(),
            done: 0,
            before: None,
        }
    }

    /// A bar below this one, for an evaluator of this name. It leaves no line, and shows nothing where there is no
    /// terminal, because the values of the evaluation are among the trainer's metrics.
    ///
    /// ```
    /// use tch_ignite::engine::{Engine, Until};
    /// use tch_ignite::handlers::{Evaluate, ProgressBar};
    /// use tch_ignite::metrics::Mean;
    /// let bar = ProgressBar::new().metric("val/mean");
    /// let mut evaluator = Engine::new(|_: &mut (), _, x: f64| Ok(x));
    /// evaluator.metric("mean", Mean::new()).attach(bar.child("val"));
    /// let mut trainer = Engine::new(|_: &mut (), _, _: f64| Ok(()));
    /// trainer.attach(bar).attach(Evaluate::each_epoch("val", evaluator, vec![0.5; 100]));
    /// trainer.run(&mut (), vec![0.5; 100], Until::epochs(3))?;
    /// # Ok::<(), tch_ignite::Error>(())
    /// ```
    pub fn child(&self, name: impl Into<String>) -> Self {
        Self::among(self.screens.clone(), None, Some(name.into()))
    }

    /// Passes the lines to `log`, such as a logger's, instead of stderr, where there is no terminal.
    pub fn lines_to(mut self, log: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.lines = Some(Lines(Arc::new(log)));
        self
    }

    /// Shows the metric of this name once it has a value. If it never has one, the run's summary warns.
    pub fn metric(mut self, name: impl Into<String>) -> Self {
        self.values.push((name.into(), Value::Metric));
        self
    }

    /// Shows the knob's value, under this name.
    pub fn knob(mut self, name: impl Into<String>, knob: Knob) -> Self {
        self.values.push((name.into(), Value::Knob(knob)));
        self
    }

    /// Shows no bar and writes no lines.
    pub fn hidden(mut self) -> Self {
        self.lines = None;
        self.with_draw_target(ProgressDrawTarget::hidden())
    }

    /// Draws to this target instead of stderr, also for the clones and children of this bar.
    pub fn with_draw_target(self, target: ProgressDrawTarget) -> Self {
        self.screens.set_draw_target(target);
        self
    }

    /// Hides the bar while `print` prints, so that the two do not mix. Call this on a clone of the attached bar.
    pub fn suspend<R>(&self, print: impl FnOnce() -> R) -> R {
        self.screens.suspend(print)
    }

    fn begin<B, O>(&mut self, state: &State<B, O>) -> anyhow::Result<()> {
        (self.done, self.before) = (0, None);
        self.title = match &self.name {
            Some(name) => name.clone(),
            None => title(state),
        };
        if self.screen.is_hidden() {
            self.stage =
                self.lines.as_ref().map_or(Stage::Hidden, |_| Stage::Lines(Instant::now()));
            self.pace = Pace::new(LINE_PERIOD);
            return Ok(());
        }
        self.stage = Stage::Running(Instant::now());
        self.pace = Pace::new(PERIOD);
        let template = match state.epoch_length {
            Some(length) => {
                self.screen.set_length(length);
                "{prefix} [{bar:24}] {pos}/{len}{wide_msg}"
            }
            None => "{prefix}  {pos}{wide_msg}",
        };
        let style = ProgressStyle::with_template(template)?.progress_chars("=> ");
        self.screen.set_style(style);
        self.show("");
        self.screen.reset();
        self.draw(state)
    }

    /// Changes the content of the bar without drawing it.
    fn show(&self, message: impl Into<String>) {
        drop(
            (self.screen.clone())
                .with_prefix(self.title.clone())
                .with_position(self.done)
                .with_message(message.into()),
        );
    }

    fn draw<B, O>(&self, state: &State<B, O>) -> anyhow::Result<()> {
        let mut text = match self.stage {
            Stage::Running(begun) => self.rate_text(begun.elapsed(), state.epoch_length),
            Stage::Ended(took) => self.rate_text(took, None),
            Stage::Lines(begun) => {
                let rate = self.rate_text(begun.elapsed(), state.epoch_length);
                let line = format!("{}  {}{rate}", self.title, self.done_of(state));
                self.say(&(line + &self.values_text(state)?));
                return Ok(());
            }
            Stage::Idle | Stage::Hidden => return Ok(()),
        };
        text += &self.values_text(state)?;
        self.show(text);
        self.screen.force_draw();
        Ok(())
    }

    fn say(&self, line: &str) {
        if let Some(Lines(say)) = &self.lines {
            say(line);
        }
    }

    /// The iterations done, such as `"61/141"`.
    fn done_of<B, O>(&self, state: &State<B, O>) -> String {
        match state.epoch_length {
            Some(length) => format!("{}/{length}", self.done),
            None => self.done.to_string(),
        }
    }

    /// Replaces the bar by a line that stays.
    fn end<B, O>(&mut self, state: &State<B, O>) -> anyhow::Result<()> {
        let took = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Running(begun) | Stage::Lines(begun) => begun.elapsed(),
            Stage::Ended(took) => took,
            Stage::Idle | Stage::Hidden => return Ok(()),
        };
        if self.name.is_some() {
            self.screen.finish_and_clear();
            return Ok(());
        }
        let done = self.done_of(state);
        let rate = self.rate_text(took, None);
        // The line is shown even if a failed device cannot give the values.
        let values = self.values_text(state);
        let text = values.as_deref().unwrap_or_default();
        let took = match took.as_secs() {
            ..60 => format!("{:.1} s", took.as_secs_f64()),
            _ => clock(took),
        };
        // This order leaves the cursor on a line of its own.
        let line = format!("{}  {done} in {took}{rate}{text}", self.title);
        match self.screen.is_hidden() {
            true => self.say(&line),
            false => {
                self.screen.println(line);
                self.screen.finish_and_clear();
            }
        }
        values.map(drop)
    }

    /// The rate, and the remaining time of an epoch of this length.
    fn rate_text(&self, took: Duration, length: Option<u64>) -> String {
        let seen = self.done.saturating_sub(self.before.unwrap_or(self.done));
        let each = took.as_secs_f64() / seen as f64;
        if seen == 0 || each == 0. {
            return String::new();
        }
        let rate = match each > 1. {
            true => format!("  {} s/it", number(each, 3)),
            false => format!("  {} it/s", number(1. / each, 3)),
        };
        match length {
            Some(length) => {
                let left = length.saturating_sub(self.done) as f64 * each;
                let left = Duration::try_from_secs_f64(left.ceil()).unwrap_or(Duration::MAX);
                format!("{rate}, {} left", clock(left))
            }
            None => rate,
        }
    }

    fn values_text<B, O>(&self, state: &State<B, O>) -> anyhow::Result<String> {
        let mut text = String::new();
        for (name, value) in &self.values {
            let value = match value {
                Value::Metric if !state.metrics.contains(name) => continue,
                Value::Metric => number(state.metrics.get(name)?, 4),
                Value::Knob(knob) => without_zeros(&number(knob.get()?, 4)),
            };
            text += &format!("  {name} {value}");
        }
        Ok(text)
    }
}

impl<C, B, O> Handler<C, B, O> for ProgressBar {
    fn spec(&self) -> Result<HandlerSpec> {
        use Event::*;
        let ends = Terminate | Completed | ExceptionRaised | Interrupt;
        let events = EpochStarted | IterationCompleted | EpochCompleted | ends;
        Ok(HandlerSpec::new("progress bar", events).ranks(Ranks::Main))
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        match (event, self.stage) {
            (Event::IterationCompleted, Stage::Hidden) => {}
            (Event::IterationCompleted, stage) => {
                if let Stage::Idle = stage {
                    // An interrupted run goes on without EPOCH_STARTED.
                    self.begin(&engine.state)?;
                }
                self.done = engine.iteration_in_epoch();
                self.before.get_or_insert(self.done.saturating_sub(1));
                if self.pace.is_due() {
                    self.draw(&engine.state)?;
                }
            }
            (Event::EpochCompleted, Stage::Running(begun) | Stage::Lines(begun)) => {
                // The time of this event's handlers before this one does not count.
                self.stage = Stage::Ended(begun.elapsed().min(engine.state.epoch_time));
                if !self.screen.is_hidden() {
                    self.draw(&engine.state)?;
                }
            }
            (Event::EpochCompleted, _) => {}
            (Event::EpochStarted, _) => {
                self.end(&engine.state)?;
                self.begin(&engine.state)?;
            }
            (Event::ExceptionRaised, _) => {
                // A value that cannot be read here fails because of the error that is raised already.
                let _ = self.end(&engine.state);
            }
            _ => self.end(&engine.state)?,
        }
        if matches!(event, Event::Terminate | Event::Completed) {
            let metrics = self.values.iter().filter(|(_, value)| matches!(value, Value::Metric));
            let missing = metrics.filter(|(name, _)| !engine.state.metrics.contains(name));
            let missing: Vec<_> = missing.map(|(name, _)| name.as_str()).collect();
            warn_of_missing("progress bar", &missing, engine);
        }
        Ok(())
    }
}

/// Decides when to draw, with as few readings of the clock as possible.
#[derive(Debug, Clone)]
struct Pace {
    period: Duration,
    drawn: Instant,
    /// Iterations from the last drawing to the next reading of the clock, and those left until then.
    next: u64,
    left: u64,
}

impl Pace {
    fn new(period: Duration) -> Self {
        Self { period, drawn: Instant::now(), next: 1, left: 1 }
    }

    #[inline]
    fn is_due(&mut self) -> bool {
        self.left -= 1;
        self.left == 0 && self.look(Instant::now())
    }

    fn look(&mut self, now: Instant) -> bool {
        let (seen, passed) = (self.next, now.saturating_duration_since(self.drawn));
        let is_due = passed >= self.period;
        let wait = if is_due { self.period } else { self.period - passed };
        // Looks no further ahead than it has seen, because the first iterations may be quick ones.
        let ahead = wait.as_secs_f64() / passed.as_secs_f64() * seen as f64;
        self.left = (ahead as u64).clamp(1, seen);
        match is_due {
            true => (self.drawn, self.next) = (now, self.left),
            false => self.next += self.left,
        }
        is_due
    }
}

fn title<B, O>(state: &State<B, O>) -> String {
    let by_iterations = state.max_iters.zip(state.epoch_length.filter(|length| *length > 0));
    let epochs = by_iterations.map(|(iterations, length)| iterations.div_ceil(length));
    match state.max_epochs.or(epochs) {
        Some(epochs) => format!("epoch {}/{epochs}", state.epoch),
        None => format!("epoch {}", state.epoch),
    }
}

/// A time such as `"0:07"` or `"1:02:03"`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

/// A number with this many significant digits.
fn number(value: f64, digits: i32) -> String {
    let size = value.abs();
    let exponent = if size.is_normal() { size.log10().floor() as i32 } else { 0 };
    let decimals = |exponent: i32| (digits - 1 - exponent).max(0) as usize;
    match exponent {
        -3..5 => format!("{value:.*}", decimals(exponent)),
        _ => format!("{value:.*e}", decimals(0)),
    }
}

fn without_zeros(number: &str) -> String {
    let (digits, exponent) = number.split_at(number.find('e').unwrap_or(number.len()));
    match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned() + exponent,
        false => number.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread::sleep;

    use anyhow::Result;
    use indicatif::InMemoryTerm;

    use super::*;
    use crate::data::restartable;
    use crate::engine::Until;
    use crate::handlers::Evaluate;
    use crate::metrics::{Mean, RunningAverage};

    fn on_screen(bar: ProgressBar) -> (InMemoryTerm, ProgressBar) {
        let screen = InMemoryTerm::new(20, 120);
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        (screen, bar.with_draw_target(target))
    }

    /// The lines, with times and rates replaced by `_`.
    fn without_times(screen: &InMemoryTerm) -> String {
        let contents = screen.contents();
        let word = |word: &str| match word {
            "s/it" => "it/s".to_owned(),
            clock if clock.contains(':') => "_".to_owned(),
            _ => word.to_owned(),
        };
        let line = |line: &str| {
            let mut words: Vec<_> = line.split_whitespace().map(word).collect();
            for rate in 1..words.len() {
                if ["it/s", "it/s,", "s"].contains(&words[rate].as_str()) {
                    words[rate - 1] = "_".into();
                }
            }
            words.join(" ")
        };
        contents.lines().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn shows_the_epoch_and_leaves_a_line() -> Result<()> {
        let knob = Knob::new("lr", || 0.01, |_| {});
        let bar = ProgressBar::new().metric("loss").metric("val/accuracy").knob("lr (base)", knob);
        let (screen, bar) = on_screen(bar);
        let mut trainer = Engine::new(|_: &mut (), _, loss: f64| {
            sleep(PERIOD);
            Ok(loss)
        });
        trainer.metric("loss", RunningAverage::new()).attach(bar.clone());
        let seen = screen.clone();
        trainer.on(Event::IterationCompleted, move |_, engine| {
            let bar = match engine.state.iteration {
                1 => "epoch 1/2 [======> ] 1/4 _ it/s, _ left loss 0.5000 lr (base) 0.01",
                3 => {
                    "epoch 1/2 [==================> ] 3/4 _ it/s, _ left loss 0.5000 lr (base) 0.01"
                }
                _ => return Ok(()),
            };
            assert_eq!(without_times(&seen), bar);
            Ok(())
        });
        let seen = screen.clone();
        trainer.on(Event::EpochCompleted.once(1), move |_, engine| {
            bar.suspend(|| assert_eq!(without_times(&seen), ""));
            let ended =
                "epoch 1/2 [========================] 4/4 _ it/s loss 0.5000 lr (base) 0.01";
            assert_eq!(without_times(&seen), ended);
            engine.state.metrics.set("val/accuracy", 0.975);
            Ok(())
        });
        trainer.run(&mut (), vec![0.5; 4], Until::epochs(2))?;
        let lines = "epoch 1/2 4/4 in _ s _ it/s loss 0.5000 val/accuracy 0.9750 lr (base) 0.01\n\
                     epoch 2/2 4/4 in _ s _ it/s loss 0.5000 val/accuracy 0.9750 lr (base) 0.01";
        assert_eq!(without_times(&screen), lines);
        Ok(())
    }

    #[test]
    fn counts_where_the_length_is_unknown() -> Result<()> {
        let (screen, bar) = on_screen(ProgressBar::new());
        let mut trainer = Engine::new(|_: &mut (), _, _: i32| {
            sleep(PERIOD);
            Ok(())
        });
        trainer.attach(bar);
        let seen = screen.clone();
        trainer.on(Event::IterationCompleted.once(2), move |_, _| {
            assert_eq!(without_times(&seen), "epoch 1/1 2 _ it/s");
            Ok(())
        });
        trainer.run(&mut (), restartable(|| 0..3), Until::epochs(1))?;
        assert_eq!(without_times(&screen), "epoch 1/1 3/3 in _ s _ it/s");
        Ok(())
    }

    #[test]
    fn a_run_that_fails_or_goes_on_in_mid_epoch_shows_where() -> Result<()> {
        let (screen, bar) = on_screen(ProgressBar::new());
        let mut trainer = Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, _>, _: i32| {
            anyhow::ensure!(engine.state.iteration != 6, "no");
            Ok(())
        });
        trainer.attach(bar);
        assert!(trainer.run(&mut (), vec![0; 4], Until::epochs(2)).is_err());
        trainer.on(Event::IterationCompleted.once(7), |_, engine| {
            engine.interrupt();
            Ok(())
        });
        trainer.run(&mut (), vec![0; 4], Until::epochs(2))?;
        trainer.run(&mut (), vec![0; 4], Until::epochs(2))?;
        let lines = "epoch 1/2 4/4 in _ s _ it/s\n\
                     epoch 2/2 1/4 in _ s _ it/s\n\
                     epoch 2/2 3/4 in _ s _ it/s\n\
                     epoch 2/2 4/4 in _ s _ it/s";
        assert_eq!(without_times(&screen), lines);
        Ok(())
    }

    #[test]
    fn nothing_is_read_where_nothing_is_shown() -> Result<()> {
        let knob = Knob::new("never read", || unreachable!(), |_| {});
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.metric("mean", Mean::new()).attach(ProgressBar::new().hidden().knob("lr", knob));
        trainer.run(&mut (), vec![1.; 10], Until::epochs(2))?;
        Ok(())
    }

    #[test]
    fn an_evaluator_has_its_bar_below() -> Result<()> {
        let (screen, bar) = on_screen(ProgressBar::new().metric("val/mean"));
        let mut evaluator = Engine::new(|_: &mut (), _, x: f64| {
            sleep(PERIOD);
            Ok(x)
        });
        evaluator.metric("mean", Mean::new()).attach(bar.child("val"));
        let seen = screen.clone();
        evaluator.on(Event::IterationCompleted.once(2), move |_, _| {
            let bars = "epoch 1/1 [========================] 2/2 _ it/s\n\
                        val [============> ] 2/4 _ it/s, _ left";
            assert_eq!(without_times(&seen), bars);
            Ok(())
        });
        let mut trainer = Engine::new(|_: &mut (), _, _: ()| Ok(()));
        trainer.attach(bar).attach(Evaluate::each_epoch("val", evaluator, vec![0.5; 4]));
        trainer.run(&mut (), vec![(); 2], Until::epochs(1))?;
        assert_eq!(without_times(&screen), "epoch 1/1 2/2 in _ s _ it/s val/mean 0.5000");
        Ok(())
    }

    #[test]
    fn where_there_is_no_terminal_there_are_lines() -> Result<()> {
        let lines = Arc::new(Mutex::new(vec![]));
        let log = lines.clone();
        let bar = ProgressBar::new()
            .metric("mean")
            .with_draw_target(ProgressDrawTarget::hidden())
            .lines_to(move |line| log.lock().unwrap().push(line.to_owned()));
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.attach(bar.clone()).metric("mean", Mean::new());
        trainer.attach(bar.child("val"));
        trainer.run(&mut (), vec![0.5; 10], Until::epochs(2))?;
        let lines = lines.lock().unwrap();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[1].starts_with("epoch 2/2  10/10 in ") && lines[1].ends_with("mean 0.5000"));
        Ok(())
    }

    #[test]
    fn the_clock_is_looked_at_seldom() {
        let each = Duration::from_micros(1);
        let mut pace = Pace::new(PERIOD);
        let (mut now, mut looks, mut drawings) = (pace.drawn, 0, 0);
        for _ in 0..10_000_000 {
            now += each;
            pace.left -= 1;
            if pace.left == 0 {
                looks += 1;
                drawings += u32::from(pace.look(now));
            }
        }
        assert!((95..=101).contains(&drawings) && looks < 150, "{drawings} {looks}");
    }

    #[test]
    fn numbers_and_times_are_short() {
        let values = [0., 0.123456, 12.3456, 123456., 4.5e-5, -0.5, f64::NAN, 1e-3, 99999.7];
        let texts = "0.000 0.1235 12.35 1.235e5 4.500e-5 -0.5000 NaN 0.001000 100000";
        assert_eq!(values.map(|value| number(value, 4)).join(" "), texts);
        assert_eq!(
            ["0.0100", "4.500e-5", "100", "0.0000"].map(without_zeros).join(" "),
            "0.01 4.5e-5 100 0"
        );
        assert_eq!([7, 3723].map(Duration::from_secs).map(clock).join(" "), "0:07 1:02:03");
    }
}
