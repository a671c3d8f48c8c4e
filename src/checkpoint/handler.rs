use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::filename::Parts;
use super::folder::{Claim, Folder, Owner, RetentionStamp};
use super::format::Stamp;
use super::retention::{Retention, Saved};
use super::score::{Mode, Score, Scoring};
use super::writer::{Job, Writer, both};
use super::{StateDict, Stateful};
use crate::engine::{Engine, Handler, HandlerSpec, Priority, Ranks, State};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event_filter::Events;
use crate::state::IntoStateful;

/// A handler that writes checkpoints of the engine's whole state: ignite's `Checkpoint`.
///
/// A checkpoint is one safetensors file with the result of [`Engine::checkpoint`]. The handler writes it under another
/// name, syncs it, renames it and syncs the folder before it removes an old one; so whatever happens, a folder that had
/// a whole checkpoint still has one. One process at a time may have the folder.
///
/// The handler keeps a list of its files. A process that is killed may leave files that the restored list lacks; when
/// the run goes on, the handler adopts those that carry the stamp of its run. On an evaluator the list goes on from one
/// evaluation to the next; the trainer's [`resume`](Engine::resume) ignores an evaluator's files.
///
/// The handler acts after all other handlers of its events ([`Priority::Save`]), so that the checkpoint holds the state
/// after them. The file `latest` in the folder holds the name of the newest checkpoint.
///
/// ```no_run
/// # use tch::{Device, nn};
/// # use tch_ignite::optim::Optimizer;
/// use tch_ignite::checkpoint::Checkpoint;
/// use tch_ignite::engine::{Engine, Event, Until};
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let optimizer = Optimizer::adam(&vs).build()?;
/// let mut trainer = Engine::new(|_: &mut (), _, batch: f64| Ok(batch));
/// trainer.track("model", &vs).track("optimizer", &optimizer);
/// trainer.attach(Checkpoint::new("runs/mnist").n_saved(3).on(Event::IterationCompleted.every(1000)));
/// trainer.resume(&mut (), "runs/mnist")?;
/// trainer.run(&mut (), vec![0.5; 100], Until::epochs(50))?;
/// # Ok::<(), tch_ignite::Error>(())
/// ```
///
/// Costs a write of all tensors to the disk in the training's thread, or with [`background`](Self::background) a copy
/// of them in host memory; other iterations cost nothing.
#[doc(alias = "ModelCheckpoint")]
#[doc(alias = "DiskSaver")]
#[must_use = "a handler is called only once it is attached: `Engine::attach`"]
pub struct Checkpoint<B, O> {
    folder: PathBuf,
    create_dir: bool,
    require_empty: bool,
    opened: Option<Arc<Folder>>,
    /// Held from the first event of a run to its end, so that no other handler writes the same files.
    claim: Option<Claim>,
    events: Events,
    every: Option<Duration>,
    /// When the last file was written, or the first run began.
    written: Option<Instant>,
    on_interrupt: bool,
    on_exception: bool,
    parts: Parts,
    pattern: Option<String>,
    global_step: Option<Event>,
    score: Option<Scoring<B, O>>,
    weights: Option<Box<dyn Stateful>>,
    list: Retention,
    /// Identifies the run that the files belong to, among the runs that used the folder.
    run: Option<u64>,
    /// Whether the list was loaded from a checkpoint and has yet to be compared with the folder.
    loaded: bool,
    background: bool,
    writer: Writer,
}

/// Events that end a run. The handler waits for its writer at these.
const ENDS: [Event; 4] =
    [Event::Terminate, Event::Completed, Event::ExceptionRaised, Event::Interrupt];
const EXT: &str = "safetensors";

impl<B, O> Checkpoint<B, O> {
    /// Writes the whole state into this folder at the end of each epoch, and keeps the newest file. A folder that is
    /// missing is made.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            create_dir: true,
            require_empty: false,
            opened: None,
            claim: None,
            events: Event::EpochCompleted.into(),
            every: None,
            written: None,
            on_interrupt: true,
            on_exception: false,
            parts: Parts { name: "checkpoint".into(), ext: EXT.into(), ..Parts::default() },
            pattern: None,
            global_step: None,
            score: None,
            weights: None,
            list: Retention::new(),
            run: None,
            loaded: false,
            background: false,
            writer: Writer::default(),
        }
    }

    /// Sets the events at which checkpoints are written.
    pub fn on(mut self, events: impl Into<Events>) -> Self {
        self.events = events.into();
        self
    }

    /// Writes only where at least this much time has passed since the last checkpoint, at the handler's events.
    pub fn every(mut self, time: Duration) -> Self {
        self.every = Some(time);
        self
    }

    /// Whether a checkpoint `interrupted.safetensors` is written when the run is interrupted; the default is true.
    /// [`InterruptOn`](crate::handlers::InterruptOn) interrupts the run on signals.
    pub fn on_interrupt(mut self, on: bool) -> Self {
        self.on_interrupt = on;
        self
    }

    /// Whether a checkpoint `emergency.safetensors` is written when the run fails in a step, a handler or the data; the
    /// default is false. A run that is resumed from it goes on after what failed.
    pub fn on_exception(mut self, on: bool) -> Self {
        self.on_exception = on;
        self
    }

    /// Sets how many files are kept: those with the largest score, or the newest where there is no score. The default
    /// is 1.
    pub fn n_saved(mut self, files: usize) -> Self {
        self.list.most = Some(files);
        self
    }

    /// Keeps all files.
    pub fn keep_all(mut self) -> Self {
        self.list.most = None;
        self
    }

    /// Keeps the files of the best values of a metric. The metric must have a value at the handler's events; NaN is
    /// never among the best. File names show the metric's own value.
    pub fn best(mut self, files: usize, metric: impl Into<String>, mode: Mode) -> Self {
        let metric = metric.into();
        let negated = mode == Mode::Min;
        let sign = if negated { -1. } else { 1. };
        let name = metric.replace('/', "_");
        self.list.most = Some(files);
        let of = Box::new(move |state: &State<B, O>| {
            Ok(Score::Float(sign * state.metrics.get(&metric)?))
        });
        self.score = Some(Scoring { name: Some(name), of, negated });
        self
    }

    /// Keeps the files of the largest scores, computed by a function of the engine's state: ignite's `score_function`.
    pub fn score_function<S: Into<Score>>(
        mut self,
        score: impl Fn(&State<B, O>) -> Result<S> + 'static,
    ) -> Self {
        let of = Box::new(move |state: &State<B, O>| score(state).map(Into::into));
        self.score = Some(Scoring { name: None, of, negated: false });
        self
    }

    /// Sets the name of the score in file names. Call this after [`score_function`](Self::score_function).
    pub fn score_name(mut self, name: impl Into<String>) -> Self {
        if let Some(score) = &mut self.score {
            score.name = Some(name.into());
        }
        self
    }

    /// Whether a file whose score equals the smallest one on the list replaces that one; the default is false.
    pub fn greater_or_equal(mut self, on: bool) -> Self {
        self.list.greater_or_equal = on;
        self
    }

    /// Sets a prefix for file names.
    pub fn filename_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.parts.filename_prefix = prefix.into();
        self
    }

    /// Sets the name in file names; the default is `"checkpoint"`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.parts.name = name.into();
        self
    }

    /// Sets the extension of file names; the default is `"safetensors"`.
    pub fn ext(mut self, ext: impl Into<String>) -> Self {
        self.parts.ext = ext.into();
        self
    }

    /// Sets the pattern of file names, such as `"{name}_{global_step}.{ext}"`; see
    /// [`setup_filename_pattern`](super::setup_filename_pattern) for the default. A wrong pattern is refused when the
    /// handler is attached.
    pub fn filename_pattern(mut self, pattern: impl Into<String>) -> Self {
        self.pattern = Some(pattern.into());
        self
    }

    /// Puts a step into file names that have a score: the epoch if `event` is an epoch event, otherwise the iteration.
    /// File names without a score always have a step, by default the iteration.
    pub fn global_step(mut self, event: Event) -> Self {
        self.global_step = Some(event);
        self
    }

    /// Writes only the weights of a model, as a plain safetensors file with PyTorch's names: ignite's
    /// `ModelCheckpoint`. A run cannot be resumed from such files. This sets the name in file names to `"model"`; call
    /// [`name`](Self::name) afterwards for another. Parameters of a Schedule-Free optimizer that the engine tracks are
    /// written with their values for evaluation.
    pub fn weights(mut self, model: impl IntoStateful<'static>) -> Self {
        self.weights = Some(model.into_stateful());
        self.name("model")
    }

    /// Writes in a thread of its own, from a copy of all tensors in host memory. There is at most one copy, so training
    /// waits where a checkpoint comes before the last one is written. An error comes out at the next checkpoint or at
    /// the end of the run, which waits for the last one.
    pub fn background(mut self, on: bool) -> Self {
        self.background = on;
        self
    }

    /// Whether a missing folder is made; the default is true.
    pub fn create_dir(mut self, on: bool) -> Self {
        self.create_dir = on;
        self
    }

    /// Whether a run that starts anew is refused where the folder has files with the handler's extension; the default
    /// is false.
    pub fn require_empty(mut self, on: bool) -> Self {
        self.require_empty = on;
        self
    }

    /// The file with the largest score, or the newest one where there is no score.
    pub fn last_checkpoint(&self) -> Option<PathBuf> {
        self.list.files().last().map(|saved| self.folder.join(&saved.name))
    }

    /// The files on the list with their scores or steps, the smallest first. Where smaller values of a metric are
    /// better, the score is the negative of the value. After a resume this is the saved list; when the run goes on,
    /// files that a killed process left are added.
    pub fn saved(&self) -> impl Iterator<Item = (f64, &str)> {
        self.list.files().iter().map(|saved| (saved.priority.as_f64(), saved.name.as_str()))
    }

    fn state(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        self.list.save(&mut state)?;
        state.set_value("run", self.run)?;
        Ok(state)
    }

    /// Opens and locks the folder, the first time.
    fn folder(&mut self) -> Result<Arc<Folder>> {
        if let Some(folder) = &self.opened {
            return Ok(folder.clone());
        }
        let folder = Folder::open(&self.folder, self.create_dir)?;
        Ok(self.opened.insert(folder).clone())
    }

    /// Prepares the list for a run; `anew` empties it.
    fn begin(&mut self, anew: bool) -> Result<()> {
        let folder = self.folder()?;
        if anew {
            self.list.clear();
        }
        if anew || self.run.is_none() {
            self.run = Some(folder.time());
        }
        if self.require_empty && anew {
            let ext = format!(".{}", self.parts.ext);
            let files: Vec<_> =
                folder.names()?.into_iter().filter(|name| name.ends_with(&ext)).collect();
            if !files.is_empty() {
                let files: Vec<_> = files.iter().map(|name| format!("'{name}'")).collect();
                return Err(Error::invalid(format!(
                    "Files [{}] with extension '{ext}' are already present in the directory {}. If you want to use this directory anyway, pass `require_empty=False`.",
                    files.join(", "),
                    self.folder.display()
                )));
            }
        }
        Ok(())
    }

    /// The file to write at this event; `None` where its score is too small.
    fn choose(&self, state: &State<B, O>) -> Result<Option<Saved>> {
        let score = self.score.as_ref().map(|score| (score.of)(state)).transpose()?;
        let step = match self.global_step {
            Some(Event::EpochStarted | Event::EpochCompleted) => state.epoch,
            _ => state.iteration,
        };
        let priority = score.unwrap_or(Score::Int(step as i64));
        if !self.list.takes(priority, score.is_some()) {
            return Ok(None);
        }
        let parts = Parts {
            score_name: self.score.as_ref().and_then(|score| score.name.clone()),
            score: self.score.as_ref().zip(score).map(|(scoring, score)| match scoring.negated {
                true => score.negated().to_string(),
                false => score.to_string(),
            }),
            global_step: (score.is_none() || self.global_step.is_some()).then_some(step),
            ..self.parts.clone()
        };
        let pattern = self.pattern.clone().map_or_else(|| parts.default_pattern(), Ok)?;
        Ok(Some(Saved { priority, name: parts.filled(&pattern)? }))
    }

    /// Distinguishes the handler's files from those of other handlers.
    fn identity(&self) -> String {
        let Parts { filename_prefix, name, ext, .. } = &self.parts;
        let score_name = self.score.as_ref().and_then(|score| score.name.as_deref());
        let (score, pattern) = (score_name.unwrap_or(""), self.pattern.as_deref().unwrap_or(""));
        format!("{filename_prefix}/{name}/{score}/{ext}/{pattern}")
    }

    fn owner(&self, run: u64) -> Owner {
        Owner { run, of: self.identity() }
    }

    /// The name of a file in which all numbers are 0.
    fn sample(&self) -> Result<String> {
        let parts = Parts {
            score: self.score.as_ref().map(|_| "0".into()),
            score_name: self.score.as_ref().and_then(|score| score.name.clone()),
            global_step: (self.score.is_none() || self.global_step.is_some()).then_some(0),
            ..self.parts.clone()
        };
        let pattern = self.pattern.clone().map_or_else(|| parts.default_pattern(), Ok)?;
        parts.filled(&pattern)
    }

    /// Makes the list agree with the folder: see [`Retention::reconcile`].
    fn reconcile(&mut self) -> Result<()> {
        let folder = self.folder()?;
        let Some(run) = self.run else {
            self.list.clear();
            return Ok(());
        };
        self.list.reconcile(&folder, &self.owner(run))
    }

    /// Writes a checkpoint if one is due and its score is good enough. Returns whether it did. The main rank decides
    /// and writes.
    fn write<C>(&mut self, cx: &C, engine: &Engine<'_, C, B, O>, due: bool) -> Result<bool> {
        let chosen = if due && engine.is_main() { self.choose(&engine.state)? } else { None };
        if !engine.as_main("whether to write a checkpoint", chosen.is_some())? {
            return Ok(false);
        }
        let Some(new) = chosen else { return self.contents(cx, engine).map(|_| true) };
        let folder = self.folder()?;
        let run = *self.run.get_or_insert_with(|| folder.time());
        let (name, score) = (new.name.clone(), new.priority.saved());
        let (owner, scored) = (self.owner(run), self.score.is_some());
        let kept = RetentionStamp { owner, name, score, scored };
        let kept = serde_json::to_string(&kept).map_err(|error| Error::State(error.to_string()))?;
        let stamp = Stamp { written: folder.time(), kept: Some(kept) };
        // The values for evaluation stay until the writer has copied or written the tensors.
        let _weights = match self.weights {
            Some(_) => engine.evaluation_weights(cx)?,
            None => vec![],
        };
        let before = self.list.clone();
        let remove = self.list.keep(new.clone());
        let written = self.contents(cx, engine).and_then(|(state, logs)| {
            let (plain, name, owner) = (self.weights.is_some(), new.name, self.owner(run));
            let job = Job { folder, state, plain, name, stamp, remove, owner };
            self.writer.submit(job, self.background).map(|()| logs)
        });
        match written {
            Ok(logs) => logs.map(|()| true),
            Err(error) => {
                // The old files are still there.
                self.list = before;
                both(Err(error), self.reconcile()).map(|()| true)
            }
        }
    }

    /// The state to write, and the error of logs that lack steps which the state has.
    fn contents<C>(&self, cx: &C, engine: &Engine<'_, C, B, O>) -> Result<(StateDict, Result<()>)> {
        match &self.weights {
            Some(model) => Ok((model.state_dict()?, Ok(()))),
            None => engine.checkpoint_of_all(cx, Some(self.state()?)),
        }
    }

    /// Writes a checkpoint that is not on the list. A handler of weights alone does not: a run could not be resumed
    /// from them, and another handler may use the name.
    fn write_named<C>(&mut self, name: &str, cx: &C, engine: &Engine<'_, C, B, O>) -> Result<()> {
        if self.weights.is_some() {
            return Ok(());
        }
        // An error of the background is returned only after this checkpoint is safe.
        let before = self.writer.wait();
        let written = self.contents(cx, engine).and_then(|(state, logs)| {
            if !engine.is_main() {
                return Ok(());
            }
            let folder = self.folder()?;
            let (name, owner) = (format!("{name}.{}", self.parts.ext), self.owner(0));
            let stamp = Stamp { written: folder.time(), kept: None };
            let job = Job { folder, state, plain: false, name, stamp, remove: vec![], owner };
            both(self.writer.submit(job, false), logs)
        });
        both(written, before)
    }
}

impl<C, B, O> Handler<C, B, O> for Checkpoint<B, O> {
    fn spec(&self) -> Result<HandlerSpec> {
        if self.list.most == Some(0) {
            return Err(Error::invalid(
                "n_saved must be a positive integer or None, got 0: so many files stay; keep_all() keeps all",
            ));
        }
        let (file, folder) = (self.sample()?, self.folder.display());
        let mut events = self.events.clone();
        for event in [Event::Started].into_iter().chain(ENDS) {
            if !events.names(event) {
                events = events | event;
            }
        }
        let name = if self.weights.is_some() { "model checkpoint" } else { "checkpoint" };
        let spec = HandlerSpec::new(name, events).priority(Priority::Save);
        let files = format!("Checkpoint with files such as '{file}' in {folder}");
        Ok(spec.ranks(Ranks::MainWithAll).unique_names([files]))
    }

    fn save_state(&self) -> Result<Option<StateDict>> {
        self.state().map(Some)
    }

    fn load_state(&mut self, state: StateDict) -> Result<()> {
        let mut list = self.list.clone();
        list.load(&state)?;
        (self.run, self.list) = (state.value("run")?, list);
        self.written.get_or_insert_with(Instant::now);
        // The list is compared with the folder only when the run goes on: by then the engine knows whether this is the
        // main rank, which locks the folder.
        self.loaded = true;
        Ok(())
    }

    fn call(
        &mut self,
        event: Event,
        cx: &mut C,
        engine: &mut Engine<'_, C, B, O>,
    ) -> anyhow::Result<()> {
        if self.claim.is_none() && engine.is_main() && !ENDS.contains(&event) {
            // Between two runs the folder may have been removed.
            self.opened = self.opened.take().filter(|folder| folder.check().is_ok());
            self.claim = Some(self.folder()?.claim(self.sample()?)?);
        }
        if self.loaded && engine.is_main() {
            // This locks the folder now, and not only at the first write.
            self.reconcile()?;
            self.loaded = false;
        }
        match event {
            Event::Started if engine.is_main() => {
                // An engine within another one starts again and again, so its list goes on.
                let goes_on = engine.is_nested() && self.run.is_some();
                self.begin(engine.state.iteration == 0 && !goes_on)?;
                if self.weights.is_none() && !engine.tracks_a_model() && !engine.is_nested() {
                    engine.warn(format!(
                        "the checkpoints in {} have no model and no optimizer, because none is tracked: a run that is resumed from them begins with fresh weights. Call Engine::track for each, or Checkpoint::weights for files of the weights alone",
                        self.folder.display()
                    ));
                }
                self.written.get_or_insert_with(Instant::now);
            }
            Event::ExceptionRaised if self.on_exception => {
                self.write_named("emergency", cx, engine)?;
            }
            Event::Interrupt if self.on_interrupt => self.write_named("interrupted", cx, engine)?,
            _ => {}
        }
        if self.events.names(event) {
            let since = self.written.map(|at| at.elapsed());
            let due = self.every.is_none_or(|time| since.is_none_or(|since| since >= time));
            if self.write(cx, engine, due)? {
                self.written = Some(Instant::now());
            }
        }
        if ENDS.contains(&event) {
            self.claim = None;
            if let Err(error) = self.writer.wait() {
                both(Err(error), self.reconcile())?;
            }
        }
        Ok(())
    }
}

impl<B, O> fmt::Debug for Checkpoint<B, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let saved: BTreeMap<_, _> =
            self.list.files().iter().map(|saved| (saved.name.as_str(), saved.priority)).collect();
        f.debug_struct("Checkpoint").field("folder", &self.folder).field("saved", &saved).finish()
    }
}
