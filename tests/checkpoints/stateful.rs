//! Tests everything that has a state in the same way: a run is killed at any event and resumed by a program that was
//! built anew; from there to its end it must be bit for bit the same as a run that was not killed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::Result;
use tch_ignite::checkpoint::{Saveable, StateDict, Stateful, read_state, write_state};
use tch_ignite::data::{
    Batch, DataLoader, Loader, RandomSampler, SequentialSampler, SubsetRandomSampler,
    TensorDataset, WeightedRandomSampler,
};
use tch_ignite::engine::{Engine, Event, Handler, HandlerSpec, Priority, Until};
use tch_ignite::handlers::*;
use tch_ignite::metrics::*;
use tch_ignite::optim::{Knob, Optimizer, lr};
use tch_ignite::schedule::*;
use tch_ignite::supervised::Prediction;

use crate::common::serial;

struct Cx {
    net: nn::SequentialT,
    optimizer: Optimizer,
}

type Trainer = Engine<'static, Cx, Batch, Tensor>;
type Lines = Rc<RefCell<Vec<String>>>;

enum Data {
    Loader(Loader),
    DataLoader(DataLoader<TensorDataset, Batch>),
}

struct Program {
    vs: VarStore,
    cx: Cx,
    trainer: Trainer,
    data: Data,
    /// One line for each iteration and epoch, with everything that can be observed then.
    lines: Lines,
}

fn tensors(samples: i64) -> (Tensor, Tensor) {
    let values = |columns: i64| {
        let numbers = Tensor::arange(samples * columns, (Kind::Float, Device::Cpu)) * 0.37;
        numbers.sin().view([samples, columns])
    };
    (values(3), values(2))
}

fn loader() -> Loader {
    let (x, y) = tensors(11);
    Loader::new(&x, &y, 3).unwrap().shuffle(7)
}

fn step(cx: &mut Cx, _: &mut Trainer, (x, y): Batch) -> anyhow::Result<Tensor> {
    let loss = cx.net.forward_t(&x, true).mse_loss(&y, Reduction::Mean);
    cx.optimizer.backward_step(&loss)?;
    Ok(loss.detach())
}

impl Program {
    fn new(seed: i64) -> Self {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let root = vs.root();
        let net = nn::seq_t()
            .add(nn::linear(&root / "base", 3, 4, Default::default()))
            .add_fn_t(|x, train| x.tanh().dropout(0.2, train))
            .add(nn::linear(&root / "fc", 4, 2, Default::default()));
        let optimizer = Optimizer::adam(&vs)
            .group("base", |name| name.starts_with("base"), lr(1e-2))
            .group("fc", |name| name.starts_with("fc"), lr(2e-2))
            .build()
            .unwrap();
        let mut trainer = Engine::new(step);
        trainer.track("model", &vs).track("optimizer", &optimizer).track_output();
        let cx = Cx { net, optimizer };
        Self { vs, cx, trainer, data: Data::Loader(loader()), lines: Rc::default() }
    }

    /// Writes a line with all metrics, knobs and the text of `watch` after each iteration and epoch.
    fn watched(mut self, watch: impl Fn() -> String + 'static) -> Self {
        let lines = self.lines.clone();
        self.trainer.on(Event::IterationCompleted | Event::EpochCompleted, move |cx, engine| {
            let state = &engine.state;
            let mut line = format!("{} {} {}", state.epoch, state.iteration, watch());
            for (name, value) in state.metrics.iter().filter(|(name, _)| !is_time(name)) {
                line += &format!(" {name} {value:?}={:x}", value.read()?.to_bits());
            }
            for knob in cx.optimizer.groups()?.iter().map(|group| group.lr()) {
                line += &format!(" {:x}", knob?.to_bits());
            }
            lines.borrow_mut().push(line);
            Ok(())
        });
        self
    }

    fn run(&mut self) -> Result<()> {
        let until = Until::epochs(3);
        match &self.data {
            Data::Loader(loader) => self.trainer.run(&mut self.cx, loader, until),
            Data::DataLoader(loader) => self.trainer.run(&mut self.cx, loader, until),
        }
        .map(|summary| assert_eq!(summary.warnings, [""; 0]))
    }

    fn outcome(&self) -> String {
        let mut state = self.trainer.checkpoint(&self.cx).unwrap();
        let _ = state.take_part("settings");
        bits(&state)
    }
}

fn is_time(name: &str) -> bool {
    ["throughput", "samples/s"].iter().any(|begin| name.starts_with(begin))
}

/// A state as a text, without times.
fn bits(state: &StateDict) -> String {
    let timed = ["total", "elapsed", "times", "seconds", "samples", "samples/s"];
    let untimed = |name: &str| !timed.contains(&name) && !is_time(name);
    let mut text = String::new();
    for (name, value) in state.values().iter().filter(|(name, _)| untimed(name)) {
        text += &format!("{name} {value}\n");
    }
    for (name, tensor) in state.tensors().filter(|(name, _)| untimed(name)) {
        let flat = tensor.detach().reshape([-1]).to_kind(Kind::Double);
        let values = Vec::<f64>::try_from(flat).unwrap();
        let values: Vec<_> = values.into_iter().map(f64::to_bits).collect();
        let (size, strides) = (tensor.size(), tensor.stride());
        text += &format!("{name} {:?} {size:?} {strides:?} {values:x?}\n", tensor.kind());
    }
    for (name, part) in state.parts() {
        text += &format!("[{name}]\n{}", bits(part));
    }
    text
}

/// A handler that runs last at an event, saves a checkpoint, and fails.
struct Killer {
    event: Event,
    left: u64,
    path: std::path::PathBuf,
}

impl Handler<Cx, Batch, Tensor> for Killer {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new("killer", self.event).priority(Priority::Last))
    }
    fn call(
        &mut self,
        _: Event,
        cx: &mut Cx,
        engine: &mut Engine<'_, Cx, Batch, Tensor>,
    ) -> anyhow::Result<()> {
        self.left -= 1;
        if self.left == 0 {
            write_state(&self.path, &engine.checkpoint(cx)?)?;
            anyhow::bail!("killed");
        }
        Ok(())
    }
}

/// A temporary folder, in memory where that is possible, because there are thousands of files and each is synced.
fn temporary() -> tempfile::TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory.or_else(|_| tempfile::tempdir()).unwrap()
}

/// Kills and resumes the program that `make` builds, at every event; `make` gets a seed for random numbers.
fn survives(what: &str, make: impl Fn(i64) -> Program) {
    let _serial = serial();
    let mut straight = make(1);
    straight.run().unwrap();
    let (expected, lines) = (straight.outcome(), straight.lines.borrow().clone());
    use Event::*;
    for event in [EpochStarted, GetBatchCompleted, IterationCompleted, EpochCompleted] {
        for n in 1.. {
            let folder = temporary();
            let path = folder.path().join("checkpoint.safetensors");
            let mut killed = make(1);
            killed.trainer.attach(Killer { event, left: n, path: path.clone() });
            if killed.run().is_ok() {
                assert!(n > 2, "{what}: {event}");
                break;
            }
            assert!(path.exists(), "{what}: {:?}", killed.run());
            let before = killed.lines.borrow().clone();
            drop(killed);
            let mut resumed = make(1000 + n as i64);
            resumed.trainer.resume(&mut resumed.cx, folder.path()).unwrap().unwrap();
            resumed.run().unwrap();
            let all = [before, resumed.lines.borrow().clone()].concat();
            assert_eq!(all, lines, "{what} killed at {event} {n}");
            let outcome = resumed.outcome();
            let differ =
                outcome.lines().zip(expected.lines()).find(|(ours, theirs)| ours != theirs);
            assert!(outcome == expected, "{what} killed at {event} {n}: {differ:.1000?}");
        }
    }
}

/// Tests a program to which `attach` attaches something.
fn with(what: &str, attach: impl Fn(&mut Program)) {
    survives(what, |seed| {
        let mut program = Program::new(seed);
        attach(&mut program);
        program.watched(String::new)
    });
}

fn evaluator() -> Engine<'static, Cx, Batch, Prediction> {
    let mut evaluator = Engine::new(|cx: &mut Cx, _: &mut Engine<_, _, _>, (x, y): Batch| {
        Ok(Prediction { y_pred: tch::no_grad(|| cx.net.forward_t(&x, false)), y })
    });
    let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, Reduction::Mean);
    evaluator.metric("loss", Loss::of(mse, Prediction::parts));
    evaluator
}

/// A knob that turns a number, which is returned too.
fn knob(name: &str) -> (Knob, Arc<Mutex<f64>>) {
    let value = Arc::new(Mutex::new(1.));
    let (get, set) = (value.clone(), value.clone());
    (Knob::new(name, move || *get.lock().unwrap(), move |v| *set.lock().unwrap() = v), value)
}

#[test]
fn averages_survive_a_kill() {
    with("EMA whose momentum a handler changes", |program| {
        let ema = EMAHandler::new(&program.vs, 0.1).unwrap().warmup(0.9, 5).unwrap();
        let knob = ema.knob();
        program.trainer.attach(ema.clone().save_history(true));
        program.trainer.attach(ema.with_averages(Evaluate::each_epoch(
            "ema",
            evaluator(),
            loader(),
        )));
        program.trainer.on(Event::IterationCompleted.once(3), move |_, _| Ok(knob.set(0.3)?));
    });
    with("EMA that warms up by count, of buffers too", |program| {
        let ema = EMAHandler::decay(&program.vs, 0.99).unwrap().warmup_by_count();
        program.trainer.attach(ema.handle_buffers(Buffers::Update));
    });
    with("SWA", |program| {
        let swa = SWAHandler::new(&program.vs).unwrap().on(Event::IterationCompleted.after(3));
        program.trainer.attach(swa.clone());
        program.trainer.attach(swa.with_averages(Evaluate::each_epoch(
            "swa",
            evaluator(),
            loader(),
        )));
    });
}

#[test]
fn evaluations_survive_a_kill() {
    const SEEN: Event = Event::custom("seen");
    with("an evaluator with metrics of some epochs and events of its own", |program| {
        let mut evaluator = evaluator();
        evaluator.register_events([SEEN]).unwrap();
        evaluator.on(Event::IterationCompleted, |cx, engine| Ok(engine.fire_event(SEEN, cx)?));
        evaluator.on(SEEN.every(7), |_, engine| {
            engine.state.metrics.set("seen", f64::from(u32::try_from(engine.state.iteration)?));
            Ok(())
        });
        let (knob, _) = knob("temperature");
        evaluator.attach(
            ParamScheduler::new("temperature", knob, ExponentialLR::new(1., 0.9))
                .save_history(true),
        );
        program.trainer.attach(Evaluate::each_epoch("val", evaluator, loader()));
    });
    with("handlers that follow an evaluation", |program| {
        let lr = program.cx.optimizer.knob("lr").unwrap();
        let plateau = ReduceLROnPlateauScheduler::min("plateau", lr, "val/loss").unwrap();
        program
            .trainer
            .attach(Evaluate::on(Event::IterationCompleted.every(2), "val", evaluator(), loader()))
            .attach(EarlyStopping::min("val/loss", 100).on(Event::IterationCompleted.every(2)))
            .attach(plateau.patience(0).threshold(0.1, ThresholdMode::Rel).factor(0.5));
    });
    with("a plateau that is infinite at first", |program| {
        program.trainer.on(Event::EpochCompleted, |_, engine| {
            let bad = if engine.state.epoch < 3 { f64::INFINITY } else { 1. };
            engine.state.metrics.set("bad", bad);
            Ok(())
        });
        let lr = program.cx.optimizer.knob("lr").unwrap();
        let plateau = ReduceLROnPlateauScheduler::min("plateau", lr, "bad").unwrap().patience(0);
        program.trainer.attach(plateau);
        program.trainer.attach(EarlyStopping::min("bad", 100));
    });
}

#[test]
fn handlers_that_watch_the_run_survive_a_kill() {
    survives("timers and rates", |seed| {
        let mut program = Program::new(seed);
        let timer = Timer::average()
            .resume_on(Event::IterationStarted)
            .pause_on(Event::IterationCompleted)
            .step_on(Event::IterationCompleted);
        let timer = Rc::new(RefCell::new(timer));
        let frequency = Frequency::of(|_: &Tensor| 1.);
        program.trainer.attach(timer.clone()).attach(Throughput::new());
        program.trainer.metric("samples/s", frequency).attach(TerminateOnNan::new());
        program.watched(move || timer.borrow().steps().to_string())
    });
    with("a history", |program| {
        let knob = program.cx.optimizer.group("fc").unwrap().knob("lr").unwrap();
        program.trainer.metric("mean", Mean::new()).metric("running", RunningAverage::new());
        program
            .trainer
            .attach(History::new().knob("lr", knob).metric("running").epoch_metric("mean"));
    });
    with("norms and batches left out", |program| {
        let skip = SkipBatch::when(|(x, _): &Batch| x.double_value(&[0, 0]) > 0.8);
        program.trainer.attach(GradNorm::new(&program.vs)).attach(skip);
    });
    survives("outputs of the epoch", |seed| {
        let mut program = Program::new(seed);
        let store = EpochOutputStore::of(|loss: &Tensor| (loss.shallow_clone(), 1u64)).tracked();
        program.trainer.attach(store.clone());
        program.watched(move || {
            let data = store.data();
            format!(
                "{} {:?}",
                data.len(),
                data.iter().map(|(t, _)| t.double_value(&[])).sum::<f64>()
            )
        })
    });
    with("outputs that handlers of the epoch read", |program| {
        program.trainer.metric_with("ends", Mean::new(), Usage::RunningEpochWise);
        program.trainer.on(Event::EpochCompleted, |_, engine| {
            let output = engine.state.output.as_ref().map_or(-1., |t| t.double_value(&[]));
            engine.state.metrics.set("last", output);
            Ok(())
        });
    });
    with("numbers that are none", |program| {
        program.trainer.on(Event::IterationCompleted, |_, engine| {
            let odd = f64::from_bits(0x7ff8_0000_0000_0000 | engine.state.iteration);
            engine.state.metrics.set("odd", odd);
            engine.state.metrics.set("infinite", f64::NEG_INFINITY);
            Ok(())
        });
    });
}

#[test]
fn metrics_of_all_usages_survive_a_kill() {
    use Usage::*;
    let usages = [
        EpochWise,
        RunningEpochWise,
        BatchWise,
        RunningBatchWise,
        SingleEpochRunningBatchWise,
        BatchFiltered(Event::IterationCompleted.every(2)),
    ];
    for usage in usages {
        with(&format!("{usage:?}"), |program| {
            let value = |loss: &Tensor| loss.double_value(&[]);
            program
                .trainer
                .metric_with("tensors", Mean::new(), usage.clone())
                .metric_with("numbers", Mean::of(value), usage.clone())
                .metric_with("average", Average::new(), usage.clone())
                .metric_with("running", RunningAverage::of(value), usage.clone());
        });
    }
    with("metrics in groups and expressions", |program| {
        let sum = Mean::of(|loss: &Tensor| loss.double_value(&[])).shared();
        let square = Mean::of(|loss: &Tensor| loss.double_value(&[]).powi(2)).shared();
        let group =
            MetricGroup::new().metric("a", Mean::new()).metric("b/c", RunningAverage::new());
        program
            .trainer
            .metric_with("variance", &square - &sum * &sum, Usage::EpochWise)
            // This metric shares `sum` with the one above; its usage resets it earlier, and it is called later.
            .metric_with("sum", sum, Usage::RunningBatchWise)
            .metric("group", group)
            .metric("group/b", Mean::new());
    });
}

#[test]
fn all_schedules_survive_a_kill() {
    type Named = (&'static str, fn() -> AnySchedule);
    let schedules: Vec<Named> = vec![
        ("LinearCyclical", || LinearCyclical::new(1e-2, 1e-3, 5).cycle_mult(1.5).into()),
        ("CosineAnnealing", || CosineAnnealing::new(1e-2, 1e-3, 4).start_value_mult(0.9).into()),
        ("PiecewiseLinear", || PiecewiseLinear::new([(2, 1e-2), (9, 1e-3)]).into()),
        ("ExpState", || ExpState::new(1e-2, 0.9).into()),
        ("StepState", || StepState::new(1e-2, 0.5, 3).into()),
        ("MultiStepState", || MultiStepState::new(1e-2, 0.5, [2, 7]).into()),
        ("StepLR", || StepLR::new(1e-2, 3).into()),
        ("MultiStepLR", || MultiStepLR::new(1e-2, [3, 8]).into()),
        ("ExponentialLR", || ExponentialLR::new(1e-2, 0.9).into()),
        ("ConstantLR", || ConstantLR::new(1e-2).total_iters(4).into()),
        ("LinearLR", || LinearLR::new(1e-2).total_iters(7).into()),
        ("PolynomialLR", || PolynomialLR::new(1e-2).total_iters(9).power(2.).into()),
        ("CosineAnnealingLR", || CosineAnnealingLR::new(1e-2, 5).into()),
        ("warm restarts", || CosineAnnealingWarmRestarts::new(1e-2, 3).t_mult(2).into()),
        ("CyclicLR", || CyclicLR::new(1e-3, 1e-2).step_size_up(3.).into()),
        ("OneCycleLR", || OneCycleLR::new(1e-2, 12).into()),
        ("InverseSqrt", || InverseSqrt::new(1e-2, 3).into()),
        ("Noam", || Noam::new(4, 3).into()),
        ("LambdaLR", || LambdaLR::new(1e-2, |event| 1. / (event + 1) as f64).into()),
        ("then and warmup", || CosineAnnealing::new(1e-2, 1e-4, 6).warmup(0., 3).unwrap()),
    ];
    for (name, schedule) in schedules {
        with(name, |program| {
            let knob = program.cx.optimizer.group("fc").unwrap().knob("lr").unwrap();
            let scheduler = ParamScheduler::new(name, knob, schedule());
            program.trainer.attach(scheduler.save_history(true));
        });
    }
}

#[test]
fn schedulers_of_a_users_own_knobs_survive_a_kill() {
    survives("groups of schedulers", |seed| {
        let mut program = Program::new(seed);
        let ((one, first), (two, second)) = (knob("one"), knob("two"));
        let schedulers = [
            ParamScheduler::new("one", one, AnySchedule::from(ExponentialLR::new(1., 0.5))),
            ParamScheduler::new("two", two, StepLR::new(2., 2).into()),
        ];
        program.trainer.attach(ParamGroupScheduler::new(schedulers).on(Event::EpochCompleted));
        program.watched(move || format!("{:?} {:?}", first.lock(), second.lock()))
    });
    survives("a scheduler that acts seldom", |seed| {
        let mut program = Program::new(seed);
        let (knob, value) = knob("weight");
        let scheduler = ParamScheduler::new("weight", knob, ExponentialLR::new(3., 0.5));
        program.trainer.attach(scheduler.on(Event::IterationStarted.every(5)));
        program.watched(move || format!("{:?}", value.lock()))
    });
}

/// A handler that has a state at some times and none at others.
struct Late {
    name: &'static str,
    count: Option<u64>,
    seen: Rc<RefCell<Vec<u64>>>,
}

impl Handler<Cx, Batch, Tensor> for Late {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new(self.name, Event::IterationCompleted.after(4)))
    }
    fn save_state(&self) -> Result<Option<StateDict>> {
        let Some(count) = self.count else { return Ok(None) };
        let mut state = StateDict::new();
        state.set_value("count", count)?;
        Ok(Some(state))
    }
    fn load_state(&mut self, state: StateDict) -> Result<()> {
        self.count = Some(state.value("count")?);
        self.seen.borrow_mut().extend(self.count);
        Ok(())
    }
    fn call(
        &mut self,
        _: Event,
        _: &mut Cx,
        engine: &mut Engine<'_, Cx, Batch, Tensor>,
    ) -> anyhow::Result<()> {
        let count = self.count.unwrap_or(0) + engine.state.iteration * self.name.len() as u64;
        self.count = Some(count);
        self.seen.borrow_mut().push(count);
        Ok(())
    }
}

#[test]
fn a_users_own_handlers_survive_a_kill() {
    survives("handlers with a state at times, whose names look like those of others", |seed| {
        let mut program = Program::new(seed);
        let seen = Rc::new(RefCell::new(vec![]));
        for name in ["late", "late", "late #2", "late"] {
            program.trainer.attach(Late { name, count: None, seen: seen.clone() });
        }
        program.watched(move || format!("{:?}", seen.borrow().last()))
    });
}

#[test]
fn groups_that_are_frozen_in_between_survive_a_kill() {
    with("freezing and thawing", |program| {
        program.trainer.on(Event::IterationStarted, |cx, engine| {
            let base = cx.optimizer.group("base")?;
            match engine.state.iteration {
                3 => base.freeze()?,
                7 => base.unfreeze()?,
                9 => cx.optimizer.group("fc")?.freeze()?,
                _ => {}
            }
            Ok(())
        });
    });
}

#[test]
fn positions_in_the_data_survive_a_kill() {
    with("a batch size that is scheduled", |program| {
        let data = loader();
        let schedule = PiecewiseLinear::new([(0, 2.), (2, 5.)]);
        program.trainer.attach(BatchSizeScheduler::new(&data, schedule));
        program.data = Data::Loader(data);
    });
    for by_worker in [false, true] {
        with("a batch size that is changed by hand in mid pass", |program| {
            let (loader, data) = (loader(), data_loader());
            let (own, other) = (loader.clone(), data.clone());
            program.data = if by_worker { Data::DataLoader(data) } else { Data::Loader(loader) };
            program.trainer.on(Event::IterationCompleted, move |_, engine| {
                let size = [3, 3, 1, 2, 2, 4, 4][engine.state.iteration as usize % 7];
                own.set_batch_size(size)?;
                Ok(other.set_batch_size(size)?)
            });
        });
    }
    let weights: Vec<_> = (0..11).map(f64::from).collect();
    let (x, y) = tensors(11);
    let plain = || Loader::new(&x, &y, 3).unwrap();
    let loaders: [(&str, &dyn Fn() -> Data); 6] = [
        ("sequential", &|| Data::Loader(plain().sampler(SequentialSampler::new(11)))),
        ("random", &|| Data::Loader(plain().sampler(RandomSampler::new(11, 5)).drop_last(true))),
        ("subset", &|| {
            Data::Loader(plain().sampler(SubsetRandomSampler::new([1, 4, 5, 9, 10], 3).unwrap()))
        }),
        ("weighted", &|| {
            Data::Loader(plain().sampler(WeightedRandomSampler::new(&weights, 14, 3).unwrap()))
        }),
        ("no workers", &|| Data::DataLoader(data_loader().num_workers(0))),
        ("workers, weighted", &|| {
            let sampler = WeightedRandomSampler::new(&weights, 14, 3).unwrap();
            Data::DataLoader(data_loader().sampler(sampler))
        }),
    ];
    for (name, data) in loaders {
        with(name, |program| program.data = data());
    }
}

fn data_loader() -> DataLoader<TensorDataset, Batch> {
    let (x, y) = tensors(11);
    DataLoader::new(TensorDataset::new(&x, &y).unwrap(), 3).unwrap().shuffle(7).num_workers(2)
}

#[test]
fn a_users_own_parts_survive_a_kill() {
    struct Odd(f64, Option<f64>);
    impl Stateful for Odd {
        fn state_dict(&self) -> Result<StateDict> {
            let mut state = StateDict::new();
            state.set_value("numbers", (self.0, self.1, [f64::INFINITY, -0.]))?;
            Ok(state)
        }
        fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
            let (a, b, [infinite, zero]): (f64, Option<f64>, [f64; 2]) = state.value("numbers")?;
            assert!(infinite == f64::INFINITY && zero.to_bits() == (-0f64).to_bits());
            (self.0, self.1) = (a, b);
            Ok(())
        }
    }
    survives("NaN in values", |seed| {
        let mut program = Program::new(seed);
        let odd = Rc::new(RefCell::new(Odd(0., None)));
        program.trainer.track("odd", odd.clone());
        let own = odd.clone();
        program.trainer.on(Event::IterationCompleted, move |_, engine| {
            let bits = own.borrow().0.to_bits() ^ (0x7ff8 << 48) ^ engine.state.iteration;
            *own.borrow_mut() = Odd(f64::from_bits(bits), Some(f64::NAN));
            Ok(())
        });
        program.watched(move || format!("{:x} {:?}", odd.borrow().0.to_bits(), odd.borrow().1))
    });
}

/// Two layers share one matrix, which the store knows by both their names.
#[test]
fn tied_weights_survive_a_kill() {
    survives("tied weights", |seed| {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let root = vs.root();
        let layer = |name, from, to| nn::linear(&root / name, from, to, Default::default());
        let (base, mut tied, last) = (layer("base", 3, 4), layer("tied", 4, 4), layer("fc", 4, 2));
        let first = (&root / "first").add("weight", tied.ws.shallow_clone(), true);
        tied.bs = None;
        let net = nn::seq_t()
            .add(base)
            .add_fn(move |x| x.tanh().matmul(&first).tanh())
            .add(tied)
            .add_fn_t(|x, train| x.tanh().dropout(0.2, train))
            .add(last);
        let optimizer = Optimizer::adam(&vs).lr(1e-2).build().unwrap();
        let (ema, swa) = (EMAHandler::new(&vs, 0.3).unwrap(), SWAHandler::new(&vs).unwrap());
        let mut trainer = Engine::new(step);
        trainer.track("model", &vs).track("optimizer", &optimizer).track_output();
        let averages = ema.with_averages(Evaluate::each_epoch("ema", evaluator(), loader()));
        trainer.attach(ema).attach(swa).attach(averages);
        let cx = Cx { net, optimizer };
        Program { vs, cx, trainer, data: Data::Loader(loader()), lines: Rc::default() }
            .watched(String::new)
    });
}

/// Convolutions have their channels last in memory, and so have their moments and averages.
#[test]
fn memory_formats_survive_a_kill() {
    let make = |seed: i64| {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let config = nn::ConvConfig { bias: false, ..Default::default() };
        let mut conv = nn::conv2d(vs.root() / "base", 3, 2, 3, config);
        // tch has no memory formats, so the parameter itself gets other strides.
        let last = Tensor::empty_strided(conv.ws.size(), [27, 1, 9, 3], (Kind::Float, Device::Cpu));
        tch::no_grad(|| {
            let mut last = last;
            last.copy_(&conv.ws);
            conv.ws.set_data(&last);
        });
        let optimizer = Optimizer::adam(&vs).build().unwrap();
        let ema = EMAHandler::new(&vs, 0.5).unwrap();
        let net = nn::seq_t().add_fn(move |x| x.view([-1, 3, 5, 5]).apply(&conv).flatten(1, -1));
        let mut trainer: Trainer = Engine::new(step);
        trainer.track("model", &vs).track("optimizer", &optimizer).track_output().attach(ema);
        let x = (Tensor::arange(11 * 75, (Kind::Float, Device::Cpu)) * 0.37).sin().view([11, 75]);
        let y = (Tensor::arange(11 * 18, (Kind::Float, Device::Cpu)) * 0.7).cos().view([11, 18]);
        let data = Loader::new(&x, &y, 3).unwrap().shuffle(7);
        let cx = Cx { net, optimizer };
        Program { vs, cx, trainer, data: Data::Loader(data), lines: Rc::default() }
            .watched(String::new)
    };
    let strides = |program: &Program| {
        let state = program.trainer.checkpoint(&program.cx).unwrap();
        let of = |part: &StateDict, name| part.tensor(name).unwrap().stride();
        [
            of(state.part("model").unwrap(), "base.weight"),
            of(state.part("optimizer").unwrap(), "base.weight/exp_avg"),
        ]
    };
    {
        let _serial = serial();
        let mut program = make(1);
        program.run().unwrap();
        assert_eq!(strides(&program), [[27, 1, 9, 3], [27, 1, 9, 3]]);
    }
    survives("channels last", make);
}

#[test]
fn states_of_ones_own_keep_their_strides() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let make = || {
        let mut state = StateDict::new();
        let cube = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([2, 3, 4]);
        state.set_tensor("permuted", cube.permute([2, 0, 1]));
        state.set_tensor("transposed", cube.view([4, 6]).tr());
        state.set_tensor("plain", cube.shallow_clone());
        state.set_tensor("gaps", cube.slice(2, 0, 4, 2));
        state.set_tensor("expanded", cube.narrow(0, 0, 1).expand([5, 3, 4], false));
        state.set_tensor("empty", cube.narrow(1, 0, 0).transpose(0, 2));
        state.set_tensor("ones", cube.view([1, 24, 1]).transpose(0, 1));
        state
    };
    for state in [make(), make().copy()?] {
        write_state(&path, &state)?;
        let read = read_state(&path)?;
        for (name, tensor) in make().tensors() {
            let read = read.tensor(name)?;
            assert_eq!(read, tensor, "{name}");
            if name != "gaps" && name != "expanded" && name != "empty" && name != "ones" {
                assert_eq!(read.stride(), tensor.stride(), "{name}");
            }
        }
    }
    Ok(())
}

#[test]
fn outputs_of_all_kinds_come_back() -> Result<()> {
    let _serial = serial();
    fn through<T: Saveable>(value: &T) -> Result<T> {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILES.fetch_add(1, Ordering::Relaxed).to_string());
        write_state(&path, &value.to_state()?)?;
        T::from_state(read_state(&path)?)
    }
    let graph = Tensor::from_slice(&[1.5f32, f32::NAN]).set_requires_grad(true) * 2.;
    let read = through(&(Some(graph), vec![(true, 1u8), (false, 2)], "a".to_owned()))?;
    let values = Vec::<f32>::try_from(read.0.unwrap()).unwrap();
    assert!(values[0] == 3. && values[1].is_nan());
    assert_eq!((read.1, read.2), (vec![(true, 1), (false, 2)], "a".into()));
    assert!(through(&None::<Tensor>)?.is_none());
    assert_eq!(through(&(f64::NEG_INFINITY, -0f32, ()))?, (f64::NEG_INFINITY, -0f32, ()));
    assert!(f64::from_state(StateDict::new()).is_err());
    Ok(())
}

#[test]
fn averages_that_are_swapped_in_are_not_saved_as_the_models() {
    let _serial = serial();
    let mut program = Program::new(1);
    let ema = EMAHandler::new(&program.vs, 0.5).unwrap();
    program.trainer.attach(ema.clone());
    program.run().unwrap();
    let state = program.trainer.checkpoint(&program.cx).unwrap();
    let guard = ema.swap().unwrap();
    let error = program.trainer.checkpoint(&program.cx).unwrap_err().to_string();
    assert!(error.contains("'ema_momentum': the averages are swapped in"), "{error}");
    assert!(program.trainer.restore(&mut program.cx, state.copy().unwrap(), true).is_err());
    drop(guard);
    program.trainer.restore(&mut program.cx, state, true).unwrap();
}
