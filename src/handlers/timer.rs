use std::time::{Duration, Instant};

use crate::engine::{Engine, Handler, HandlerSpec};
use crate::error::Result;
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::StateDict;

/// A stopwatch that is controlled by method calls or by events: ignite's `Timer`.
///
/// [`value`](Self::value) is the time that the timer ran, without pauses; a timer of the mean time divides it by the
/// number of [`step`](Self::step)s. A resumed run goes on counting. To read an attached timer, share it as
/// `Rc<RefCell<_>>`. Work on a GPU is measured only where something waits for it.
///
/// ```
/// use std::{cell::RefCell, rc::Rc, thread::sleep, time::Duration};
/// use tch_ignite::engine::{Engine, Event, Until};
/// use tch_ignite::handlers::Timer;
///
/// // The mean time of a step, without the fetching of data and without other handlers.
/// let timer = Timer::average()
///     .resume_on(Event::IterationStarted)
///     .pause_on(Event::IterationCompleted)
///     .step_on(Event::IterationCompleted);
/// let timer = Rc::new(RefCell::new(timer));
/// let mut trainer = Engine::new(|_: &mut (), _, _: ()| { sleep(Duration::from_millis(1)); Ok(()) });
/// trainer.attach(timer.clone());
/// trainer.run(&mut (), vec![(); 5], Until::epochs(1))?;
/// assert!(timer.borrow().value() >= Duration::from_millis(1) && timer.borrow().steps() == 5);
/// # Ok::<(), tch_ignite::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct Timer {
    average: bool,
    /// Time before `running`.
    total: Duration,
    running: Option<Instant>,
    steps: u64,
    start: Option<Event>,
    resume: Option<Event>,
    pause: Option<Event>,
    step: Option<Event>,
}

impl Default for Timer {
    fn default() -> Self {
        Self::new()
    }
}

impl Timer {
    /// A timer of the total time, running from now.
    pub fn new() -> Self {
        Self {
            average: false,
            total: Duration::ZERO,
            running: Some(Instant::now()),
            steps: 0,
            start: None,
            resume: None,
            pause: None,
            step: None,
        }
    }

    /// A timer of the mean time of a step, running from now.
    pub fn average() -> Self {
        Self { average: true, ..Self::new() }
    }

    /// Starts from zero at this event.
    pub fn start_on(mut self, event: Event) -> Self {
        self.start = Some(event);
        self
    }

    /// Goes on at this event. Where no event starts the timer, it stands still from [`Event::Started`] until then.
    pub fn resume_on(mut self, event: Event) -> Self {
        self.resume = Some(event);
        self
    }

    /// Pauses at this event.
    pub fn pause_on(mut self, event: Event) -> Self {
        self.pause = Some(event);
        self
    }

    /// Counts a step at this event.
    pub fn step_on(mut self, event: Event) -> Self {
        self.step = Some(event);
        self
    }

    /// Starts from zero.
    pub fn reset(&mut self) {
        (self.total, self.steps, self.running) = (Duration::ZERO, 0, Some(Instant::now()));
    }

    /// Stops the clock.
    pub fn pause(&mut self) {
        if let Some(since) = self.running.take() {
            self.total = self.total.saturating_add(since.elapsed());
        }
    }

    /// Lets the clock run on.
    pub fn resume(&mut self) {
        self.running.get_or_insert_with(Instant::now);
    }

    /// Counts a step.
    pub fn step(&mut self) {
        self.steps += 1;
    }

    /// Number of steps counted.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn total(&self) -> Duration {
        self.total.saturating_add(self.running.map_or(Duration::ZERO, |since| since.elapsed()))
    }

    /// The time that the timer ran. A timer of the mean time divides it by the number of steps, by 1 before the first.
    pub fn value(&self) -> Duration {
        let total = self.total();
        match self.average {
            true => total.div_f64(self.steps.max(1) as f64),
            false => total,
        }
    }
}

impl<C, B, O> Handler<C, B, O> for Timer {
    fn spec(&self) -> Result<HandlerSpec> {
        let given = [self.start, self.resume, self.pause, self.step];
        let mut events = vec![Event::Started];
        for event in given.into_iter().flatten() {
            if !events.contains(&event) {
                events.push(event);
            }
        }
        let events: Events = events.into_iter().map(Into::into).collect();
        Ok(HandlerSpec::new("timer", events))
    }

    /// The state is the time so far; the time between saving and loading does not count.
    fn save_state(&self) -> Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_value("total", self.total())?;
        state.set_value("running", self.running.is_some())?;
        state.set_value("steps", self.steps)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let (total, running) = (state.value("total")?, state.value::<bool>("running")?);
        self.steps = state.value("steps")?;
        (self.total, self.running) = (total, running.then(Instant::now));
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        _cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        let at = |given: Option<Event>| given == Some(event);
        let starts = self.start.unwrap_or(Event::Started);
        if event == starts && (self.start.is_some() || engine.state.iteration == 0) {
            self.reset();
            if self.start.is_none() && self.resume.is_some() {
                self.running = None;
            }
        }
        if at(self.pause) {
            self.pause();
        }
        if at(self.resume) {
            self.resume();
        }
        if at(self.step) {
            self.step();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    #[test]
    fn pauses_do_not_count() {
        let tick = Duration::from_millis(20);
        let mut timer = Timer::average();
        sleep(tick);
        timer.pause();
        let before = timer.value();
        sleep(tick);
        assert_eq!(timer.value(), before);
        timer.resume();
        sleep(tick);
        (0..4).for_each(|_| timer.step());
        assert!(timer.value() >= tick / 2 && timer.value() < before + tick);
        timer.reset();
        assert!(timer.steps() == 0 && timer.value() < tick);
    }
}
