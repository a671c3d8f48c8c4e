//! Tests of checkpoints: a run that is restored goes on bit for bit as the run that was saved, wherever it was
//! stopped.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;

use tch::nn::{self, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::GradScaler;
use tch_ignite::checkpoint::{
    Checkpoint, Mode, StateDict, Stateful, load_part, load_weights, load_weights_with, read_state,
    save_weights, verify, write_state,
};
use tch_ignite::data::{Batch, Loader, restartable};
use tch_ignite::engine::{
    Engine, Event, Events, FilteredEvent, Handler, HandlerSpec, Log, Priority, Stop, Until,
};
use tch_ignite::handlers::{
    EMAHandler, EarlyStopping, EpochOutputStore, Evaluate, History, LrFinder, SWAHandler, TimeLimit,
};
use tch_ignite::loggers::{CsvLogger, OutputHandler, RunFolder};
use tch_ignite::metrics::{Loss, Mean, RunningAverage};
use tch_ignite::optim::{GroupOptions, Knob, Optimizer, OptimizerBuilder, lr};
use tch_ignite::schedule::{
    CosineAnnealing, LinearCyclical, ParamScheduler, ReduceLROnPlateauScheduler, Schedule,
};
use tch_ignite::supervised::{
    Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
};
use tch_ignite::{Error, Result};

use crate::common;
use crate::common::serial;

struct Net {
    net: nn::SequentialT,
    optimizer: Optimizer,
}

type Trainer<'a> = Engine<'a, Net, Batch, Tensor>;

/// A small training program, with model, optimizer, schedule, data, metrics and history.
struct Program {
    vs: VarStore,
    cx: Net,
    history: History,
    trainer: Trainer<'static>,
    data: Loader,
}

const EPOCHS: u64 = 3;
/// Epochs are shorter than the data, which has 5 batches.
const EPOCH_LENGTH: u64 = 4;

fn until() -> Until {
    Until::epochs(EPOCHS).epoch_length(EPOCH_LENGTH)
}

fn net(vs: &VarStore, hidden: i64) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t()
        .add(nn::linear(&root / "base", 3, hidden, Default::default()))
        .add(nn::batch_norm1d(&root / "norm", hidden, Default::default()))
        .add_fn_t(|x, train| x.relu().dropout(0.3, train))
        .add(nn::linear(&root / "fc", hidden, 2, Default::default()))
}

/// Rprop is not among them: it has no weight decay, which the program reads.
const OPTIMIZERS: [&str; 16] = [
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adadelta",
    "ASGD",
    "Lion",
    "Adafactor",
    "Muon",
    "AdEMAMix",
    "SGDScheduleFree",
    "AdamWScheduleFree",
];

fn optimizer(name: &str, vs: &VarStore) -> Result<Optimizer> {
    fn grouped<T: nn::OptimizerConfig>(builder: OptimizerBuilder<'_, T>) -> Result<Optimizer> {
        builder
            .group("base", |name| !name.starts_with("fc"), lr(1e-2))
            .group("fc", |name| name.starts_with("fc"), lr(2e-2).weight_decay(1e-2))
            .build()
    }
    match name {
        "SGD" => grouped(Optimizer::builder(nn::sgd(0.9, 0., 0., true), vs)),
        "Adam" => grouped(Optimizer::adam(vs).amsgrad(true)),
        "AdamW" => grouped(Optimizer::adamw(vs)),
        "RMSprop" => grouped(Optimizer::rms_prop(vs).momentum(0.5).centered(true)),
        "Adagrad" => grouped(Optimizer::adagrad(vs)),
        "NAdam" => grouped(Optimizer::nadam(vs)),
        "RAdam" => grouped(Optimizer::radam(vs).betas(0.8, 0.9)),
        "Adamax" => grouped(Optimizer::adamax(vs)),
        "Adadelta" => grouped(Optimizer::adadelta(vs)),
        "ASGD" => grouped(Optimizer::asgd(vs).t0(2.).lambd(0.1)),
        "Lion" => grouped(Optimizer::lion(vs)),
        "Adafactor" => grouped(Optimizer::adafactor(vs)),
        "AdEMAMix" => grouped(Optimizer::ademamix(vs).alpha_warmup(5).beta3_warmup(9)),
        "SGDScheduleFree" => grouped(Optimizer::sgd_schedule_free(vs)),
        "AdamWScheduleFree" => grouped(Optimizer::adamw_schedule_free(vs).warmup_steps(4)),
        // Two algorithms.
        _ => Optimizer::muon(vs)
            .group("base", |name| name != "fc.weight", GroupOptions::nadam().lr(1e-2))
            .group("fc", |name| name == "fc.weight", lr(2e-2))
            .build(),
    }
}

impl Program {
    /// Makes the program named `name`. Tests give a resumed program another seed, on which nothing may depend.
    fn new(name: &str, seed: i64) -> Result<Self> {
        tch::manual_seed(seed);
        let mut vs = VarStore::new(Device::Cpu);
        let net = net(&vs, 5);
        vs.set_kind(Kind::Double);
        let optimizer = optimizer(name, &vs)?;
        let mut trainer = Engine::new(|cx: &mut Net, _, (x, y): Batch| {
            let loss = cx.net.forward_t(&x, true).mse_loss(&y, tch::Reduction::Mean);
            cx.optimizer.backward_step(&loss)?;
            Ok(loss.detach())
        });
        let mut evaluator = Engine::new(|cx: &mut Net, _, (x, y): Batch| {
            let y_pred = tch::no_grad(|| cx.net.forward_t(&x, false));
            Ok(Prediction { y_pred, y })
        });
        let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
        evaluator.metric("loss", Loss::of(mse, Prediction::parts));
        let data = data()?;
        let (base, fc) = (optimizer.group("base")?, optimizer.group("fc")?);
        let cyclic = LinearCyclical::new(1e-2, 1e-3, 6).cycle_mult(1.5);
        let cosine = CosineAnnealing::new(2e-2, 1e-4, 5).warmup(0., 3)?;
        let decay = optimizer.group("fc")?.knob("weight_decay")?;
        let plateau = ReduceLROnPlateauScheduler::min("decay", decay, "val/loss")?;
        let history = History::new()
            .metric("running")
            .knob("lr (fc)", fc.knob("lr")?)
            .epoch_metric("mean")
            .epoch_metric("val/loss");
        trainer
            .attach(ParamScheduler::new("lr (base)", base.knob("lr")?, cyclic).save_history(true))
            .attach(ParamScheduler::new("lr (fc)", fc.knob("lr")?, cosine))
            .metric("running", RunningAverage::new())
            .metric("mean", Mean::new())
            .attach(Evaluate::each_epoch("val", evaluator, data.clone()))
            .attach(plateau)
            .attach(history.clone());
        trainer.track("model", &vs).track("optimizer", &optimizer);
        Ok(Self { vs, cx: Net { net, optimizer }, history, trainer, data })
    }

    fn run(&mut self) -> Result<()> {
        self.trainer.run(&mut self.cx, &self.data, until()).map(drop)
    }

    /// Everything that training leaves, with the bits of all numbers, as a text.
    fn outcome(&self) -> Result<String> {
        let mut state = self.trainer.checkpoint(&self.cx)?;
        // These parts belong to the process and differ between runs that are equal.
        let _ = (state.take_part("settings"), state.take_part("logs"));
        let mut text = bits(&state);
        let folder = tempfile::tempdir().unwrap();
        let csv = folder.path().join("history.csv");
        self.history.write_csv(&csv)?;
        text += &std::fs::read_to_string(csv).unwrap();
        Ok(text)
    }
}

fn data() -> Result<Loader> {
    let values = |n: i64, k: i64| (Tensor::arange(n * k, (Kind::Double, Device::Cpu)) * 0.37).sin();
    Loader::new(&values(14, 3).view([14, 3]), &values(14, 2).view([14, 2]), 3)
        .map(|loader| loader.shuffle(11))
}

fn bits(state: &StateDict) -> String {
    let mut text = String::new();
    // The value "run" identifies the run, so it differs between runs that are equal.
    for (name, value) in state.values().iter().filter(|(name, _)| *name != "run") {
        text += &format!("{name} {value}\n");
    }
    for (name, tensor) in state.tensors() {
        // The bits are printed, because a tensor's own text rounds its numbers.
        let flat = tensor.detach().reshape([-1]).to_kind(match tensor.kind() {
            Kind::Double | Kind::Float => Kind::Double,
            _ => Kind::Int64,
        });
        let bits: Vec<u64> = match flat.kind() {
            Kind::Double => {
                Vec::<f64>::try_from(&flat).unwrap().into_iter().map(f64::to_bits).collect()
            }
            _ => Vec::<i64>::try_from(&flat).unwrap().into_iter().map(|n| n as u64).collect(),
        };
        text += &format!("{name} {:?} {:?} {bits:x?}\n", tensor.kind(), tensor.size());
    }
    for (name, part) in state.parts() {
        text += &format!("[{name}]\n{}", bits(part));
    }
    text
}

fn text<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

const EVENTS: [Event; 8] = [
    Event::Started,
    Event::EpochStarted,
    Event::GetBatchStarted,
    Event::GetBatchCompleted,
    Event::IterationStarted,
    Event::IterationCompleted,
    Event::DataloaderStopIteration,
    Event::EpochCompleted,
];

/// Runs until the event is fired for the `n`-th time, writes a checkpoint there and fails. Returns false if the event
/// is not fired so often.
fn killed_at(event: Event, n: u64, name: &str, folder: &Path) -> Result<bool> {
    let mut program = Program::new(name, 1)?;
    let path = folder.join("checkpoint.safetensors");
    program.trainer.attach(Killer { event, left: n, path: path.clone() });
    Ok(program.run().is_err() && path.exists())
}

/// A handler that runs last at an event, saves a checkpoint, and fails.
struct Killer {
    event: Event,
    left: u64,
    path: PathBuf,
}

impl Handler<Net, Batch, Tensor> for Killer {
    fn spec(&self) -> Result<HandlerSpec> {
        Ok(HandlerSpec::new("killer", self.event).priority(Priority::Last))
    }
    fn call(&mut self, _: Event, cx: &mut Net, engine: &mut Trainer<'_>) -> anyhow::Result<()> {
        self.left -= 1;
        if self.left == 0 {
            write_state(&self.path, &engine.checkpoint(cx)?)?;
            anyhow::bail!("killed");
        }
        Ok(())
    }
}

#[test]
fn a_run_stopped_at_any_event_goes_on_bit_for_bit() -> Result<()> {
    let _serial = serial();
    for name in OPTIMIZERS {
        let mut straight = Program::new(name, 1)?;
        straight.run()?;
        let expected = straight.outcome()?;
        let long = name == "SGD" || std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some();
        let some = [Event::EpochCompleted, Event::GetBatchCompleted];
        for event in if long { EVENTS.to_vec() } else { some.to_vec() } {
            for n in 1.. {
                let folder = tempfile::tempdir().unwrap();
                if !killed_at(event, n, name, folder.path())? {
                    assert!(n > 1, "{event}");
                    break;
                }
                let mut program = Program::new(name, 1000 + n as i64)?;
                let resumed = program.trainer.resume(&mut program.cx, folder.path())?.unwrap();
                let (told, last) =
                    (resumed.to_string(), format!("resumed {}", resumed.path.display()));
                let lines: Vec<_> = told.lines().collect();
                assert!(lines.len() == 3 && lines[2].starts_with(&last), "{told}");
                assert!(
                    lines[0].ends_with("not tracked: the context (Engine::track_context)"),
                    "{told}"
                );
                assert!(
                    lines[1].starts_with("restored: model, optimizer, handler 'lr (base)'"),
                    "{told}"
                );
                program.run()?;
                let outcome = program.outcome()?;
                assert!(
                    outcome == expected,
                    "{name} killed at {event} {n}:\n{}",
                    difference(&outcome, &expected)
                );
            }
        }
    }
    Ok(())
}

fn difference(ours: &str, theirs: &str) -> String {
    let lines = ours.lines().zip(theirs.lines()).filter(|(a, b)| a != b).take(4);
    lines.map(|(a, b)| format!("- {a:.300}\n+ {b:.300}\n")).collect()
}

type Small = Engine<'static, (), i64, f64>;

/// A trainer that does nothing, over a model of two variables.
fn small(vs: &VarStore) -> Small {
    let mut trainer = Engine::new(|_: &mut (), _, batch: i64| Ok(batch as f64));
    trainer.track("model", vs);
    trainer.metric("mean", Mean::new());
    trainer
}

fn store() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let _variables = (root.ones("weight", &[2, 3]), root.zeros_no_train("buffer", &[4]));
    vs
}

#[test]
fn the_newest_are_kept_and_latest_names_the_last() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small(&store());
    let checkpoint = Rc::new(RefCell::new(Checkpoint::new(folder.path().join("a/b")).n_saved(2)));
    trainer.attach(checkpoint.clone());
    trainer.run(&mut (), vec![1, 2], Until::epochs(3))?;
    let folder = folder.path().join("a/b");
    assert_eq!(files(&folder), ["checkpoint_4.safetensors", "checkpoint_6.safetensors", "latest"]);
    assert_eq!(
        std::fs::read_to_string(folder.join("latest")).unwrap(),
        "checkpoint_6.safetensors\n"
    );
    assert_eq!(
        checkpoint.borrow().last_checkpoint(),
        Some(folder.join("checkpoint_6.safetensors"))
    );
    // A resumed run also removes old files of the run before.
    let mut next = small(&store());
    next.attach(Checkpoint::new(&folder).n_saved(2));
    let resumed = next.resume(&mut (), &folder)?.unwrap();
    assert_eq!((resumed.epoch, resumed.iteration), (3, 6));
    next.run(&mut (), vec![1, 2], Until::epochs(4))?;
    assert_eq!(files(&folder), ["checkpoint_6.safetensors", "checkpoint_8.safetensors", "latest"]);
    Ok(())
}

#[test]
fn the_best_are_kept_and_nan_never_is() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small(&store());
    trainer.attach(
        Checkpoint::new(folder.path())
            .best(2, "mean", Mode::Min)
            .global_step(Event::EpochCompleted),
    );
    trainer.attach(Checkpoint::new(folder.path()).name("last"));
    let values = [5., 3., f64::NAN, 4., 3.5, 9.];
    trainer.on(Event::EpochCompleted, move |_, engine| {
        engine.state.metrics.set("mean", values[engine.state.epoch as usize - 1]);
        Ok(())
    });
    trainer.run(&mut (), vec![1], Until::epochs(6))?;
    assert_eq!(
        files(folder.path()),
        [
            "checkpoint_2_mean=3.0000.safetensors",
            "checkpoint_5_mean=3.5000.safetensors",
            "last_6.safetensors",
            "latest"
        ]
    );
    let mut next = small(&store());
    let best = Checkpoint::new(folder.path()).best(2, "mean", Mode::Min);
    next.attach(best.global_step(Event::EpochCompleted));
    next.attach(Checkpoint::new(folder.path()).name("last"));
    assert_eq!(next.resume(&mut (), folder.path())?.unwrap().iteration, 6, "not the best one");
    Ok(())
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    for (checkpoint, what) in [
        (
            Checkpoint::new(folder.path()).n_saved(0),
            "n_saved must be a positive integer or None, got 0",
        ),
        (Checkpoint::new(folder.path()).filename_pattern("{what}"), "has '{what'"),
        (
            Checkpoint::new(folder.path()).filename_pattern("../{name}"),
            "cannot be the name of a checkpoint",
        ),
        (
            Checkpoint::new(folder.path()).name("").filename_pattern("{name}"),
            "cannot be the name of a checkpoint",
        ),
    ] {
        let error =
            text(small(&store()).attach(checkpoint).run(&mut (), vec![1], Until::epochs(1)));
        assert!(error.contains(what), "{error}");
    }
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path().join("missing")).create_dir(false));
    let error = trainer.run(&mut (), vec![1], Until::epochs(1)).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).ends_with("missing' is not found"));
    for name in ["engine", "a/b", "", "model"] {
        let vs = store();
        let error = text(small(&vs).track(name, &vs).run(&mut (), vec![1], Until::epochs(1)));
        assert!(error.contains(&format!("'{name}' cannot be tracked under this name")), "{error}");
    }
}

#[test]
fn a_broken_checkpoint_is_skipped_and_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let vs = store();
    let mut trainer = small(&vs);
    trainer.attach(Checkpoint::new(folder.path()).keep_all());
    trainer.run(&mut (), vec![1], Until::epochs(3))?;
    let newest = folder.path().join("checkpoint_3.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&newest, &bytes).unwrap();
    let truncated = folder.path().join("checkpoint_2.safetensors");
    std::fs::write(&truncated, &std::fs::read(&truncated).unwrap()[..100]).unwrap();
    let resume = || {
        let vs = store();
        let mut next = small(&vs);
        next.attach(Checkpoint::new(folder.path()).keep_all());
        next.resume(&mut (), folder.path()).map(|resumed| resumed.map(|resumed| (resumed, vs)))
    };
    let (resumed, vs) = resume()?.unwrap();
    assert_eq!((resumed.iteration, resumed.skipped.len()), (1, 2));
    let told = resumed.to_string();
    assert!(told.contains("the file is damaged") && told.contains("checkpoint_2"), "{told}");
    let loaded = Vec::<f32>::try_from(vs.variables()["weight"].view([-1]).detach()).unwrap();
    assert_eq!(loaded, [1.; 6], "not what the damaged file left");
    std::fs::remove_file(folder.path().join("checkpoint_1.safetensors")).unwrap();
    let error = text(resume());
    assert!(error.contains("no checkpoint in") && error.contains("is whole"), "{error}");
    std::fs::remove_file(&newest).unwrap();
    std::fs::remove_file(&truncated).unwrap();
    assert!(resume()?.is_none(), "nothing to resume is no error");
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut program = Program::new("Adam", 1)?;
    program.run()?;
    write_state(&path, &program.trainer.checkpoint(&program.cx)?)?;
    let load = |change: &dyn Fn(&mut Program), strict| -> Result<Vec<String>> {
        let mut other = Program::new("Adam", 2)?;
        change(&mut other);
        let restored = other.trainer.load_checkpoint(&mut other.cx, &path, strict)?;
        if strict {
            other.run()?;
        }
        Ok(restored.ignored)
    };
    assert_eq!(load(&|_| {}, true)?, [""; 0]);
    type Change<'c> = &'c dyn Fn(&mut Program);
    let cases: [(Change<'_>, &str); 5] = [
        (&|p| _ = p.trainer.track("ema", &p.vs), "ema"),
        (&|p| drop(p.vs.root().ones("more", &[1])), "'more' is missing"),
        (&|p| _ = p.trainer.attach(Checkpoint::new("nowhere")), "no part 'handler 'checkpoint''"),
        (&|p| p.vs.set_kind(Kind::Float), "is Double of shape"),
        (
            &|p| {
                let knob = p.cx.optimizer.knob("weight_decay").unwrap();
                let schedule = LinearCyclical::new(1., 0., 4);
                p.trainer.attach(ParamScheduler::new("another", knob, schedule));
            },
            "'handler 'another''",
        ),
    ];
    for (change, what) in cases {
        let error = text(load(change, true));
        assert!(error.contains(what), "{error} / {what}");
        let ignored = load(change, false)?;
        assert!(ignored.iter().any(|text| text.contains(what)), "{ignored:?} / {what}");
    }
    // After a restore that failed in the middle, the engine refuses to run until one succeeds.
    let mut other = Program::new("SGD", 2)?;
    let error = text(other.trainer.load_checkpoint(&mut other.cx, &path, true));
    assert_eq!(error, "optimizer: it is of Adam, and this is SGD");
    assert!(text(other.run()).contains("loaded only in part"));
    Ok(())
}

#[test]
fn changed_settings_are_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let build = |rate: f64| -> Result<(Optimizer, Small)> {
        let vs = store();
        let optimizer = Optimizer::adam(&vs).lr(rate).build()?;
        let mut trainer = small(&vs);
        trainer.track("optimizer", &optimizer);
        Ok((optimizer, trainer))
    };
    let (_, trainer) = build(0.1)?;
    write_state(&path, &trainer.checkpoint(&())?)?;
    let (optimizer, mut trainer) = build(0.2)?;
    let resumed = trainer.resume(&mut (), folder.path())?.unwrap();
    assert_eq!(resumed.restored.changed, ["group_0.lr of optimizer: 0.1 then, 0.2 now"]);
    assert!(resumed.to_string().contains("changed since: group_0.lr"));
    assert_eq!(optimizer.knob("lr")?.get()?, 0.1);
    Ok(())
}

/// A counter, to test state of a type that the user defines.
#[derive(Default)]
struct Counter(u64);

impl Stateful for Counter {
    fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        state.set_value("count", self.0)?;
        Ok(state)
    }
    fn load_state_dict(&mut self, state: StateDict) -> Result<()> {
        self.0 = state.value("count")?;
        Ok(())
    }
}

#[test]
fn things_of_ones_own_and_the_context_are_saved() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let shared = Rc::new(RefCell::new(Counter::default()));
        let mut trainer = Engine::new(|cx: &mut Counter, _, batch: u64| {
            cx.0 += batch;
            Ok(batch)
        });
        trainer.track("shared", shared.clone()).track_context();
        let counted = shared.clone();
        trainer.on(Event::IterationCompleted, move |_, _| {
            counted.borrow_mut().0 += 1;
            Ok(())
        });
        trainer.attach(Checkpoint::new(folder.path()));
        (trainer, shared)
    };
    let (mut trainer, _) = make();
    trainer.run(&mut Counter(0), vec![1, 2, 3], Until::epochs(2))?;
    let (mut trainer, shared) = make();
    let mut cx = Counter(0);
    trainer.resume(&mut cx, folder.path())?;
    assert_eq!((cx.0, shared.borrow().0), (12, 6));
    Ok(())
}

#[test]
fn what_handlers_asked_for_is_done_after_a_resume() -> Result<()> {
    let _serial = serial();
    let asks: [fn(&mut Small); 3] =
        [Engine::terminate, Engine::terminate_epoch, Engine::terminate_skip_completed];
    for ask in asks {
        let make = || {
            let mut trainer = small(&store());
            trainer.on(Event::IterationCompleted.once(3), move |_, engine| {
                ask(engine);
                Ok(())
            });
            trainer
        };
        let events = |trainer: &mut Small| {
            let seen = Rc::new(RefCell::new(vec![]));
            for event in EVENTS.into_iter().chain([
                Event::Terminate,
                Event::TerminateSingleEpoch,
                Event::Completed,
            ]) {
                let seen = seen.clone();
                trainer.on(event, move |_, engine| {
                    seen.borrow_mut().push((event, engine.state.epoch, engine.state.iteration));
                    Ok(())
                });
            }
            seen
        };
        let mut straight = make();
        let expected = events(&mut straight);
        straight.run(&mut (), vec![1, 2], Until::epochs(3))?;
        let folder = tempfile::tempdir().unwrap();
        let mut killed = make();
        killed.attach(Checkpoint::new(folder.path()).on(Event::IterationCompleted.once(3)));
        killed.run(&mut (), vec![1, 2], Until::epochs(3))?;
        let mut next = make();
        next.attach(Checkpoint::new(folder.path()).on(Event::IterationCompleted.once(3)));
        let seen = events(&mut next);
        next.resume(&mut (), folder.path())?.unwrap();
        next.run(&mut (), vec![1, 2], Until::epochs(3))?;
        let expected = expected.borrow();
        let from = expected.iter().position(|(event, _, iteration)| {
            *event == Event::IterationCompleted && *iteration == 3
        });
        assert_eq!(seen.borrow()[..], expected[from.unwrap() + 1..]);
    }
    Ok(())
}

#[test]
fn an_error_can_leave_a_checkpoint() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = |fails: bool| {
        let mut trainer = small(&store());
        trainer.attach(Checkpoint::new(folder.path()).on(Event::Completed).on_exception(true));
        trainer.on(Event::IterationCompleted.once(3), move |_, _| {
            assert!(!fails, "no memory");
            Ok(())
        });
        trainer
    };
    assert!(make(true).run(&mut (), vec![1, 2], Until::epochs(2)).is_err());
    assert_eq!(files(folder.path()), ["emergency.safetensors", "latest"]);
    let mut next = make(false);
    assert_eq!(next.resume(&mut (), folder.path())?.unwrap().iteration, 3);
    let summary = next.run(&mut (), vec![1, 2], Until::epochs(2))?;
    assert_eq!((summary.epochs, summary.iterations), (2, 4));
    Ok(())
}

#[test]
fn in_the_background_the_state_of_the_event_is_written() -> Result<()> {
    let _serial = serial();
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (folder, background) in [(&folder, false), (&other, true)] {
        let mut program = Program::new("Adam", 1)?;
        let checkpoint = Checkpoint::new(folder.path()).background(background).keep_all();
        program.trainer.attach(checkpoint.on(Event::IterationCompleted));
        program.run()?;
    }
    let names = files(folder.path());
    assert_eq!(names.len() as u64, EPOCHS * EPOCH_LENGTH + 1);
    assert_eq!(names, files(other.path()));
    for name in names.iter().filter(|name| *name != "latest") {
        let state = |folder: &tempfile::TempDir| {
            Ok::<_, Error>(bits(&read_state(folder.path().join(name))?))
        };
        assert!(state(&folder)? == state(&other)?, "{name}");
    }
    // An error in the background comes out of `run`.
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path()).background(true).name("new"));
    let path = folder.path().to_owned();
    trainer.on(Event::EpochCompleted.once(1), move |_, _| {
        std::fs::create_dir(path.join("new_1.safetensors"))?;
        Ok(())
    });
    let error = trainer.run(&mut (), vec![1], Until::epochs(3)).unwrap_err();
    assert!(error.to_string().contains("handler 'checkpoint'"), "{error}");
    Ok(())
}

#[test]
fn weights_alone_go_to_other_programs_and_back() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let vs = store();
    tch::no_grad(|| {
        let _ = vs.variables()["weight"].shallow_clone().fill_(2.5);
    });
    save_weights(&vs, &path)?;
    let other = store();
    load_weights(&other, &path)?;
    assert_eq!(other.variables()["weight"].double_value(&[1, 2]), 2.5);
    let mut half = store();
    half.half();
    let error = text(load_weights(&half, &path));
    assert!(error.contains("is Float of shape") && error.contains("but Half"), "{error}");
    assert_eq!(half.variables()["weight"].kind(), Kind::Half);

    let mut trainer = small(&vs);
    trainer.attach(Checkpoint::new(folder.path()).weights(&vs).name("model"));
    trainer.run(&mut (), vec![1], Until::epochs(1))?;
    load_weights(&other, folder.path().join("model_1.safetensors"))?;
    assert!(small(&vs).resume(&mut (), folder.path())?.is_none(), "weights are no checkpoint");
    let test = "safetensors' own reader of a file of weights";
    let Some(python) = common::python(test, "TORCH_PYTHON", "safetensors.numpy") else {
        return Ok(());
    };
    let output = std::process::Command::new(python)
        .args(["-c", "import sys; from safetensors.numpy import load_file; t = load_file(sys.argv[1]); print(sorted((n, a.shape, a.dtype.name, float(a.sum())) for n, a in t.items()))"])
        .arg(&path)
        .output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "[('buffer', (4,), 'float32', 0.0), ('weight', (2, 3), 'float32', 15.0)]",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn every_type_and_shape_comes_back() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut state = StateDict::new();
    for kind in [
        Kind::Double,
        Kind::Float,
        Kind::Half,
        Kind::BFloat16,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
    ] {
        for (shape, name) in [(&[][..], "scalar"), (&[0, 3], "empty"), (&[3, 1, 2], "cube")] {
            let values = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu));
            state.set_tensor(&format!("{name} {kind:?}"), values.view(shape).to_kind(kind));
        }
    }
    state.set_tensor("transposed", Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).t_());
    state.set_value("floats", [0.1, 1e-320, -0., f64::MAX, 1. / 3.])?;
    let mut part = StateDict::new();
    part.set_tensor("\"crc32c\":\"", Tensor::from(1.5f64));
    state.set_part("a \"part\"", part);
    write_state(&path, &state)?;
    verify(&path)?;
    assert_eq!(bits(&read_state(&path)?), bits(&state));
    state.set_tensor("complex", Tensor::zeros([1], (Kind::ComplexFloat, Device::Cpu)));
    let error = write_state(&path, &state).unwrap_err();
    assert!(
        format!("{:#}", anyhow::Error::from(error)).contains("'complex' is of type ComplexFloat")
    );
    verify(&path)?;
    Ok(())
}

/// A small checkpoint as bytes.
fn small_checkpoint() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let mut state = StateDict::new();
    let mut part = StateDict::new();
    part.set_tensor("weight", Tensor::arange(5, (Kind::Float, Device::Cpu)));
    part.set_tensor("mask", Tensor::from_slice(&[true, false]));
    part.set_value("step", 3).unwrap();
    state.set_part("model", part);
    write_state(&path, &state).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn damaged_files_are_errors() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let whole = small_checkpoint();
    let refused = |bytes: &[u8], what: &str| {
        std::fs::write(&path, bytes).unwrap();
        assert!(read_state(&path).is_err(), "{what}");
    };
    for len in 0..whole.len() {
        refused(&whole[..len], &format!("the first {len} bytes"));
    }
    refused(&[&whole[..], &[0]].concat(), "one byte more");
    // Random numbers by xorshift. The long mode takes too long for every day.
    let rounds = if std::env::var_os("TCH_IGNITE_LONG_TESTS").is_some() { 100_000 } else { 2_000 };
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        for _ in 0..=next(3) {
            let place = next(bytes.len());
            bytes[place] ^= 1 << next(8);
        }
        if bytes != whole {
            refused(&bytes, "flipped bits");
        }
    }
}

#[test]
fn hostile_headers_are_errors() {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let huge = u64::MAX.to_string();
    let entry = |dtype: &str, shape: &str, from: &str, to: &str| {
        format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let headers = [
        String::new(),
        "null".into(),
        "[]".into(),
        deep,
        entry("F32", &format!("[{huge}]"), "0", &huge),
        entry("F32", &format!("[{huge},{huge}]"), "0", "8"),
        entry("F32", "[4294967296,4294967296,4294967296]", "0", "0"),
        entry("F64", "[1]", "8", "16"),
        entry("F64", "[1]", "8", "0"),
        entry("F64", "[-1]", "0", "8"),
        entry("F64", "[1.5]", "0", "8"),
        entry("F64", "[2]", "0", "8"),
        entry("F128", "[1]", "0", "8"),
        entry("BOOL", "[8]", "0", "8"),
        entry("F64", &format!("[{}1]", "1,".repeat(70)), "0", "8"),
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.into(),
        r#"{"__metadata__":{"tch-ignite":"2","state":"{}"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#.into(),
        r#"{"__metadata__":{"tch-ignite":"1"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#.into(),
        r#"{"__metadata__":{"tch-ignite":"1","state":"{}"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#.into(),
        r#"{"__metadata__":{"tch-ignite":"1","state":"{\"tensors\":[\"b\"]}"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#.into(),
        r#"{"__metadata__":{"tch-ignite":"1","state":"{}","crc32c":"zzz"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#.into(),
        r#"{"__metadata__":{"x":7}}"#.into(),
        r#"{"__metadata__":{"crc32c":""}}"#.into(),
        r#"{"__metadata__":{"crc32c":"00000000"}}"#.into(),
    ];
    for header in headers {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([255; 8]);
        std::fs::write(&path, &bytes).unwrap();
        assert!(read_state(&path).is_err(), "{header:.100}");
    }
    for length in [0, 1, u64::MAX, 1 << 40] {
        std::fs::write(&path, length.to_le_bytes()).unwrap();
        assert!(read_state(&path).is_err(), "{length}");
    }
}

#[test]
fn two_processes_cannot_share_a_folder() {
    let _serial = serial();
    const HOLD: &str = "TCH_IGNITE_TEST_HOLDS";
    let attached = |folder: &Path| {
        let mut trainer = small(&store());
        trainer.attach(Checkpoint::new(folder));
        trainer
    };
    if let Some(folder) = std::env::var_os(HOLD) {
        // The other process runs this: it holds the folder's lock until it is killed.
        let mut trainer = attached(Path::new(&folder));
        trainer.on(Event::Completed, |_, _| {
            std::fs::write(Path::new(&std::env::var_os(HOLD).unwrap()).join("held"), "")?;
            std::thread::sleep(std::time::Duration::from_secs(60));
            Ok(())
        });
        trainer.run(&mut (), vec![1], Until::epochs(1)).unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut other = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("--exact")
        .arg(common::exact(module_path!(), "two_processes_cannot_share_a_folder"))
        .env(HOLD, folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !folder.path().join("held").exists() {
        assert!(other.try_wait().unwrap().is_none(), "the other process ended");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let run = || attached(folder.path()).run(&mut (), vec![1], Until::epochs(1));
    let error = format!("{:#}", anyhow::Error::from(run().unwrap_err()));
    assert!(error.contains(&format!("another run (process {})", other.id())), "{error}");
    other.kill().unwrap();
    other.wait().unwrap();
    run().unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_that_keeps_the_last() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(file.join("sub")));
    assert!(trainer.run(&mut (), vec![1], Until::epochs(1)).is_err());

    // The second file cannot be written, because a folder is in its place.
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path()));
    let blocked = folder.path().join("checkpoint_2.safetensors");
    std::fs::create_dir_all(blocked.join("full")).unwrap();
    assert!(trainer.run(&mut (), vec![1], Until::epochs(2)).is_err());
    verify(folder.path().join("checkpoint_1.safetensors"))?;
    std::fs::remove_dir_all(&blocked).unwrap();
    trainer.run(&mut (), vec![1], Until::epochs(3))?;
    assert_eq!(files(folder.path()), ["checkpoint_3.safetensors", "file", "latest"]);
    Ok(())
}

/// A run with accumulation, gradient scaling, clipping, and two kinds of averages.
struct Aided {
    cx: Supervised<nn::SequentialT>,
    trainer: tch_ignite::engine::Trainer<'static, Supervised<nn::SequentialT>>,
}

impl Aided {
    fn outcome(&self) -> Result<String> {
        let mut state = self.trainer.checkpoint(&self.cx)?;
        let _ = state.take_part("settings");
        Ok(bits(&state))
    }
}

fn aided(seed: i64) -> Result<Aided> {
    tch::manual_seed(seed);
    let vs = VarStore::new(Device::Cpu);
    let net = net(&vs, 4);
    let optimizer = optimizer("AdamW", &vs)?;
    let scaler = GradScaler::new().init_scale(1024.)?.growth(2., 0.5, 3)?;
    let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
    let cx = Supervised::new(net, optimizer.clone(), mse)
        .accumulate(3)?
        .grad_scaler(scaler)
        .clip_grad_norm(0.5);
    let mut trainer = create_supervised_trainer();
    let ema = EMAHandler::decay(&vs, 0.9)?.warmup_by_count();
    let swa = SWAHandler::new(&vs)?.on(Event::IterationCompleted.after(4));
    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("loss", Loss::of(mse, Prediction::parts));
    let data = Loader::new(&inputs(14, 3), &inputs(14, 2), 3)?.shuffle(2);
    trainer
        .metric("loss", Mean::new())
        .attach(ema.clone())
        .attach(swa)
        .attach(ema.with_averages(Evaluate::each_epoch("ema", evaluator, data)))
        .attach(EarlyStopping::min("ema/loss", 100))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    Ok(Aided { cx, trainer })
}

fn inputs(rows: i64, columns: i64) -> Tensor {
    (Tensor::arange(rows * columns, (Kind::Float, Device::Cpu)) * 0.7).cos().view([rows, columns])
}

#[test]
fn scaler_averages_and_accumulated_gradients_go_on_too() -> Result<()> {
    let _serial = serial();
    let data = Loader::new(&inputs(14, 3), &inputs(14, 2), 3)?.shuffle(2);
    let until = Until::epochs(3);
    let mut straight = aided(1)?;
    straight.trainer.run(&mut straight.cx, &data, until)?;
    let expected = straight.outcome()?;
    for n in 1..=15 {
        let folder = tempfile::tempdir().unwrap();
        let mut killed = aided(1)?;
        killed
            .trainer
            .attach(Checkpoint::new(folder.path()).on(Event::IterationCompleted.once(n)))
            .on(Event::GetBatchStarted, move |_, engine| {
                anyhow::ensure!(engine.state.iteration < n, "killed");
                Ok(())
            });
        let _ = killed.trainer.run(&mut killed.cx, &data, until);
        drop(killed);
        let mut resumed = aided(100)?;
        let told = resumed.trainer.resume_with(&mut resumed.cx, folder.path(), false)?.unwrap();
        println!("{told}");
        resumed.trainer.run(&mut resumed.cx, &data, until)?;
        let outcome = resumed.outcome()?;
        assert!(outcome == expected, "killed at {n}:\n{}", difference(&outcome, &expected));
    }
    Ok(())
}

#[test]
fn a_checkpoint_names_no_file_outside_its_folder() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint_1.safetensors");
    let precious = folder.path().join("precious");
    std::fs::write(&precious, "").unwrap();
    let inner = folder.path().join("inner");
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(&inner));
    trainer.run(&mut (), vec![1], Until::epochs(1))?;
    for name in ["../precious", precious.to_str().unwrap(), "", ".lock", "latest"] {
        let mut state = read_state(inner.join("checkpoint_1.safetensors"))?;
        let mut handlers = state.take_part("handlers")?;
        let mut own = StateDict::new();
        own.set_value("_saved", [(-1, name)])?;
        handlers.set_part("checkpoint", own);
        state.set_part("handlers", handlers);
        write_state(&path, &state)?;
        let mut next = small(&store());
        next.attach(Checkpoint::new(&inner));
        let error = text(next.load_checkpoint(&mut (), &path, true));
        assert!(error.contains("cannot be the name of a checkpoint"), "{error}");
    }
    assert!(precious.exists());
    Ok(())
}

#[test]
fn the_last_written_is_resumed_not_the_one_of_an_older_longer_run() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    for epochs in [5, 2] {
        let mut trainer = small(&store());
        trainer.attach(Checkpoint::new(folder.path()).n_saved(2));
        trainer.run(&mut (), vec![1], Until::epochs(epochs))?;
    }
    let mut next = small(&store());
    next.attach(Checkpoint::new(folder.path()).n_saved(2));
    assert_eq!(next.resume(&mut (), folder.path())?.unwrap().iteration, 2);
    Ok(())
}

#[test]
fn data_of_another_length_is_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path()));
    trainer.run(&mut (), vec![1, 2, 3], Until::epochs(1))?;
    let mut next = small(&store());
    next.attach(Checkpoint::new(folder.path()));
    next.resume(&mut (), folder.path())?;
    let summary = next.run(&mut (), vec![1, 2], Until::epochs(2))?;
    assert!(summary.warnings[0].contains("had 3 batches"), "{summary}");
    assert_eq!(next.run(&mut (), vec![1, 2], Until::epochs(3))?.warnings, [""; 0]);
    Ok(())
}

#[test]
fn runs_of_one_engine_write_anew() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = small(&store());
    trainer.attach(Checkpoint::new(folder.path()));
    for epochs in [4, 4, 2] {
        trainer.reset()?;
        trainer.run(&mut (), vec![1], Until::epochs(epochs))?;
        let newest = folder.path().join(format!("checkpoint_{epochs}.safetensors"));
        assert_eq!(read_state(newest)?.part("engine")?.values()["position"]["epoch"], epochs);
    }
    Ok(())
}

#[test]
fn weights_do_not_take_the_place_of_checkpoints() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let vs = store();
        let mut trainer = small(&vs);
        trainer.attach(Checkpoint::new(folder.path()));
        trainer.attach(Checkpoint::new(folder.path()).weights(&vs));
        trainer
    };
    let mut trainer = make();
    trainer.on(Event::IterationCompleted.once(3), |_, engine| {
        engine.interrupt();
        Ok(())
    });
    trainer.run(&mut (), vec![1, 2], Until::epochs(2))?;
    let names =
        ["checkpoint_2.safetensors", "interrupted.safetensors", "latest", "model_2.safetensors"];
    assert_eq!(files(folder.path()), names);
    assert_eq!(make().resume(&mut (), folder.path())?.unwrap().iteration, 3);
    Ok(())
}

#[test]
fn a_checkpoint_within_a_step_is_refused() {
    let _serial = serial();
    const WITHIN: Event = Event::custom("within");
    let mut trainer = Engine::new(|cx: &mut (), engine: &mut Engine<(), i64, ()>, _| {
        Ok(engine.fire_event(WITHIN, cx)?)
    });
    trainer.register_events([WITHIN]).unwrap();
    trainer.attach(Checkpoint::new(tempfile::tempdir().unwrap().path()).on(WITHIN));
    let error = trainer.run(&mut (), vec![1], Until::epochs(1)).unwrap_err();
    let all = format!("{:#}", anyhow::Error::from(error));
    assert!(all.contains("cannot be made within a step"), "{all}");
}

#[test]
fn knobs_of_ones_own_are_saved() -> Result<()> {
    let _serial = serial();
    let make = || {
        let value = std::sync::Arc::new(Mutex::new(1.));
        let (get, set) = (value.clone(), value.clone());
        let knob =
            Knob::new("dropout", move || *get.lock().unwrap(), move |v| *set.lock().unwrap() = v);
        let mut trainer = small(&store());
        trainer
            .attach(ReduceLROnPlateauScheduler::max("dropout", knob, "mean").unwrap().patience(0));
        (trainer, value)
    };
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, value) = make();
    trainer.attach(Checkpoint::new(folder.path()));
    trainer.run(&mut (), vec![1], Until::epochs(3))?;
    let reduced = *value.lock().unwrap();
    assert!(reduced < 1.);
    let (mut trainer, value) = make();
    trainer.attach(Checkpoint::new(folder.path()));
    trainer.resume(&mut (), folder.path())?;
    assert_eq!(*value.lock().unwrap(), reduced);
    Ok(())
}

#[test]
fn a_finished_run_stays_finished() -> Result<()> {
    let _serial = serial();
    for stops in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let make = || {
            let mut trainer = small(&store());
            trainer.attach(Checkpoint::new(folder.path()).on(Event::Completed));
            trainer.on(Event::IterationCompleted.once(3), move |_, engine| {
                if stops {
                    engine.terminate();
                }
                Ok(())
            });
            trainer
        };
        let done = make().run(&mut (), vec![1, 2], Until::epochs(3))?;
        let mut next = make();
        let fired = Rc::new(RefCell::new(vec![]));
        for event in EVENTS.into_iter().chain([Event::Terminate, Event::Completed]) {
            let fired = fired.clone();
            next.on(event, move |_, _| {
                fired.borrow_mut().push(event);
                Ok(())
            });
        }
        next.resume(&mut (), folder.path())?.unwrap();
        let again = next.run(&mut (), vec![1, 2], Until::epochs(3))?;
        assert_eq!(*fired.borrow(), []);
        assert_eq!((again.epochs, again.iterations), (done.epochs, done.iterations));
        assert_eq!(again.stop, done.stop);
        assert_eq!(again.warnings.len(), usize::from(stops), "{again}");
        // With a larger budget the run goes on.
        let more = next.run(&mut (), vec![1, 2], Until::epochs(4))?;
        assert_eq!(more.epochs, 4);
    }
    Ok(())
}

/// The paths and contents of all files below a folder.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(contents(&path)),
            false => all.push((path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    all.sort();
    all
}

/// Makes a program that writes checkpoints and logs, in its trainer and in an evaluator, and stops after 7
/// iterations. The second value counts how often closures were called.
fn writing(folder: &Path) -> Result<(Program, Rc<RefCell<u32>>)> {
    let mut program = Program::new("Adam", 1)?;
    let run = RunFolder::create(folder.join("run"))?;
    let csv = CsvLogger::open(folder.join("evaluations.csv"))?;
    let every = Event::IterationCompleted.every(2);
    let mut evaluator = Engine::new(|_: &mut Net, _, (x, _): Batch| {
        let noise = Tensor::rand([1], (Kind::Float, Device::Cpu));
        Ok((x.sum(Kind::Float) + noise).double_value(&[0]))
    });
    evaluator
        .metric("sum", Mean::new())
        .attach(OutputHandler::new(&csv, "own", Event::EpochCompleted).metric("sum"))
        .attach(Checkpoint::new(folder.join("best")).weights(&program.vs).best(
            1,
            "sum",
            Mode::Min,
        ));
    let (calls, counted) = (Rc::new(RefCell::new(0)), Rc::new(RefCell::new(0)));
    let closures = calls.clone();
    let losses = EpochOutputStore::of(|loss: &Tensor| loss.double_value(&[]));
    let kept = losses.clone();
    program
        .trainer
        .attach(Evaluate::on(every.clone(), "own", evaluator, data()?))
        .attach(OutputHandler::new(&run, "training", Event::IterationCompleted).metric("running"))
        .attach(run.clone())
        .attach(losses)
        .attach(EMAHandler::new(&program.vs, 0.25)?)
        .on(Event::IterationCompleted, move |_, engine| {
            *closures.borrow_mut() += 1;
            // The search for a learning rate must leave the handlers as they are now, so one is added and removed
            // within it.
            let id = engine.add_event_handler(Event::EpochCompleted, |_, _| Ok(()))?;
            engine.remove_event_handler(id)?;
            assert!(kept.data().len() <= EPOCH_LENGTH as usize);
            Ok(())
        })
        .on(Event::IterationCompleted.once(7), move |_, engine| {
            *counted.borrow_mut() += 1;
            if *counted.borrow() == 1 {
                engine.interrupt();
            }
            Ok(())
        })
        .attach(Checkpoint::new(folder.join("checkpoints")).n_saved(2).on(every));
    Ok((program, calls))
}

#[test]
fn a_search_for_a_learning_rate_leaves_no_trace() -> Result<()> {
    let _serial = serial();
    let mut straight: Option<String> = None;
    for ends in ["not at all", "well", "with an error", "with a panic"] {
        let folder = tempfile::tempdir().unwrap();
        let (mut program, calls) = writing(folder.path())?;
        program.run()?;
        assert_eq!(program.trainer.state.iteration, 7);
        let seen = *calls.borrow();
        let before = (program.outcome()?, contents(folder.path()));
        if ends != "not at all" {
            let finder =
                LrFinder::new(&program.cx.optimizer, &program.vs).start_lr(1e-3).num_iter(12);
            let losses = RefCell::new(0);
            let found = finder.run(
                &mut program.trainer,
                &mut program.cx,
                &program.data,
                move |loss: &Tensor| {
                    *losses.borrow_mut() += 1;
                    match *losses.borrow() {
                        5 if ends == "with a panic" => panic!("of the loss"),
                        5 if ends == "with an error" => {
                            Tensor::zeros([2], (Kind::Float, Device::Cpu))
                        }
                        _ => loss.shallow_clone(),
                    }
                },
            );
            assert_eq!(found.is_ok(), ends == "well", "{found:?}");
            assert!(*calls.borrow() >= seen + 4, "closures are called");
            let after = (program.outcome()?, contents(folder.path()));
            assert!(after.0 == before.0, "{ends}:\n{}", difference(&after.0, &before.0));
            let names = |files: &[(PathBuf, _)]| -> Vec<PathBuf> {
                files.iter().map(|(path, _)| path.clone()).collect()
            };
            assert_eq!(names(&after.1), names(&before.1), "{ends}");
            assert!(after.1 == before.1, "{ends}: files have other contents");
        }
        program.run()?;
        let (outcome, mut files) = (program.outcome()?, files(&folder.path().join("checkpoints")));
        files.extend(self::files(&folder.path().join("best")));
        let all = format!("{outcome}{files:?}");
        let straight = straight.get_or_insert_with(|| all.clone());
        assert!(all == *straight, "{ends}:\n{}", difference(&all, straight));
    }
    Ok(())
}

// These tests are about limits, other data on resuming, and passes whose order is drawn anew.

/// A trainer that writes down the numbers that its data gives, and saves checkpoints in a folder.
fn seeing(folder: &Path, checkpoint_at: impl Into<Events>) -> Engine<'static, Vec<i64>, i64, f64> {
    let mut trainer = Engine::new(|seen: &mut Vec<i64>, _, batch: i64| {
        seen.push(batch);
        anyhow::ensure!(seen.len() < 1000, "this run does not end");
        Ok(batch as f64)
    });
    trainer.track("model", &store()).metric("mean", Mean::new());
    trainer.attach(Checkpoint::new(folder).on(checkpoint_at));
    trainer
}

#[test]
fn a_limit_that_ended_a_run_is_none_of_the_run_that_is_resumed() -> Result<()> {
    let _serial = serial();
    let data = || vec![0, 1, 2];
    // An epoch has 4 iterations and the data 3 batches, so the data is exhausted in mid epoch.
    let until = || Until::epochs(3).epoch_length(4);
    let mut straight = vec![];
    seeing(tempfile::tempdir().unwrap().path(), Event::Completed).run(
        &mut straight,
        data(),
        until(),
    )?;
    for event in EVENTS {
        for saved_at in [event, Event::Terminate, Event::Completed] {
            for n in [1, 2] {
                let folder = tempfile::tempdir().unwrap();
                let mut limited = seeing(folder.path(), saved_at);
                let mut left = n;
                limited.on(event, move |_, engine| {
                    left -= 1;
                    if left == 0 {
                        engine.terminate_at_limit();
                    }
                    Ok(())
                });
                let mut seen = vec![];
                let summary = limited.run(&mut seen, data(), until())?;
                if event == Event::Started && n == 2 {
                    continue;
                }
                assert_eq!(summary.stop, Stop::Terminated, "{event}");
                drop(limited);
                // The resumed run must equal the straight one.
                let mut resumed = seeing(folder.path(), saved_at);
                let told = resumed.resume(&mut seen, folder.path())?.unwrap();
                let restored = &told.restored;
                assert!(restored.changed.is_empty() && restored.ignored.is_empty(), "{told}");
                let summary = resumed.run(&mut seen, data(), until())?;
                assert_eq!(seen, straight, "{event} {n}, saved at {saved_at}");
                assert_eq!((summary.epochs, summary.iterations), (3, 12), "{event} {saved_at}");
                assert_eq!(summary.warnings, [""; 0], "{event} {saved_at}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_search_does_not_touch_the_checkpoints_of_a_finished_run() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = || -> Result<_> {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().ones("w", &[2]);
        let optimizer = Optimizer::sgd(&vs).lr(0.05).build()?;
        let step = optimizer.clone();
        let mut trainer = Engine::new(move |_: &mut (), _: &mut Engine<_, _, _>, x: f64| {
            let loss = (&w - x).square().sum(Kind::Float);
            step.backward_step(&loss)?;
            Ok(loss.detach())
        });
        trainer.track("model", &vs).track("optimizer", &optimizer);
        trainer.attach(Checkpoint::new(folder.path()).on(Event::IterationCompleted.every(20)));
        Ok((vs, optimizer, trainer))
    };
    let data = vec![0.5, 0.25, 1., 0.75];
    let (vs, _, mut trainer) = make()?;
    trainer.run(&mut (), data.clone(), Until::epochs(60))?;
    let trained = Vec::<f64>::try_from(&vs.variables()["w"].to_kind(Kind::Double)).unwrap();
    drop(trainer);
    let (vs, optimizer, mut trainer) = make()?;
    let finder = LrFinder::new(&optimizer, &vs).num_iter(50).end_lr(0.4);
    finder.run(&mut trainer, &mut (), data, |loss: &Tensor| loss.shallow_clone())?;
    assert_eq!(files(folder.path()), ["checkpoint_240.safetensors", "latest"]);
    let resumed = trainer.resume(&mut (), folder.path())?.unwrap();
    assert_eq!((resumed.iteration, optimizer.knob("lr")?.get()?), (240, 0.05));
    let now = Vec::<f64>::try_from(&vs.variables()["w"].to_kind(Kind::Double)).unwrap();
    assert_eq!(now, trained);
    Ok(())
}

#[test]
fn checkpoints_without_a_model_are_warned_about_and_what_is_missing_is_told() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let data = Loader::new(&inputs(6, 3), &inputs(6, 2), 3)?;
    let make = |track: bool| -> Result<_> {
        let vs = VarStore::new(Device::Cpu);
        let net = net(&vs, 4);
        let optimizer = Optimizer::adam(&vs).build()?;
        let mut trainer = create_supervised_trainer();
        if track {
            trainer.track("model", &vs).track("optimizer", &optimizer);
        }
        trainer.attach(Checkpoint::new(folder.path()));
        let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
        Ok((trainer, Supervised::new(net, optimizer, mse)))
    };
    let (mut trainer, mut cx) = make(false)?;
    let warnings = trainer.run(&mut cx, &data, Until::epochs(1))?.warnings.join("; ");
    assert!(warnings.contains("have no model") && warnings.contains("Engine::track"), "{warnings}");
    drop(trainer);
    let (mut trainer, mut cx) = make(false)?;
    let told = trainer.resume(&mut cx, folder.path())?.unwrap().to_string();
    assert!(told.contains("not tracked: any model or optimizer (Engine::track)"), "{told}");
    assert!(told.contains("\nrestored: context, handler 'checkpoint', metrics"), "{told}");
    drop(trainer);
    std::fs::remove_dir_all(folder.path()).unwrap();
    let (mut trainer, mut cx) = make(true)?;
    assert_eq!(trainer.run(&mut cx, &data, Until::epochs(1))?.warnings, [""; 0]);
    drop(trainer);
    let (mut trainer, mut cx) = make(true)?;
    let resumed = trainer.resume(&mut cx, folder.path())?.unwrap();
    assert_eq!(resumed.restored.parts[..3], ["model", "optimizer", "context"]);
    assert!(resumed.restored.untracked.is_empty() && !resumed.to_string().contains("not restored"));
    // Files with weights alone belong to no run, so the run does not warn that something is not tracked.
    let vs = store();
    let mut trainer = Engine::new(|_: &mut (), _, batch: i64| Ok(batch));
    trainer.attach(Checkpoint::new(folder.path()).weights(&vs));
    assert_eq!(trainer.run(&mut (), vec![1], Until::epochs(1))?.warnings, [""; 0]);
    Ok(())
}

#[test]
fn another_head_leaves_the_rest_of_the_network_and_of_the_optimizer() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let make = |classes: i64, seed| -> Result<_> {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let body = nn::linear(vs.root() / "body", 3, 4, Default::default());
        let head = nn::linear(vs.root() / "head", 4, classes, Default::default());
        let optimizer = Optimizer::adam(&vs).lr(0.01 * classes as f64).build()?;
        let ema = EMAHandler::new(&vs, 0.5)?;
        let step = optimizer.clone();
        let mut trainer = Engine::new(move |_: &mut (), _: &mut Engine<_, _, _>, x: f64| {
            use tch::nn::Module;
            let x = Tensor::full([2, 3], x, (Kind::Float, Device::Cpu));
            let loss = head.forward(&body.forward(&x)).square().sum(Kind::Float);
            step.backward_step(&loss)?;
            Ok(loss.detach())
        });
        trainer.track("model", &vs).track("optimizer", &optimizer);
        trainer.attach(ema.clone()).attach(Checkpoint::new(folder.path()));
        Ok((vs, optimizer, ema, trainer))
    };
    let (vs, optimizer, ema, mut trainer) = make(2, 1)?;
    trainer.run(&mut (), vec![0.5, 0.25, 1.], Until::epochs(1))?;
    let state = |optimizer: &Optimizer, name: &str| -> Result<Vec<(&'static str, Tensor)>> {
        Ok(optimizer.state(name)?.into_iter().map(|(key, t)| (key, t.copy())).collect())
    };
    let (weight, moments) =
        (vs.variables()["body.weight"].copy(), state(&optimizer, "body.weight")?);
    let averages = ema.averages();
    drop(trainer);

    let (vs, optimizer, ema, mut trainer) = make(3, 2)?;
    let error = text(trainer.resume(&mut (), folder.path()));
    assert!(
        error.contains("'head.bias' is Float of shape [2], but Float of shape [3] here"),
        "{error}"
    );
    assert!(error.contains("strict = false"), "{error}");
    let head = vs.variables()["head.weight"].copy();
    let resumed = trainer.resume_with(&mut (), folder.path(), false)?.unwrap();
    assert_eq!(vs.variables()["body.weight"], weight);
    assert_eq!(vs.variables()["head.weight"], head);
    assert_eq!(state(&optimizer, "body.weight")?, moments);
    assert!(optimizer.state("head.weight")?.is_empty());
    assert_eq!(optimizer.knob("lr")?.get()?, 0.02);
    let average = |averages: &[(String, Tensor)], name: &str| {
        averages.iter().find(|(other, _)| other == name).unwrap().1.copy()
    };
    assert_eq!(average(&ema.averages(), "body.weight"), average(&averages, "body.weight"));
    assert_eq!(average(&ema.averages(), "head.weight"), head);
    let told = resumed.to_string();
    for what in [
        "not restored: model: 'head.weight' is Float of shape [2, 4], but Float of shape [3, 4] here",
        "not restored: optimizer: 'head.weight/exp_avg' is Float of shape [2, 4], and the parameter is Float of shape [3, 4]",
        "handler 'ema_momentum': 'head.bias' is Float of shape [2], but Float of shape [3] here",
        "restored: model, optimizer, handler 'ema_momentum'",
    ] {
        assert!(told.contains(what), "{what}\n{told}");
    }
    trainer.run(&mut (), vec![0.5, 0.25, 1.], Until::epochs(2))?;
    assert_eq!(trainer.state.iteration, 6);
    Ok(())
}

#[test]
fn a_parameter_that_is_new_or_gone_is_listed_and_the_others_are_loaded() -> Result<()> {
    let _serial = serial();
    let make = |names: &[&str]| -> Result<_> {
        let vs = VarStore::new(Device::Cpu);
        let variables: Vec<_> = names.iter().map(|name| vs.root().ones(name, &[2])).collect();
        let optimizer = Optimizer::adam(&vs).build()?;
        Ok((variables, optimizer))
    };
    let (variables, saved) = make(&["a", "b"])?;
    saved.backward_step(&(&variables[0] * 2. + &variables[1]).sum(Kind::Float))?;
    let state = || Stateful::state_dict(&saved).and_then(|state| state.copy());
    let (_, mut other) = make(&["b", "c"])?;
    assert!(text(other.load_state_dict(state()?)).contains("'a' was in group"));
    assert!(other.state("b")?.is_empty());
    let misfits = other.load_state_dict_partially(state()?)?;
    assert!(misfits.iter().any(|text| text.contains("'a' was in group 'group_0'")), "{misfits:?}");
    assert!(misfits.iter().any(|text| text.contains("'a/exp_avg'")), "{misfits:?}");
    assert_eq!(other.state("b")?, saved.state("b")?);
    assert!(other.state("c")?.is_empty());
    Ok(())
}

#[test]
fn weights_of_python_with_batch_norm_are_loaded_and_other_names_can_be_allowed() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    // These are the names that PyTorch gives to a Sequential with a BatchNorm1d.
    let theirs = VarStore::new(Device::Cpu);
    let net = |vs: &VarStore| {
        let norm = nn::batch_norm1d(vs.root() / "norm", 4, Default::default());
        (nn::linear(vs.root() / "fc", 3, 4, Default::default()), norm)
    };
    let _theirs = net(&theirs);
    let counter = Tensor::from(7i64);
    let _ = (theirs.root() / "norm").add("num_batches_tracked", counter, false);
    save_weights(&theirs, &path)?;
    let ours = VarStore::new(Device::Cpu);
    let _ours = net(&ours);
    load_weights(&ours, &path)?;
    assert_eq!(ours.variables()["fc.weight"], theirs.variables()["fc.weight"]);

    let _ = theirs.root().ones("old", &[2]);
    save_weights(&theirs, &path)?;
    let _ = ours.root().ones("new", &[2]);
    let _ = tch::no_grad(|| ours.variables()["fc.bias"].shallow_clone().fill_(9.));
    let error = text(load_weights(&ours, &path));
    assert!(error.contains("'new' is missing"), "{error}");
    assert_eq!(ours.variables()["fc.bias"].double_value(&[0]), 9., "nothing is changed");
    let keys = load_weights_with(&ours, &path, false)?;
    assert_eq!((&*keys.missing, &*keys.unexpected), (&["new".into()][..], &["old".into()][..]));
    assert_eq!(ours.variables()["fc.bias"], theirs.variables()["fc.bias"]);
    // PyTorch itself writes a file, with all that its batch norm has.
    let script = "import sys, torch
from safetensors.torch import save_file
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
net(torch.arange(6.).view(2, 3))
save_file(net.state_dict(), sys.argv[1])
net.eval()
print(net(torch.ones(1, 3)).sum().item())";
    let python = std::env::var("TORCH_PYTHON").unwrap_or_else(|_| "python3".into());
    let torch = folder.path().join("torch.safetensors");
    let output = std::process::Command::new(python).args(["-c", script]).arg(&torch).output();
    match output {
        Ok(output) if output.status.success() => {
            let vs = VarStore::new(Device::Cpu);
            let fc = nn::linear(vs.root() / "0", 3, 4, Default::default());
            let norm = nn::batch_norm1d(vs.root() / "1", 4, Default::default());
            load_weights(&vs, &torch)?;
            let x = fc.forward_t(&Tensor::ones([1, 3], (Kind::Float, Device::Cpu)), false);
            let sum = norm.forward_t(&x, false).sum(Kind::Float).double_value(&[]);
            let theirs: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
            approx::assert_abs_diff_eq!(sum, theirs, epsilon = 1e-5);
        }
        _ => eprintln!("SKIPPED: no Python with torch and safetensors (set TORCH_PYTHON)"),
    }
    // A variable of another shape is an error, as in PyTorch.
    let small = VarStore::new(Device::Cpu);
    let _ = (small.root() / "fc").ones("bias", &[5]);
    let error = text(load_weights_with(&small, &path, false));
    assert!(error.contains("'fc.bias' is Float of shape [4], but Float of shape [5]"), "{error}");
    Ok(())
}

#[test]
fn the_model_alone_comes_out_of_a_training_checkpoint() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::new("Adam", 1)?;
    program.trainer.attach(Checkpoint::new(folder.path()));
    program.run()?;
    let path = folder.path().join("checkpoint_12.safetensors");
    let mut vs = VarStore::new(Device::Cpu);
    let _net = net(&vs, 5);
    vs.set_kind(Kind::Double);
    load_part(&vs, &path, "model")?;
    for (name, tensor) in vs.variables() {
        assert_eq!(tensor, program.vs.variables()[&name], "{name}");
    }
    let error = text(load_part(&vs, &path, "net"));
    assert!(error.contains("no part 'net'") && error.contains("model, optimizer"), "{error}");
    let error = text(load_weights(&vs, &path));
    assert!(error.contains("load_part(&vs, path, \"model\")"), "{error}");
    // `load_part` also notices damage in a part that it does not load, here the optimizer.
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(text(load_part(&vs, &path, "model")).contains("the file is damaged"));
    Ok(())
}

#[test]
fn a_longer_schedule_goes_on_at_its_place() -> Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    type Trainer = Engine<'static, Vec<f64>, f64, ()>;
    let make = |cycle: u64| -> Result<Trainer> {
        let vs = VarStore::new(Device::Cpu);
        let _w = vs.root().ones("w", &[2]);
        let optimizer = Optimizer::sgd(&vs).build()?;
        let (lr, momentum) = (optimizer.knob("lr")?, optimizer.knob("weight_decay")?);
        let read = lr.clone();
        let mut trainer = Engine::new(move |rates: &mut Vec<f64>, _, _| {
            rates.push(read.get()?);
            Ok(())
        });
        let schedule = LinearCyclical::new(1., 0., cycle).monotonic(true);
        let constant = CosineAnnealing::new(0.5, 0.5, 100);
        trainer
            .attach(ParamScheduler::new("lr", lr, schedule))
            .attach(ParamScheduler::new("decay", momentum, constant))
            .track("optimizer", &optimizer)
            .attach(Checkpoint::new(folder.path()));
        Ok(trainer)
    };
    let mut rates = vec![];
    make(4)?.run(&mut rates, vec![0.; 6], Until::epochs(1))?;
    assert_eq!(rates, [1., 0.75, 0.5, 0.25, 1., 0.75]);
    let error = text(make(8)?.resume(&mut rates, folder.path()));
    assert!(
        error.contains("resume_with(.., strict = false)") && error.contains("at event 6"),
        "{error}"
    );
    let mut longer = make(8)?;
    let told = longer.resume_with(&mut rates, folder.path(), false)?.unwrap().to_string();
    assert!(told.contains("changed since: handler 'lr': its schedule was"), "{told}");
    assert!(told.contains("it goes on at event 6") && !told.contains("'decay':"), "{told}");
    rates.clear();
    longer.run(&mut rates, vec![0.; 6], Until::epochs(2))?;
    // The rates are those of events 6 and 7 of the new schedule, not of 0 and 1, nor those of its second cycle.
    assert_eq!(rates[..2], [1. - 6. / 8., 1. - 7. / 8.]);
    Ok(())
}

#[test]
fn limits_of_time_and_samples_leave_the_rest_of_the_budget() -> Result<()> {
    let _serial = serial();
    type Sampled = Engine<'static, Vec<i64>, Batch, ()>;
    let make = |folder: &Path, saved_at: Event| -> Sampled {
        let mut trainer = Engine::new(|seen: &mut Vec<i64>, _, (x, _): Batch| {
            seen.extend(Vec::<i64>::try_from(x)?);
            anyhow::ensure!(seen.len() < 1000, "this run does not end");
            Ok(())
        });
        trainer.attach(Checkpoint::new(folder).on(saved_at));
        trainer
    };
    let x = Tensor::arange(10, (Kind::Int64, Device::Cpu));
    let data = || Loader::new(&x, &x, 4).unwrap().shuffle(3);
    let mut straight = vec![];
    make(tempfile::tempdir().unwrap().path(), Event::Completed).run(
        &mut straight,
        data(),
        Until::epochs(3),
    )?;
    type Limit = fn(Until) -> Until;
    let limits: [(&str, Limit, bool); 3] = [
        ("samples", |until| until.or_samples(8), false),
        ("time", |until| until.or_time(std::time::Duration::from_millis(60)), false),
        ("TimeLimit", |until| until, true),
    ];
    for (name, limit, handler) in limits {
        for saved_at in [Event::IterationCompleted, Event::Completed] {
            let folder = tempfile::tempdir().unwrap();
            let (mut seen, mut runs) = (vec![], 0);
            while seen.len() < straight.len() {
                runs += 1;
                assert!(runs < 20, "{name}: {seen:?}");
                let mut trainer = make(folder.path(), saved_at);
                if handler {
                    let limit = TimeLimit::new(std::time::Duration::from_millis(60)).unwrap();
                    trainer.attach(limit);
                }
                if name != "samples" {
                    let mut iterations = 0;
                    trainer.on(Event::IterationStarted, move |_, _| {
                        iterations += 1;
                        if iterations == 2 {
                            std::thread::sleep(std::time::Duration::from_millis(70));
                        }
                        Ok(())
                    });
                }
                trainer.resume(&mut seen, folder.path())?;
                trainer.run(&mut seen, data(), limit(Until::epochs(3)))?;
            }
            assert_eq!(seen, straight, "{name}, saved at {saved_at}");
            // An epoch has batches of 4, 4 and 2 samples, so there are several runs; a slow machine may need more of
            // them.
            assert!(runs >= 4, "{name}: {runs}");
        }
    }
    Ok(())
}

#[test]
fn random_numbers_drawn_between_resume_and_run_do_not_count() -> Result<()> {
    let _serial = serial();
    let mut straight = Program::new("SGD", 1)?;
    straight.run()?;
    let folder = tempfile::tempdir().unwrap();
    assert!(killed_at(Event::IterationCompleted, 5, "SGD", folder.path())?);
    let mut program = Program::new("SGD", 7)?;
    program.trainer.resume(&mut program.cx, folder.path())?.unwrap();
    let _ = Tensor::rand([3], (Kind::Float, Device::Cpu));
    program.run()?;
    let (outcome, expected) = (program.outcome()?, straight.outcome()?);
    assert!(outcome == expected, "{}", difference(&outcome, &expected));
    Ok(())
}

#[test]
fn what_ended_a_run_for_good_is_told_and_how_to_go_on() -> Result<()> {
    let _serial = serial();
    for saved_at in [Event::EpochCompleted, Event::Terminate, Event::Completed] {
        let folder = tempfile::tempdir().unwrap();
        let make = || {
            let mut trainer = seeing(folder.path(), saved_at);
            trainer.attach(EarlyStopping::max("mean", 1));
            trainer
        };
        let mut seen = vec![];
        let summary = make().run(&mut seen, vec![5, 5], Until::epochs(9))?;
        assert_eq!((summary.epochs, summary.stop), (2, Stop::Terminated));
        let expected = "handler 'early stopping on mean' of EPOCH_COMPLETED (epoch 2, iteration 4) had ended the run for good when this state was saved: the next run does no iterations; call resume_terminated() before it to go on all the same";
        for _ in 0..2 {
            let mut next = make();
            let told = next.resume(&mut seen, folder.path())?.unwrap();
            assert_eq!(told.restored.ended.as_deref(), Some(expected), "{saved_at}");
            assert!(told.to_string().contains(expected));
            let summary = next.run(&mut seen, vec![5, 5], Until::epochs(9))?;
            assert_eq!((summary.iterations, summary.stop), (4, Stop::Terminated), "{saved_at}");
            assert_eq!(summary.warnings, [expected]);
        }
        assert_eq!(seen.len(), 4);
        let mut next = make();
        next.resume(&mut seen, folder.path())?.unwrap();
        next.resume_terminated()?;
        let summary = next.run(&mut seen, vec![5, 9], Until::epochs(9))?;
        assert_eq!((summary.epochs, seen.len()), (4, 8), "the third was better");
        assert_eq!(summary.warnings, [""; 0]);
    }
    Ok(())
}

#[test]
fn epochs_are_passes_over_the_data_there_is_now() -> Result<()> {
    let _serial = serial();
    type Sampled = Engine<'static, Vec<(u64, i64)>, Batch, ()>;
    let make = |folder: &Path, saved_at: FilteredEvent| -> Sampled {
        let mut trainer =
            Engine::new(|seen: &mut Vec<(u64, i64)>, engine: &mut Sampled, (x, _): Batch| {
                let epoch = engine.state.epoch;
                seen.extend(Vec::<i64>::try_from(x)?.into_iter().map(|x| (epoch, x)));
                Ok(())
            });
        trainer.attach(Checkpoint::new(folder).on(saved_at));
        trainer
    };
    let x = Tensor::arange(12, (Kind::Int64, Device::Cpu));
    let data = |size| Loader::new(&x, &x, size).unwrap().shuffle(3);
    for event in [Event::GetBatchCompleted, Event::IterationStarted, Event::IterationCompleted] {
        for (before, after) in [(2, 4), (4, 2), (4, 3), (3, 5), (2, 12), (12, 5)] {
            let length = 12u64.div_ceil(before as u64);
            for n in 1..=2 * length {
                let folder = tempfile::tempdir().unwrap();
                let number = if event == Event::GetBatchCompleted { n - 1 } else { n };
                let mut first = make(folder.path(), event.filter(move |at| at == number));
                first.on(event, move |_, engine| {
                    if engine.state.iteration == number {
                        engine.interrupt();
                    }
                    Ok(())
                });
                let mut seen = vec![];
                first.run(&mut seen, data(before), Until::epochs(4))?;
                drop(first);
                let mut next = make(folder.path(), event.filter(|_| false));
                next.resume(&mut seen, folder.path())?.unwrap();
                let lengths = Rc::new(RefCell::new(vec![]));
                let own = lengths.clone();
                next.on(Event::EpochCompleted, move |_, engine| {
                    let state = &engine.state;
                    own.borrow_mut().push((state.epoch_length, engine.iteration_in_epoch()));
                    Ok(())
                });
                let summary = next.run(&mut seen, data(after), Until::epochs(4))?;
                let what = format!("{before} to {after}, {event} {n}");
                assert_eq!(summary.epochs, 4, "{what}");
                seen.sort();
                let passes: Vec<_> =
                    (1..=4).flat_map(|epoch| (0..12).map(move |x| (epoch, x))).collect();
                assert_eq!(seen, passes, "{what}");
                // Each run knows the number of its iterations before they are done.
                for (length, done) in lengths.take() {
                    assert_eq!(length, Some(done), "{what}");
                }
                let length = 12u64.div_ceil(after as u64);
                assert_eq!(next.state.epoch_length, Some(length), "{what}");
            }
        }
    }
    // An epoch length that the program gave stays as it is.
    let folder = tempfile::tempdir().unwrap();
    let mut first = make(folder.path(), Event::IterationCompleted.once(3));
    let until = Until::epochs(3).epoch_length(4);
    first.run(&mut vec![], data(4), until)?;
    let mut next = make(folder.path(), Event::IterationCompleted.filter(|_| false));
    let mut seen = vec![];
    next.resume(&mut seen, folder.path())?.unwrap();
    let summary = next.run(&mut seen, data(2), Until::epochs(3))?;
    assert_eq!((summary.iterations, seen.len()), (12, 18));
    Ok(())
}

#[test]
fn epochs_follow_batches_and_streams_of_another_length_too() -> Result<()> {
    let _serial = serial();
    for walked in [false, true] {
        for (before, after) in [(3u64, 5u64), (5, 3), (6, 2), (2, 7)] {
            for n in 1..=2 * before {
                let folder = tempfile::tempdir().unwrap();
                let run = |trainer: &mut Engine<'static, Vec<i64>, i64, f64>,
                           seen: &mut _,
                           length: i64| {
                    match walked {
                        true => trainer.run(seen, restartable(move || 0..length), Until::epochs(6)),
                        false => {
                            let data: Vec<i64> = (0..length).collect();
                            trainer.run(seen, data, Until::epochs(6))
                        }
                    }
                };
                let mut first = seeing(folder.path(), Event::IterationCompleted.once(n));
                first.on(Event::IterationCompleted.once(n), |_, engine| {
                    engine.interrupt();
                    Ok(())
                });
                run(&mut first, &mut vec![], before as i64)?;
                drop(first);
                let mut next = seeing(folder.path(), Event::Completed);
                next.resume(&mut vec![], folder.path())?.unwrap();
                let epochs = Rc::new(RefCell::new(vec![]));
                let own = epochs.clone();
                next.on(Event::EpochCompleted, move |seen: &mut Vec<i64>, _| {
                    own.borrow_mut().push(std::mem::take(seen));
                    Ok(())
                });
                let summary = run(&mut next, &mut vec![], after as i64)?;
                let what = format!("{before} to {after} at {n}, walked: {walked}");
                assert_eq!(summary.epochs, 6, "{what}");
                // There is no warning in the first pass of a stream, because its length is not known yet.
                assert_eq!(summary.warnings.is_empty(), walked && n <= before, "{what}");
                let whole: Vec<i64> = (0..after as i64).collect();
                let epochs = epochs.take();
                // Where the length is only found by walking through the data, epochs keep their old length to the end
                // of the pass.
                let settled = if walked { after.div_ceil(before) as usize + 1 } else { 1 };
                assert!(epochs.len() > settled || n > before, "{what}");
                for epoch in epochs.iter().skip(settled) {
                    assert_eq!(*epoch, whole, "{what}: {epochs:?}");
                }
            }
        }
    }
    Ok(())
}

/// Batches of numbers that tch's own `Iter2` shuffles with libtorch's random numbers.
fn shuffled(batch_size: i64) -> impl FnMut() -> tch::data::Iter2 {
    let x = Tensor::arange(8, (Kind::Int64, Device::Cpu));
    let images = x.shallow_clone();
    let m = tch::vision::dataset::Dataset {
        train_images: images,
        train_labels: x.shallow_clone(),
        test_images: x.shallow_clone(),
        test_labels: x,
        labels: 8,
    };
    move || {
        let mut iter = m.train_iter(batch_size);
        iter.shuffle();
        iter
    }
}

type Drawn = Engine<'static, Vec<(u64, i64)>, (Tensor, Tensor), f64>;

/// A trainer whose step draws random numbers.
fn drawing() -> Drawn {
    Engine::new(|seen: &mut Vec<(u64, i64)>, engine: &mut Drawn, (x, _)| {
        let epoch = engine.state.epoch;
        seen.extend(Vec::<i64>::try_from(x)?.into_iter().map(|x| (epoch, x)));
        Ok(Tensor::f_rand([1], (Kind::Double, Device::Cpu))?.double_value(&[0]))
    })
}

#[test]
fn an_order_drawn_from_libtorchs_random_numbers_goes_on_in_mid_pass() -> Result<()> {
    let _serial = serial();
    let until = Until::epochs(3);
    tch::manual_seed(7);
    let (mut straight, mut trainer) = (vec![], drawing());
    trainer.run(&mut straight, restartable(shuffled(2)), until)?;
    let last = trainer.state.output;
    for epoch in 0..3 {
        let mut pass: Vec<_> = straight[8 * epoch..8 * epoch + 8].iter().map(|(_, x)| *x).collect();
        pass.sort();
        assert_eq!(pass, (0..8).collect::<Vec<_>>());
    }
    for event in [Event::GetBatchCompleted, Event::IterationCompleted, Event::EpochCompleted] {
        for n in 1..=if event == Event::EpochCompleted { 3 } else { 12 } {
            let number = if event == Event::GetBatchCompleted { n - 1 } else { n };
            // The first run is suspended or fails. An error behind the step gives up no iteration, so both must go on
            // alike.
            for fails in [false, true] {
                let folder = tempfile::tempdir().unwrap();
                tch::manual_seed(7);
                let (mut seen, mut first) = (vec![], drawing());
                first.on(event.filter(move |at| at == number), move |_, engine| {
                    anyhow::ensure!(!fails, "once");
                    engine.interrupt();
                    Ok(())
                });
                let checkpoint = Checkpoint::new(folder.path()).on(Event::Completed);
                first.attach(checkpoint.on_exception(true));
                let stopped = first.run(&mut seen, restartable(shuffled(2)), until);
                assert_eq!(stopped.is_err(), fails);
                drop(first);
                tch::manual_seed(1000 + n as i64);
                let mut next = drawing();
                next.attach(Checkpoint::new(folder.path()).on(Event::Completed));
                next.resume(&mut seen, folder.path())?.unwrap();
                let summary = next.run(&mut seen, restartable(shuffled(2)), until)?;
                let what = format!("{event} {n}, fails: {fails}");
                assert_eq!(summary.warnings, [""; 0], "{what}");
                assert_eq!(seen, straight, "{what}");
                if next.state.output.is_some() {
                    assert_eq!(next.state.output, last, "the step's own numbers go on, {what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_order_is_drawn_again_in_the_same_engine_after_an_error() -> Result<()> {
    let _serial = serial();
    tch::manual_seed(7);
    let mut trainer = drawing();
    trainer.on(Event::IterationCompleted.once(2), |_, _| anyhow::bail!("once"));
    let mut seen = vec![];
    trainer.run(&mut seen, restartable(shuffled(2)), Until::epochs(2)).unwrap_err();
    let summary = trainer.run(&mut seen, restartable(shuffled(2)), Until::epochs(2))?;
    assert_eq!(summary.warnings, [""; 0]);
    seen.sort();
    let passes: Vec<_> = (1..=2).flat_map(|epoch| (0..8).map(move |x| (epoch, x))).collect();
    assert_eq!(seen, passes);
    // A state in ignite's format has no random numbers, so the summary must warn that the order is another one.
    let mut trainer = drawing();
    let state = serde_json::json!({"iteration": 2, "epoch_length": 4, "max_epochs": 2});
    trainer.load_state_dict(state.as_object().unwrap())?;
    let summary = trainer.run(&mut seen, restartable(shuffled(2)), Until::epochs(2))?;
    assert!(summary.warnings[0].contains("another order"), "{summary}");
    Ok(())
}

#[cfg(feature = "signals")]
#[test]
fn a_signal_during_a_search_ends_it_with_an_error() -> Result<()> {
    use tch_ignite::handlers::InterruptOn;
    let _serial = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::new("SGD", 1)?;
    program.trainer.attach(InterruptOn::signals()?).attach(Checkpoint::new(folder.path()));
    program.trainer.on(Event::IterationStarted.once(3), |_, _| {
        // A signal from another process may come only after the search.
        Ok(signal_hook::low_level::raise(signal_hook::consts::SIGTERM)?)
    });
    let before = program.outcome()?;
    let finder = LrFinder::new(&program.cx.optimizer, &program.vs).num_iter(9);
    let (trainer, cx) = (&mut program.trainer, &mut program.cx);
    let found = finder.run(trainer, cx, &program.data, |loss: &Tensor| loss.shallow_clone());
    assert!(text(found).contains("signal 15 came"));
    assert!(program.outcome()? == before && files(folder.path()).is_empty());
    Ok(())
}

/// A log that cannot be written to, of a handler that fails where a run is interrupted.
struct BrokenLog;

impl Log for BrokenLog {
    fn path(&self) -> PathBuf {
        "broken.csv".into()
    }
    fn commit(&self) -> Result<serde_json::Value> {
        Err(tch_ignite::Error::State("the disk is full".into()))
    }
    fn rewind(&self, _: &serde_json::Value) -> Result<Option<String>> {
        Ok(None)
    }
}

impl<C, B, O> Handler<C, B, O> for BrokenLog {
    fn spec(&self) -> Result<HandlerSpec> {
        let log: Rc<dyn Log> = Rc::new(BrokenLog);
        Ok(HandlerSpec::new("broken", Event::Interrupt).priority(Priority::Last).logs([log]))
    }
    fn call(&mut self, _: Event, _: &mut C, _: &mut Engine<'_, C, B, O>) -> anyhow::Result<()> {
        anyhow::bail!("the log cannot be flushed")
    }
}

#[test]
fn a_broken_log_keeps_no_checkpoint_from_being_written() -> anyhow::Result<()> {
    let _serial = serial();
    let folder = tempfile::tempdir()?;
    let make = || {
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.attach(BrokenLog).attach(Checkpoint::new(folder.path()).on_exception(true));
        trainer
    };
    let error = make().run(&mut (), vec![1., 2.], Until::epochs(3)).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("log 'broken.csv': the disk is full"), "{text}");
    for file in ["checkpoint_2.safetensors", "emergency.safetensors"] {
        verify(folder.path().join(file))?;
    }
    let resumed = make().resume(&mut (), folder.path())?;
    assert_eq!(resumed.map(|resumed| resumed.iteration), Some(2));

    let folder = tempfile::tempdir()?;
    let mut trainer = Engine::new(|_: &mut (), engine: &mut Engine<'_, _, _, _>, x: f64| {
        engine.interrupt();
        Ok(x)
    });
    trainer.attach(BrokenLog).attach(Checkpoint::new(folder.path()));
    let error = trainer.run(&mut (), vec![1., 2.], Until::epochs(3)).unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("handler 'broken' of INTERRUPT"), "{text}");
    verify(folder.path().join("interrupted.safetensors"))?;
    Ok(())
}

#[test]
fn a_run_that_goes_on_after_a_limit_leaves_the_rest_of_the_last_event() -> anyhow::Result<()> {
    let _serial = serial();
    let make = || {
        let mut trainer =
            Engine::new(|log: &mut Vec<u64>, engine: &mut Engine<'_, _, _, _>, ()| {
                log.push(engine.state.iteration);
                Ok(())
            });
        let evaluator = Engine::new(|log: &mut Vec<u64>, _, ()| {
            log.push(0);
            Ok(())
        });
        trainer.attach(Evaluate::on(Event::Completed, "last", evaluator, vec![()]));
        trainer
    };
    let mut first = make();
    first.on(Event::IterationCompleted.once(2), |_, engine| {
        engine.terminate_at_limit();
        Ok(())
    });
    first.run(&mut vec![], vec![(); 4], Until::epochs(1))?;
    let mut state = first.checkpoint(&vec![])?.copy()?;
    // As if a signal had stopped that evaluation.
    let mut engine = state.take_part("engine")?;
    let mut position: serde_json::Value = engine.value("position")?;
    let cursor = &mut position["position"]["cursor"];
    cursor["phase"] = "Completed".into();
    cursor["again"] = serde_json::json!({"handler": "evaluator last", "registration": 0});
    position["event"] = "COMPLETED".into();
    engine.set_value("position", position)?;
    state.set_part("engine", engine);
    let (mut resumed, mut log) = (make(), vec![]);
    resumed.restore(&mut log, state, true)?;
    resumed.run(&mut log, vec![(); 4], Until::epochs(1))?;
    assert_eq!(log, [3, 4, 0]);
    Ok(())
}
