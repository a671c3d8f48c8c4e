//! Runs a program by the engine, through the public interface, with its stops and resumes.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use signal_hook::consts::{SIGKILL, SIGTERM};
use tch::nn::{self, ModuleT, OptimizerConfig, VarStore};
use tch::{Device, Tensor};
use tch_ignite::WeightedLoss;
use tch_ignite::amp::GradScaler;
use tch_ignite::checkpoint::{Checkpoint, Mode, StateDict, read_state, write_state};
use tch_ignite::data::{
    Batch, IntoSource, Loader, SamplePosition, Source, one_shot, restartable, source,
};
use tch_ignite::engine::{
    Evaluator, Event, Events, Handler, HandlerSpec, Priority, Stop, Summary, Trainer, Until,
};
use tch_ignite::handlers::{
    EMAHandler, EarlyStopping, Evaluate, InterruptOn, SWAHandler, TimeLimit,
};
use tch_ignite::loggers::{JsonLinesLogger, OutputHandler};
use tch_ignite::metrics::{Mean, MeanSquaredError, RunningAverage};
use tch_ignite::optim::{GroupOptions, Knob, Optimizer, OptimizerBuilder, Sam, lr};
use tch_ignite::schedule::{
    AnySchedule, BatchSizeScheduler, ParamScheduler, PiecewiseLinear, ReduceLROnPlateauScheduler,
    StepLR,
};
use tch_ignite::supervised::{
    OPTIMIZER_STEPPED, Prediction, Supervised, create_supervised_trainer,
};

use super::compare::{Outcome, Trace, numbers};
use super::program::*;
use super::reference::{budgets, end};
use super::world;

/// The word with which the texts of planted errors and panics begin.
pub const PLANTED: &str = "planted";

/// A model whose parameters are tensors of a store.
struct Net {
    model: Model,
    parameters: Vec<Tensor>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.model)
    }
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, _train: bool) -> Tensor {
        world::forward(self.model, &self.parameters, x)
    }
}

type Cx = Supervised<Net>;
type Run<'a> = Trainer<'a, Cx>;

/// The breaks that are planted in a program, and which of them have happened.
#[derive(Clone)]
struct Plants {
    program: Arc<Program>,
    trace: Arc<Mutex<Trace>>,
    /// Which of the breaks that leave no trace have happened. A resume does not undo them.
    happened: Arc<Mutex<Vec<bool>>>,
    /// The folder to which `happened` is written, for the next process.
    folder: Option<PathBuf>,
    /// The breaks of this call of `run`.
    taken: Arc<Mutex<Vec<Break>>>,
}

impl Plants {
    /// Notes the position of the run.
    fn note(&self, event: Event, engine: &Run<'_>) {
        let mut trace = self.trace.lock().unwrap();
        match event {
            Event::GetBatchStarted => trace.fetching = true,
            Event::IterationStarted => (trace.fetching, trace.evaluations) = (false, 0),
            _ => {}
        }
        (trace.epoch, trace.iteration) = (engine.state.epoch, engine.state.iteration);
    }

    /// The break that is due here and now, which then counts as happened.
    fn take(&self, place: Place) -> Option<Break> {
        let mut trace = self.trace.lock().unwrap();
        let (epoch, iteration) = (trace.epoch, trace.iteration);
        for (index, planted) in self.program.breaks.iter().enumerate() {
            if !planted.is_due(place, epoch, iteration) {
                continue;
            }
            let happened = match planted.leaves_a_trace(&self.program) {
                true => std::mem::replace(&mut trace.happened[index], true),
                false => std::mem::replace(&mut self.happened.lock().unwrap()[index], true),
            };
            if !happened {
                self.taken.lock().unwrap().push(*planted);
                if let Some(folder) = &self.folder {
                    let happened = serde_json::to_string(&*self.happened.lock().unwrap());
                    std::fs::write(folder.join(HAPPENED), happened.unwrap()).unwrap();
                }
                return Some(*planted);
            }
        }
        None
    }
}

/// The text of an error, which says how the program goes on.
fn planted(then: Then) -> String {
    format!("{PLANTED}, then {then:?}")
}

/// Sends this thread a signal, which it has received when this returns.
fn signal(number: i32) {
    signal_hook::low_level::raise(number).unwrap();
}

impl Break {
    /// Makes the break happen where there is no engine to ask.
    fn happen(self) -> anyhow::Result<()> {
        match self.how {
            How::Error => anyhow::bail!(planted(self.then)),
            How::Panic => panic!("{}", planted(self.then)),
            How::Signal => signal(SIGTERM),
            How::Kill => signal(SIGKILL),
            _ => unreachable!("there is no engine to be asked"),
        }
        Ok(())
    }
}

/// A source that fails where a break is planted.
struct Faulty<'a>(Box<dyn Source<Batch> + 'a>, Plants);

impl Source<Batch> for Faulty<'_> {
    fn validate(&self) -> anyhow::Result<()> {
        self.0.validate()
    }

    fn batches(&self) -> Option<u64> {
        self.0.batches()
    }

    fn seek(&mut self, pass: u64, batch: u64) -> anyhow::Result<()> {
        self.0.seek(pass, batch)
    }

    fn next(&mut self) -> Option<anyhow::Result<Batch>> {
        let again = !self.1.trace.lock().unwrap().fetching;
        let place = if again { Place::Refetch } else { Place::Fetch };
        if let Some(planted) = self.1.take(place)
            && let Err(error) = planted.happen()
        {
            return Some(Err(error));
        }
        self.0.next()
    }

    fn samples(&self) -> Option<u64> {
        self.0.samples()
    }

    fn batches_left(&self) -> Option<u64> {
        self.0.batches_left()
    }

    fn is_random(&self) -> bool {
        self.0.is_random()
    }

    fn may_be_beyond_end(&self) -> bool {
        self.0.may_be_beyond_end()
    }

    fn sample_position(&self, again: bool) -> Option<SamplePosition> {
        self.0.sample_position(again)
    }

    fn seek_samples(&mut self, pass: u64, place: &SamplePosition) -> anyhow::Result<bool> {
        self.0.seek_samples(pass, place)
    }

    fn settings(&self) -> serde_json::Map<String, serde_json::Value> {
        self.0.settings()
    }
}

/// A source of a program's listed batches, which knows how many there are.
struct Listed {
    x: Tensor,
    y: Tensor,
    batches: Vec<Vec<i64>>,
    next: usize,
}

impl Source<Batch> for Listed {
    fn batches(&self) -> Option<u64> {
        Some(self.batches.len() as u64)
    }

    fn seek(&mut self, _pass: u64, batch: u64) -> anyhow::Result<()> {
        self.next = batch as usize;
        Ok(())
    }

    fn next(&mut self) -> Option<anyhow::Result<Batch>> {
        let batch = select(&self.x, &self.y, self.batches.get(self.next)?);
        self.next += 1;
        Some(Ok(batch))
    }
}

fn select(x: &Tensor, y: &Tensor, batch: &[i64]) -> Batch {
    let index = Tensor::from_slice(batch);
    (x.index_select(0, &index), y.index_select(0, &index))
}

/// The group of processes that train together.
#[cfg(feature = "distributed")]
type Group = tch_ignite::distributed::ProcessGroup;
/// Without the feature there is no group.
#[cfg(not(feature = "distributed"))]
type Group = std::convert::Infallible;

#[cfg(feature = "distributed")]
fn group(program: &Program) -> Option<Group> {
    use tch_ignite::distributed::ProcessGroupOptions;
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(60));
    (program.ranks > 1).then(|| Group::from_env(options).unwrap())
}
#[cfg(not(feature = "distributed"))]
fn group(_: &Program) -> Option<Group> {
    None
}

/// Gives a loader this rank's share of the samples.
#[cfg(feature = "distributed")]
fn share(loader: Loader, samples: usize, seed: Option<u64>, uneven: bool, pg: &Group) -> Loader {
    let sampler = tch_ignite::data::DistributedSampler::of_group(samples, pg).unwrap();
    let sampler = sampler.uneven(uneven).unwrap();
    loader.sampler(match seed {
        Some(seed) => sampler.shuffle(seed),
        None => sampler,
    })
}
#[cfg(not(feature = "distributed"))]
fn share(_: Loader, _: usize, _: Option<u64>, _: bool, pg: &Group) -> Loader {
    match *pg {}
}

fn loader(program: &Program, life: usize, pg: Option<&Group>) -> Option<Loader> {
    let Data::Loader { batch, shuffle, drop_last } = &program.data else { return None };
    let (x, y) = world::samples(program.samples, program.seed);
    let batch = program.batch_after_resume.filter(|_| life > 0).unwrap_or(*batch);
    let loader = Loader::new(&x, &y, batch).unwrap().drop_last(*drop_last);
    Some(match (pg, shuffle) {
        (Some(pg), _) => share(loader, program.samples, *shuffle, false, pg),
        (None, Some(seed)) => loader.shuffle(*seed),
        (None, None) => loader,
    })
}

fn data<'a>(
    program: &Program,
    loader: Option<&Loader>,
    plants: &Plants,
) -> impl IntoSource<'a, Batch> + use<'a> {
    let (x, y) = world::samples(program.samples, program.seed);
    let batches = world::listed(program);
    let inner: Box<dyn Source<Batch>> = match (&program.data, loader) {
        (_, Some(loader)) => loader.into_source(),
        (Data::Restartable(_), _) => restartable(move || {
            let (x, y) = (x.shallow_clone(), y.shallow_clone());
            batches.clone().into_iter().map(move |batch| select(&x, &y, &batch))
        })
        .into_source(),
        (Data::Stream(_), _) => {
            let all = batches.into_iter().cycle();
            one_shot(all.map(move |batch| select(&x, &y, &batch))).into_source()
        }
        _ => Box::new(Listed { x, y, batches, next: 0 }),
    };
    source(Faulty(inner, plants.clone()))
}

fn store(program: &Program) -> (VarStore, Net) {
    let vs = VarStore::new(Device::Cpu);
    let mut tensors: Vec<Tensor> = vec![];
    let named = world::parameters(program.model, program.seed);
    for (index, (name, value)) in named.iter().enumerate() {
        let (module, name) = name.split_once('.').unwrap();
        let same = named[..index].iter().position(|(_, v)| v.data_ptr() == value.data_ptr());
        let tensor = match same {
            Some(same) => tensors[same].shallow_clone(),
            None => value.copy().set_requires_grad(true),
        };
        tensors.push((vs.root() / module).add(name, tensor, true));
    }
    (vs, Net { model: program.model, parameters: tensors })
}

fn optimizer(program: &Program, vs: &VarStore) -> Optimizer {
    fn finish<T: OptimizerConfig>(
        builder: OptimizerBuilder<'_, T>,
        program: &Program,
    ) -> Optimizer {
        let builder = builder.lr(program.lr);
        let Some(lr_of_biases) = program.lr_of_biases else { return builder.build().unwrap() };
        let of_biases = match program.optimizer {
            Algorithm::Muon { weight_decay, .. } => {
                GroupOptions::adamw().weight_decay(weight_decay).lr(lr_of_biases)
            }
            Algorithm::SparseAdam { .. } => GroupOptions::adamw().weight_decay(0.).lr(lr_of_biases),
            _ => lr(lr_of_biases),
        };
        builder
            .group("weights", |name| !world::is_bias(name), lr(program.lr))
            .group("biases", world::is_bias, of_biases)
            .build()
            .unwrap()
    }
    match program.optimizer {
        Algorithm::Sgd { momentum, dampening, weight_decay, nesterov } => finish(
            Optimizer::builder(nn::sgd(momentum, dampening, weight_decay, nesterov), vs),
            program,
        ),
        Algorithm::Adam { beta1, beta2, weight_decay, amsgrad } => {
            let config = nn::Adam { beta1, beta2, wd: weight_decay, eps: 1e-8, amsgrad };
            finish(Optimizer::builder(config, vs), program)
        }
        Algorithm::AdamW { beta1, beta2, weight_decay, amsgrad } => {
            let config = nn::AdamW { beta1, beta2, wd: weight_decay, eps: 1e-8, amsgrad };
            finish(Optimizer::builder(config, vs), program)
        }
        Algorithm::RmsProp { alpha, momentum, weight_decay, centered } => {
            let config = nn::RmsProp { alpha, eps: 1e-8, wd: weight_decay, momentum, centered };
            finish(Optimizer::builder(config, vs), program)
        }
        Algorithm::Adagrad { lr_decay, weight_decay, initial } => {
            let builder = Optimizer::adagrad(vs).lr_decay(lr_decay).weight_decay(weight_decay);
            let builder = builder.initial_accumulator_value(initial);
            finish(builder, program)
        }
        Algorithm::NAdam { beta1, beta2, weight_decay, decoupled } => {
            let builder = Optimizer::nadam(vs).betas(beta1, beta2).weight_decay(weight_decay);
            let builder = builder.decoupled_weight_decay(decoupled);
            finish(builder, program)
        }
        Algorithm::RAdam { beta1, beta2, weight_decay, decoupled } => {
            let builder = Optimizer::radam(vs).betas(beta1, beta2).weight_decay(weight_decay);
            let builder = builder.decoupled_weight_decay(decoupled);
            finish(builder, program)
        }
        Algorithm::Adamax { beta1, beta2, weight_decay } => {
            let builder = Optimizer::adamax(vs).betas(beta1, beta2).weight_decay(weight_decay);
            finish(builder, program)
        }
        Algorithm::Adadelta { rho, weight_decay } => {
            let builder = Optimizer::adadelta(vs).rho(rho).weight_decay(weight_decay);
            finish(builder, program)
        }
        Algorithm::Asgd { lambd, t0, weight_decay } => {
            let builder = Optimizer::asgd(vs).lambd(lambd).t0(t0).weight_decay(weight_decay);
            finish(builder, program)
        }
        Algorithm::Rprop => finish(Optimizer::rprop(vs), program),
        Algorithm::Adafactor { d, weight_decay } => {
            finish(Optimizer::adafactor(vs).d(d).weight_decay(weight_decay), program)
        }
        Algorithm::Muon { nesterov, weight_decay } => {
            let builder = Optimizer::muon(vs).nesterov(nesterov).weight_decay(weight_decay);
            // These coefficients of the iteration leave the matrix as it is. Its arithmetic in bf16 has golden cases, and
            // the textbook's would round otherwise.
            finish(builder.ns_coefficients(1., 0., 0.), program)
        }
        Algorithm::SparseAdam { beta1, beta2 } => {
            finish(Optimizer::sparse_adam(vs).betas(beta1, beta2), program)
        }
        Algorithm::Lion { beta1, beta2, weight_decay } => {
            let builder = Optimizer::lion(vs).betas(beta1, beta2).weight_decay(weight_decay);
            finish(builder, program)
        }
        Algorithm::AdEMAMix { beta1, beta2, weight_decay, warmup } => {
            let builder =
                Optimizer::ademamix(vs).betas(beta1, beta2).beta3(0.99).weight_decay(weight_decay);
            let builder = builder.alpha_warmup(warmup).beta3_warmup(warmup);
            finish(builder, program)
        }
        Algorithm::SgdScheduleFree { momentum, weight_decay, warmup, r } => {
            let builder =
                Optimizer::sgd_schedule_free(vs).momentum(momentum).weight_decay(weight_decay);
            let builder = builder.warmup_steps(warmup).r(r);
            finish(builder, program)
        }
        Algorithm::AdamWScheduleFree { beta1, beta2, weight_decay, warmup } => {
            let builder =
                Optimizer::adamw_schedule_free(vs).betas(beta1, beta2).weight_decay(weight_decay);
            let builder = builder.warmup_steps(warmup);
            finish(builder, program)
        }
        Algorithm::Lbfgs { max_iter, history } => {
            finish(Optimizer::lbfgs(vs).max_iter(max_iter).history_size(history), program)
        }
    }
}

impl Shape {
    fn schedule(&self) -> AnySchedule {
        match self {
            Shape::Lines(points) => PiecewiseLinear::new(points.clone()).into(),
            Shape::Steps { base, size, gamma } => StepLR::new(*base, *size).gamma(*gamma).into(),
        }
    }
}

impl Scheduled {
    fn knob(&self, optimizer: &Optimizer, ema: Option<&EMAHandler>, sam: Option<&Sam>) -> Knob {
        let hyper = match self.knob {
            Driven::EmaMomentum => return ema.unwrap().knob(),
            Driven::Rho => return sam.unwrap().knob(),
            Driven::LrOf(group) => {
                return optimizer.group_at(group).unwrap().knob("lr").unwrap();
            }
            Driven::Lr => "lr",
            Driven::WeightDecay => "weight_decay",
            Driven::Momentum => {
                return optimizer.knob("beta1").or(optimizer.knob("momentum")).unwrap();
            }
        };
        optimizer.knob(hyper).unwrap()
    }
}

/// A handler that records the state after all other handlers of an event.
struct Recorder {
    trace: Arc<Mutex<Trace>>,
    vs: VarStore,
    ema: Option<EMAHandler>,
    swa: Option<SWAHandler>,
    scaler: Option<GradScaler>,
    /// Whether several ranks train together. The recorded loss is then the mean of the losses of all ranks.
    several_ranks: bool,
}

impl Handler<Cx, Batch, Tensor> for Recorder {
    fn spec(&self) -> tch_ignite::Result<HandlerSpec> {
        let events: Events = world::RECORDED.iter().map(|at| at.event().into()).collect();
        Ok(HandlerSpec::new("recorder", events).priority(Priority::Last))
    }

    fn call(&mut self, event: Event, _cx: &mut Cx, engine: &mut Run<'_>) -> anyhow::Result<()> {
        let at = world::RECORDED.into_iter().find(|at| at.event() == event).unwrap();
        let state = &engine.state;
        let metric = |name: &str| state.metrics.get(name).unwrap_or(f64::NAN);
        let mut values = vec![
            ("epoch and iteration", vec![state.epoch as f64, state.iteration as f64]),
            ("weights", variables(&self.vs)),
        ];
        if at == At::IterationCompleted {
            let loss = match self.several_ranks {
                true => vec![metric("loss of all ranks")],
                false => numbers(&state.output),
            };
            values.push(("loss", loss));
            values.push(("running loss", vec![metric("running")]));
        }
        if at == At::EpochCompleted {
            values.push(("mean loss", vec![metric("loss")]));
            if let Some(loss) = &state.output
                && !self.several_ranks
            {
                values.push(("last loss", numbers([loss])));
            }
        }
        values.push(("error of the evaluation", vec![metric("val/error")]));
        if let Some(ema) = &self.ema {
            values.push(("moving average", averages(ema.averages())));
        }
        if let Some(swa) = &self.swa {
            values.push(("plain average", averages(swa.averages())));
        }
        if let Some(scaler) = &self.scaler {
            values.push(("scale", vec![scaler.get_scale()?]));
        }
        let number = if at.is_of_epochs() { state.epoch } else { state.iteration };
        self.trace.lock().unwrap().record(format!("{at:?}"), number, values);
        Ok(())
    }
}

fn variables(vs: &VarStore) -> Vec<f64> {
    averages(vs.variables().into_iter().collect())
}

fn averages(mut named: Vec<(String, Tensor)>) -> Vec<f64> {
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    numbers(named.iter().map(|(_, tensor)| tensor))
}

/// An engine with everything that the program asks for.
struct Built<'a> {
    trainer: Run<'a>,
    cx: Cx,
    /// The loader, if the data has one; its batch size may change.
    loader: Option<Loader>,
}

fn build<'a>(program: &Program, life: usize, plants: &Plants, folder: &Path) -> Built<'a> {
    let pg = group(program);
    let (vs, net) = store(program);
    let parameters: Vec<_> = net.parameters.iter().map(Tensor::shallow_clone).collect();
    let optimizer = optimizer(program, &vs);
    let scaler = program.scaler.as_ref().map(|scaler| {
        let new = GradScaler::new().init_scale(scaler.scale).unwrap();
        new.growth(2., 0.5, scaler.interval).unwrap()
    });
    let mut trainer: Run<'a> = create_supervised_trainer();
    #[cfg(feature = "distributed")]
    if let Some(pg) = &pg {
        trainer.distributed(pg).agree_every(1);
        let each = tch_ignite::metrics::Usage::BatchWise;
        trainer.metric_with("loss of all ranks", Mean::new(), each);
    }

    for event in
        [Event::Started, Event::EpochStarted, Event::GetBatchStarted, Event::IterationStarted]
    {
        let now = plants.clone();
        trainer.on(event, move |_, engine| {
            now.note(event, engine);
            Ok(())
        });
    }
    trainer.metric("loss", Mean::new()).metric("running", RunningAverage::new().alpha(0.9));

    let (trace, rates) = (plants.trace.clone(), optimizer.clone());
    trainer.on(OPTIMIZER_STEPPED, move |cx, engine| {
        let groups = rates.groups()?;
        let (weights, biases) = (&groups[0], groups.last().unwrap());
        // Some have neither.
        let momentum = weights.get("beta1").or(weights.get("momentum")).unwrap_or(0.);
        let mut values = vec![
            ("rates", vec![weights.lr()?, biases.lr()?]),
            ("weight decay", vec![weights.weight_decay().unwrap_or(0.)]),
            ("momentum", vec![momentum]),
        ];
        values.extend(cx.grad_norm().map(|norm| ("norm", numbers([norm]))));
        let iteration = engine.state.iteration;
        trace.lock().unwrap().record("update in iteration", iteration, values);
        Ok(())
    });

    if let Some(frozen) = program.frozen {
        let named = world::parameters(program.model, 0);
        let group: Vec<_> = named
            .iter()
            .zip(&parameters)
            .filter(|((name, _), _)| world::is_bias(name) == frozen.biases)
            .map(|(_, tensor)| tensor.shallow_clone())
            .collect();
        trainer.on(Event::IterationStarted, move |_, engine| {
            let now = (frozen.from..frozen.until).contains(&engine.state.iteration);
            group.iter().for_each(|tensor| drop(tensor.set_requires_grad(!now)));
            Ok(())
        });
    }
    let ema = program.ema.map(|ema| {
        let mut handler = EMAHandler::new(&vs, ema.momentum).unwrap();
        if let Some((from, updates)) = ema.warmup {
            handler = handler.warmup(from, updates).unwrap();
        }
        match ema.on {
            Some(on) => handler.on(on.events()),
            None => handler,
        }
    });
    let sam = program.sam.map(|Sharpness { rho, adaptive }| {
        let sam = Sam::new(&optimizer).rho(rho).unwrap();
        if adaptive { sam.adaptive() } else { sam }
    });
    for (index, scheduled) in program.schedules.iter().enumerate() {
        let knob = scheduled.knob(&optimizer, ema.as_ref(), sam.as_ref());
        let scheduler =
            ParamScheduler::new(format!("schedule {index}"), knob, scheduled.shape.schedule());
        trainer.attach(scheduler.on(scheduled.on.events()));
    }
    let loader = loader(program, life, pg.as_ref());
    if let (Some(loader), Some(sizes)) = (&loader, &program.batch_sizes) {
        trainer.attach(BatchSizeScheduler::new(loader, sizes.schedule()));
    }
    trainer.track("model", &vs).track("optimizer", &optimizer);
    trainer.track("trace", plants.trace.clone());
    if let Some(ema) = &ema {
        trainer.attach(ema.clone());
    }
    let swa = program.swa.map(|on| SWAHandler::new(&vs).unwrap().on(on.events()));
    if let Some(swa) = &swa {
        trainer.attach(swa.clone());
    }
    if let Some(evaluation) = program.evaluation {
        let plants = plants.clone();
        let mut evaluator = Evaluator::new(move |cx: &mut Cx, _: &mut Evaluator<'_, Cx>, batch| {
            if let Some(planted) = plants.take(Place::InTheEvaluation) {
                planted.happen()?;
            }
            cx.eval_step(batch)
        });
        evaluator.metric("error", MeanSquaredError::of(Prediction::parts));
        let (x, y) = world::samples(4, program.seed + 1);
        let mut loader = Loader::new(&x, &y, 3).unwrap();
        if let Some(pg) = &pg {
            loader = share(loader, 4, None, true, pg);
        }
        let evaluate = Evaluate::on(evaluation.on.events(), "val", evaluator, loader);
        match &ema {
            Some(ema) if evaluation.averages => trainer.attach(ema.with_averages(evaluate)),
            _ => trainer.attach(evaluate),
        };
    }
    let metric = |watch| match watch {
        Watch::MeanLoss => "loss",
        Watch::Validation => "val/error",
    };
    if let Some(plateau) = program.plateau {
        let knob = optimizer.knob("lr").unwrap();
        let scheduler =
            ReduceLROnPlateauScheduler::min("plateau", knob, metric(plateau.watch)).unwrap();
        trainer.attach(
            scheduler
                .factor(plateau.factor)
                .patience(plateau.patience)
                .cooldown(plateau.cooldown)
                .on(program.watched_on(plateau.watch).events()),
        );
    }
    if let Some(stop) = program.early_stopping {
        let on = program.watched_on(stop.watch).events();
        trainer.attach(EarlyStopping::min(metric(stop.watch), stop.patience).on(on));
    }
    for at in places_in_handlers(program) {
        let plants = plants.clone();
        trainer.on(at.event(), move |cx, engine| {
            plants.note(at.event(), engine);
            while let Some(planted) = plants.take(Place::In(at)) {
                match planted.how {
                    How::Interrupt => engine.interrupt(),
                    How::EndOfEpoch => engine.terminate_epoch(),
                    How::End => engine.terminate(),
                    How::Limit => {
                        let mut limit = TimeLimit::new(Duration::from_nanos(1))?;
                        std::thread::sleep(Duration::from_micros(1));
                        limit.call(at.event(), cx, engine)?;
                    }
                    _ => planted.happen()?,
                }
            }
            Ok(())
        });
    }
    if program.breaks.iter().any(|planted| planted.how == How::Signal) {
        trainer.attach(InterruptOn::signals().unwrap());
    }
    trainer.attach(Recorder {
        trace: plants.trace.clone(),
        vs: clone_of(&vs),
        ema: ema.clone(),
        swa,
        scaler: scaler.clone(),
        several_ranks: pg.is_some(),
    });
    if let Some(on) = program.log {
        let logger = JsonLinesLogger::open(folder.join("log.jsonl")).unwrap();
        trainer.attach(
            OutputHandler::new(&logger, "", on.events())
                .output("loss", |loss: &Tensor| loss.shallow_clone())
                .knob("lr", optimizer.knob("lr").unwrap()),
        );
    }
    let checkpoint = Checkpoint::new(folder.join("checkpoints")).n_saved(2);
    let checkpoint = checkpoint.on_exception(program.on_exception);
    trainer.attach(checkpoint.on(program.checkpoint.events()).background(program.background));
    if program.best {
        let best = Checkpoint::new(folder.join("checkpoints")).weights(&vs);
        trainer.attach(best.best(2, "loss", Mode::Min).global_step(Event::EpochCompleted));
    }

    let (of_loss, settings) = (plants.clone(), program.clone());
    let loss = move |prediction: &Tensor, y: &Tensor| {
        let evaluation = {
            let mut trace = of_loss.trace.lock().unwrap();
            trace.evaluations += 1;
            trace.evaluations
        };
        if let Some(planted) = of_loss.take(Place::InTheLoss(evaluation)) {
            tch::no_grad(|| planted.happen().unwrap());
        }
        let (mut loss, weight) = world::loss(&settings, prediction, y);
        if settings.noise {
            loss = &loss * world::noise();
        }
        if world::overflows(&settings, of_loss.trace.lock().unwrap().iteration) {
            loss = &loss * f64::INFINITY;
        }
        match settings.weights {
            Weights::BySamples | Weights::Equally => WeightedLoss::from(loss),
            Weights::ByTokens => (loss, numbers([&weight])[0]).into(),
            Weights::ByTokensInATensor => (loss, weight).into(),
        }
    };
    let mut cx = Supervised::new(net, optimizer, loss);
    #[cfg(feature = "distributed")]
    if let Some(pg) = &pg {
        use tch_ignite::distributed::{DdpOptions, DistributedDataParallel};
        cx = cx.data_parallel(DistributedDataParallel::new(pg, &vs, DdpOptions::new()).unwrap());
    }
    if program.accumulate > 1 {
        cx = cx.accumulate(program.accumulate).unwrap();
    }
    if program.weights == Weights::Equally {
        cx = cx.equal_weights();
    }
    if let Some(scaler) = scaler {
        cx = cx.grad_scaler(scaler);
    }
    if let Some(sam) = sam {
        cx = cx.sam(sam);
    }
    if let Some(max) = program.clip_value {
        cx = cx.clip_grad_value(max);
    }
    if let Some(max) = program.clip_norm {
        cx = cx.clip_grad_norm(max);
    }
    Built { trainer, cx, loader }
}

/// Another store that shares the variables.
fn clone_of(vs: &VarStore) -> VarStore {
    let mut clone = VarStore::new(vs.device());
    clone.variables_ = vs.variables_.clone();
    clone
}

fn places_in_handlers(program: &Program) -> Vec<At> {
    let mut places = vec![];
    for planted in &program.breaks {
        if let Place::In(at) = planted.place
            && !places.contains(&at)
        {
            places.push(at);
        }
    }
    places
}

fn until(program: &Program, budget: Budget) -> Until {
    let until = match budget {
        Budget::Epochs(epochs) => Until::epochs(epochs),
        Budget::Iterations(iterations) => Until::iterations(iterations),
        Budget::Samples(samples) => Until::samples(samples),
    };
    match program.epoch_length {
        Some(length) => until.epoch_length(length),
        None => until,
    }
}

/// Files through which the processes of a program pass on the program, and which breaks have happened.
const PROGRAM: &str = "program.json";
const HAPPENED: &str = "happened.json";
/// This variable says how many engines ran before.
const LIFE: &str = "SEAMS_LIFE";
/// This file has the iteration at which an engine went on.
const RESUMED: &str = "resumed";
const ENDED: &str = "ended.safetensors";
/// This variable names the folder of the program whose engine this process is to run.
const FOLDER: &str = "SEAMS_FOLDER";
/// The test by which a process runs one engine.
const CHILD: &str = "one_engine_of_a_program";

/// Runs the program to its end, with all its breaks.
pub fn run(program: &Program, folder: &Path) -> Outcome {
    let mut happened = vec![false; program.breaks.len()];
    if program.processes {
        std::fs::write(folder.join(PROGRAM), serde_json::to_string(program).unwrap()).unwrap();
        std::fs::write(folder.join(HAPPENED), serde_json::to_string(&happened).unwrap()).unwrap();
    }
    tch::manual_seed(program.seed as i64);
    let (mut once_more, mut other_size_after) = (program.resumed_at_the_end, None);
    // Each break makes at most one new engine and one more call of `run`.
    for life in 0..2 * program.breaks.len() + 3 {
        let ended = match program.processes {
            true => in_a_process(program, life, folder),
            false => in_this_process(program, life, &mut happened, None, folder),
        };
        if life > 0 {
            let resumed = std::fs::read_to_string(folder.join(RESUMED)).unwrap_or_default();
            let at = resumed.parse().unwrap_or(0);
            other_size_after = Some(other_size_after.map_or(at, |before: u64| before.min(at)));
        }
        match ended {
            Some(outcome) if !std::mem::take(&mut once_more) => {
                let (log, best) = (read_log(folder), best(folder));
                return Outcome { log, best, other_size_after, ..outcome };
            }
            _ => reseed(program, folder),
        }
    }
    Outcome { end: "it never ends".into(), ..Outcome::default() }
}

/// The names of the files of the best epochs.
fn best(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder.join("checkpoints")).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("model")).collect();
    names.sort();
    names
}

/// Seeds the random numbers. A resumed run gets its random numbers from the checkpoint, so its seed must not matter;
/// without a checkpoint the program starts anew.
fn reseed(program: &Program, folder: &Path) {
    let resumes = folder.join("checkpoints/latest").exists();
    tch::manual_seed(if resumes { -1 } else { program.seed as i64 });
}

/// Runs one engine in another process, or one in each of several processes; `None` if the next engine is to go on.
fn in_a_process(program: &Program, life: usize, folder: &Path) -> Option<Outcome> {
    let ended = folder.join(ENDED);
    let _ = std::fs::remove_file(&ended);
    let signals = program.breaks.iter().filter(|planted| planted.how == How::Signal).count();
    let (code, said) = start(program.ranks, life, folder);
    match read_state(&ended) {
        Ok(state) => state.value("ended").unwrap(),
        Err(_) if code == 128 + 9 => None,
        // A second signal ends a process at once.
        Err(_) if code == 128 + 15 && signals > 1 => None,
        Err(_) => {
            Some(Outcome { end: format!("it ended with {code}: {said}"), ..Outcome::default() })
        }
    }
}

const ARGUMENTS: [&str; 5] = ["--exact", CHILD, "--ignored", "--nocapture", "--test-threads=1"];

/// Starts these processes, and returns their exit code and their output.
fn start(ranks: usize, life: usize, folder: &Path) -> (i32, String) {
    #[cfg(feature = "distributed")]
    if ranks > 1 {
        let logs = folder.join("logs");
        let launch = tch_ignite::distributed::launch::Launch::new(ranks).unwrap();
        let launch =
            launch.args(ARGUMENTS).env(FOLDER, folder).env(LIFE, life.to_string()).logs(&logs);
        let ended = launch.grace(Duration::from_secs(1)).run().unwrap();
        let log = |rank| std::fs::read_to_string(logs.join(format!("rank-{rank}.log")));
        let said = (0..ranks).map(|rank| log(rank).unwrap_or_default()).collect();
        return (ended.code().into(), said);
    }
    assert_eq!(ranks, 1);
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output =
        child.args(ARGUMENTS).env(FOLDER, folder).env(LIFE, life.to_string()).output().unwrap();
    let code = output.status.signal().map_or_else(|| output.status.code(), |n| Some(128 + n));
    (code.unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into())
}

/// Runs one engine, in a process that `start` has started.
pub fn child() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let program: Program = serde_json::from_str(&read(PROGRAM)).unwrap();
    let mut happened: Vec<bool> = serde_json::from_str(&read(HAPPENED)).unwrap();
    let life = std::env::var(LIFE).unwrap().parse().unwrap();
    tch::set_num_threads(1);
    reseed(&program, &folder);
    let ended = in_this_process(&program, life, &mut happened, Some(&folder), &folder);
    if std::env::var("RANK").is_ok_and(|rank| rank != "0") {
        return;
    }
    // The outcome is written as a state, because JSON itself has no infinities.
    let mut state = StateDict::new();
    state.set_value("ended", &ended).unwrap();
    write_state(folder.join(ENDED), &state).unwrap();
}

/// Runs one engine in this process; `None` if the next engine is to go on.
fn in_this_process(
    program: &Program,
    life: usize,
    happened: &mut Vec<bool>,
    shared: Option<&Path>,
    folder: &Path,
) -> Option<Outcome> {
    let trace = Trace { happened: vec![false; program.breaks.len()], ..Trace::default() };
    let plants = Plants {
        program: Arc::new(program.clone()),
        trace: Arc::new(Mutex::new(trace)),
        happened: Arc::new(Mutex::new(happened.clone())),
        folder: shared.map(Path::to_owned),
        taken: Arc::default(),
    };
    let ended = live(program, life, &plants, folder);
    happened.clone_from(&plants.happened.lock().unwrap());
    match ended {
        Ended::Resumes => None,
        Ended::Done(end) => {
            let trace = plants.trace.lock().unwrap().records.clone();
            Some(Outcome { trace, end, ..Outcome::default() })
        }
    }
}

enum Ended {
    Done(String),
    Resumes,
}

/// Runs one engine from the newest checkpoint on.
fn live(program: &Program, life: usize, plants: &Plants, folder: &Path) -> Ended {
    let Built { mut trainer, mut cx, loader } = build(program, life, plants, folder);
    match trainer.resume(&mut cx, folder.join("checkpoints")) {
        Ok(resumed) => {
            let at = resumed.map_or(0, |resumed| resumed.iteration);
            std::fs::write(folder.join(RESUMED), at.to_string()).unwrap();
        }
        Err(error) => return Ended::Done(format!("resume failed: {error}")),
    }
    let budgets = budgets(program);
    for _ in 0..2 * program.breaks.len() + 4 {
        plants.taken.lock().unwrap().clear();
        let used_up = plants.trace.lock().unwrap().budgets;
        let until = until(program, budgets[used_up]);
        let ran = trainer.run(&mut cx, data(program, loader.as_ref(), plants), until);
        let taken = plants.taken.lock().unwrap().clone();
        match ran {
            Ok(Summary { stop: Stop::Interrupted | Stop::Signal(_), .. }) => {
                if taken.iter().any(|planted| planted.then == Then::Resume) {
                    return Ended::Resumes;
                }
            }
            Ok(_) if taken.iter().any(|planted| planted.how == How::Limit) => {
                return Ended::Resumes;
            }
            Ok(_) if used_up + 1 < budgets.len() => plants.trace.lock().unwrap().budgets += 1,
            Ok(Summary { stop, epochs, iterations, .. }) => {
                return Ended::Done(end(stop == Stop::Terminated, epochs, iterations));
            }
            Err(error) => {
                let text = format!("{:#}", anyhow::Error::from(error));
                if text.contains(&planted(Then::Resume)) {
                    return Ended::Resumes;
                }
                if !text.contains(PLANTED) && !text.contains("must have at least one example") {
                    return Ended::Done(format!("failed: {text}"));
                }
            }
        }
    }
    Ended::Done("it never ends".into())
}

fn read_log(folder: &Path) -> Vec<(String, u64, f64)> {
    let text = std::fs::read_to_string(folder.join("log.jsonl")).unwrap_or_default();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let value = match line["value"].as_str() {
            Some(name) => name.parse().unwrap_or(f64::NAN),
            None => line["value"].as_f64().unwrap_or(f64::NAN),
        };
        let tag = line["tag"].as_str().unwrap_or("a line that is torn").to_owned();
        (tag, line["step"].as_u64().unwrap_or(0), value)
    };
    text.lines().map(line).collect()
}
