//! Tests of engines in several processes that the launcher starts: decisions that they make together, metrics over
//! all ranks, and checkpoints.

#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::nn::{self, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::checkpoint::Checkpoint;
use tch_ignite::checkpoint::StateDict;
use tch_ignite::data::{DistributedSampler, Loader};
use tch_ignite::distributed::launch::{Ended, Launch};
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions,
};
use tch_ignite::engine::{Engine, Event, Handler, HandlerSpec, MetricValue, Stop, Until};
use tch_ignite::handlers::{
    EpochOutputStore, Evaluate, InterruptOn, LrFinder, SkipBatch, TerminateOnNan,
};
use tch_ignite::metrics::regression::MedianAbsoluteError;
use tch_ignite::metrics::{
    Accumulated, ConfusionMatrix, Mean, MeanSquaredError, Metric, RunningAverage, Usage, pair,
};
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::{
    Prediction, Supervised, create_supervised_evaluator, create_supervised_trainer,
};

const ROLE: &str = "TCH_IGNITE_TEST_ROLE";
const FOLDER: &str = "TCH_IGNITE_TEST_FOLDER";

/// The part of a test that this process is to play, and the folder for its results.
fn role() -> Option<(String, PathBuf)> {
    Some((std::env::var(ROLE).ok()?, PathBuf::from(std::env::var_os(FOLDER)?)))
}

/// Only one job runs at a time, because the launcher passes a signal to this process on to all its jobs.
static ONE: Mutex<()> = Mutex::new(());

fn start(test: &str, role: &str, ranks: usize, folder: &Path) -> Ended {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    Launch::new(ranks)
        .unwrap()
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .logs(folder.join("logs"))
        .grace(Duration::from_secs(1))
        .run()
        .unwrap()
}

/// Runs a job, whose ranks must succeed, and returns the numbers that each rank wrote.
fn outcomes(test: &str, role: &str, ranks: usize, folder: &Path) -> Vec<Vec<f64>> {
    let ended = start(test, role, ranks, folder);
    let log = |rank: usize| {
        std::fs::read_to_string(folder.join(format!("logs/rank-{rank}.log"))).unwrap_or_default()
    };
    let logs = || (0..ranks).map(log).collect::<Vec<_>>().join("\n---\n");
    assert_eq!((ended.code(), ended.failed), (0, None), "{}", logs());
    let outcome = |rank: usize| {
        let text = std::fs::read_to_string(folder.join(format!("outcome-{rank}"))).unwrap();
        text.lines().map(|bits| f64::from_bits(bits.parse().unwrap())).collect()
    };
    (0..ranks).map(outcome).collect()
}

fn leave(folder: &Path, pg: &ProcessGroup, values: &[f64]) {
    let lines: Vec<_> = values.iter().map(|value| value.to_bits().to_string()).collect();
    std::fs::write(folder.join(format!("outcome-{}", pg.rank())), lines.join("\n")).unwrap();
}

fn join() -> ProcessGroup {
    tch::set_num_threads(1);
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(60));
    ProcessGroup::from_env(options).unwrap()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        approx::assert_abs_diff_eq!(a, b, epsilon = 1e-12);
    }
}

fn samples(count: i64) -> (Tensor, Tensor) {
    let double = (Kind::Double, Device::Cpu);
    let x = (Tensor::arange(count * 6, double) * 0.7).sin().view([count, 6]);
    (x, (Tensor::arange(count, double) * 0.3).cos().view([count, 1]))
}

/// Trains from the newest checkpoint up to the number of iterations that the role begins with. An epoch has 4
/// iterations, and a step 12 samples over all ranks. Writes the parameters, the values after the last epoch, and the
/// loss of each iteration.
fn train(role: &str, folder: &Path) {
    let pg = join();
    let iterations: u64 = role.split(' ').next().unwrap().parse().unwrap();
    let asked = |what| role.split(' ').any(|word| word == what);
    let dropout = if asked("dropout") { 0.3 } else { 0. };
    tch::manual_seed(7);
    let mut vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let net = nn::seq_t()
        .add(nn::linear(&root / "a", 6, 32, Default::default()))
        .add_fn_t(move |x, train| x.tanh().dropout(dropout, train))
        .add(nn::linear(&root / "b", 32, 1, Default::default()));
    vs.double();
    let optimizer = Optimizer::adam(&vs).build().unwrap();
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    tch::manual_seed(7 + pg.rank() as i64);

    let (x, y) = samples(48);
    let sampler = DistributedSampler::of_group(48, &pg).unwrap().shuffle(3);
    let data = Loader::new(&x, &y, 12 / pg.world_size()).unwrap().sampler(sampler);
    let (x, y) = samples(11);
    let sampler = DistributedSampler::of_group(11, &pg).unwrap().uneven(true).unwrap();
    let test = Loader::new(&x, &y, 2).unwrap().sampler(sampler);

    let mut evaluator = create_supervised_evaluator();
    evaluator.metric("mse", MeanSquaredError::of(Prediction::parts));
    let mut trainer = create_supervised_trainer();
    trainer.distributed(&pg).agree_every(1);
    trainer
        .metric("epoch", Mean::new())
        .metric("running", RunningAverage::new())
        .metric_with("loss", Mean::new(), Usage::BatchWise)
        .attach(Evaluate::each_epoch("test", evaluator, test))
        .attach(Checkpoint::new(folder.join("checkpoints")).on(Event::IterationCompleted))
        .track("model", &vs)
        .track("optimizer", &optimizer);
    let curve = std::rc::Rc::new(std::cell::RefCell::new(vec![]));
    let losses = curve.clone();
    trainer.on(Event::IterationCompleted, move |_, engine| {
        losses.borrow_mut().push(engine.state.metrics.get("loss")?);
        losses.borrow_mut().push(engine.state.metrics.get("running")?);
        Ok(())
    });
    let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
    let mut cx = Supervised::new(net, optimizer, mse).data_parallel(ddp);
    if asked("windows") {
        cx = cx.accumulate(3).unwrap();
    }
    if asked("die") && pg.rank() == 1 {
        trainer.on(Event::IterationStarted.once(8), |_, _| {
            let id = std::process::id().to_string();
            assert!(Command::new("kill").args(["-KILL", &id]).status()?.success());
            Ok(())
        });
    }
    trainer.resume(&mut cx, folder.join("checkpoints")).unwrap();
    trainer.run(&mut cx, &data, Until::iterations(iterations)).unwrap();

    let mut values = vec![];
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (_, tensor) in variables {
        values.extend(Vec::<f64>::try_from(tensor.detach().reshape([-1])).unwrap());
    }
    for name in ["epoch", "test/mse"] {
        values.push(trainer.state.metrics.get(name).unwrap());
    }
    values.extend(curve.borrow().iter());
    leave(folder, &pg, &values);
}

/// How many numbers the parameters, and the values after the last epoch, are.
const ENDS: usize = 6 * 32 + 32 + 32 + 1 + 2;

fn checkpoints(folder: &Path) -> usize {
    let files = std::fs::read_dir(folder.join("checkpoints")).unwrap().flatten();
    files.filter(|file| file.path().extension().is_some_and(|ext| ext == "safetensors")).count()
}

#[test]
fn ranks_train_as_one_process_does() {
    const NAME: &str = "ranks_train_as_one_process_does";
    if let Some((role, folder)) = role() {
        return train(&role, &folder);
    }
    let of = |ranks: usize| {
        let folder = tempfile::tempdir().unwrap();
        let mut all = outcomes(NAME, "12", ranks, folder.path());
        assert_eq!(checkpoints(folder.path()), 1);
        let one = all.swap_remove(0);
        assert!(all.iter().all(|other| *other == one), "the ranks differ");
        one
    };
    let one = of(1);
    assert_eq!(one.len(), ENDS + 24);
    close(&of(2), &one);
}

#[test]
fn all_ranks_resume_one_checkpoint_also_with_another_number_of_them() {
    const NAME: &str = "all_ranks_resume_one_checkpoint_also_with_another_number_of_them";
    if let Some((role, folder)) = role() {
        return train(&role, &folder);
    }
    let straight = tempfile::tempdir().unwrap();
    let straight = outcomes(NAME, "12 dropout", 2, straight.path());
    // A run that is stopped in mid epoch goes on with the metrics and random numbers of both ranks.
    let folder = tempfile::tempdir().unwrap();
    outcomes(NAME, "7 dropout", 2, folder.path());
    assert_eq!(checkpoints(folder.path()), 1);
    go_on_as(&straight, &outcomes(NAME, "12 dropout", 2, folder.path()), 7);

    let straight = tempfile::tempdir().unwrap();
    let straight = outcomes(NAME, "12", 1, straight.path()).swap_remove(0);
    for (before, after) in [(2, 1), (2, 3)] {
        let folder = tempfile::tempdir().unwrap();
        outcomes(NAME, "7", before, folder.path());
        for rank in outcomes(NAME, "12", after, folder.path()) {
            close(&rank[..ENDS], &straight[..ENDS]);
            close(&rank[ENDS..], &straight[ENDS + 14..]);
        }
    }
}

/// Checks that from iteration `from` on a resumed run has the bits of the straight run.
fn go_on_as(straight: &[Vec<f64>], resumed: &[Vec<f64>], from: usize) {
    assert_eq!(straight.len(), resumed.len());
    for (resumed, straight) in resumed.iter().zip(straight) {
        let rest = &straight[ENDS + 2 * from..];
        assert_eq!(resumed[..ENDS - 2], straight[..ENDS - 2]);
        let losses = |values: &[f64]| values.iter().step_by(2).copied().collect::<Vec<_>>();
        assert_eq!(losses(&resumed[ENDS..]), losses(rest));
        // Metrics may differ by rounding, because the sums and averages of both ranks were joined in between.
        close(&resumed[ENDS - 2..], &[&straight[ENDS - 2..ENDS], rest].concat());
    }
}

#[test]
fn gradients_within_a_window_are_those_of_each_rank_again() {
    const NAME: &str = "gradients_within_a_window_are_those_of_each_rank_again";
    if let Some((role, folder)) = role() {
        return train(&role, &folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let straight = outcomes(NAME, "12 windows dropout", 2, folder.path());
    // The runs stop after the first and the second batch of a window of three.
    for stop in [5, 6] {
        let folder = tempfile::tempdir().unwrap();
        outcomes(NAME, &format!("{stop} windows dropout"), 2, folder.path());
        let resumed = outcomes(NAME, "12 windows dropout", 2, folder.path());
        go_on_as(&straight, &resumed, stop);
    }
}

#[test]
fn a_job_that_lost_a_rank_is_started_again_and_goes_on() {
    const NAME: &str = "a_job_that_lost_a_rank_is_started_again_and_goes_on";
    if let Some((role, folder)) = role() {
        return train(&role, &folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let straight = outcomes(NAME, "12 dropout", 3, folder.path());
    let folder = tempfile::tempdir().unwrap();
    let ended = start(NAME, "12 dropout die", 3, folder.path());
    use std::os::unix::process::ExitStatusExt;
    assert_eq!((ended.failed, ended.statuses[1].signal()), (Some(1), Some(9)));
    assert!(!ended.statuses[0].success() && !ended.statuses[2].success());
    assert_eq!(checkpoints(folder.path()), 1);
    go_on_as(&straight, &outcomes(NAME, "12 dropout", 3, folder.path()), 7);
}

#[test]
fn metrics_of_uneven_batches_are_those_of_one_process() {
    const NAME: &str = "metrics_of_uneven_batches_are_those_of_one_process";
    let values = |pg: &ProcessGroup| -> Vec<f64> {
        let double = (Kind::Double, Device::Cpu);
        let x = (Tensor::arange(11 * 3, double) * 0.7).sin().view([11, 3]);
        let y = (Tensor::arange(11, double) * 5.).to_kind(Kind::Int64).remainder(3);
        let sampler = DistributedSampler::of_group(11, pg).unwrap().uneven(true).unwrap();
        let data = Loader::new(&x, &y, 2).unwrap().sampler(sampler);
        let mut engine = Engine::new(|_: &mut (), _, (x, y): (Tensor, Tensor)| Ok((x, y)));
        engine.distributed(pg).uneven_batches(true);
        engine.metric("matrix", ConfusionMatrix::of(3, pair));
        let mut columns = Engine::new(|_: &mut (), _, (x, y): (Tensor, Tensor)| {
            Ok((x.select(1, 0), y.to_kind(Kind::Double)))
        });
        columns.distributed(pg).uneven_batches(true);
        columns.metric("mse", MeanSquaredError::of(pair));
        columns.metric("median", MedianAbsoluteError::of(pair));
        engine.run(&mut (), &data, Until::epochs(1)).unwrap();
        columns.run(&mut (), &data, Until::epochs(1)).unwrap();
        let matrix = engine.state.metrics.tensor("matrix").unwrap().to_kind(Kind::Double);
        let mut values = Vec::<f64>::try_from(matrix.reshape([-1])).unwrap();
        values.push(columns.state.metrics.get("mse").unwrap());
        values.push(columns.state.metrics.get("median").unwrap());
        values
    };
    if let Some((_, folder)) = role() {
        let pg = join();
        let values = values(&pg);
        return leave(&folder, &pg, &values);
    }
    tch::set_num_threads(1);
    let one = values(&ProcessGroup::single());
    for ranks in [2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let all = outcomes(NAME, "values", ranks, folder.path());
        assert!(all.iter().all(|rank| *rank == all[0]), "the ranks differ");
        close(&all[0], &one);
    }
}

#[test]
fn what_one_rank_asks_for_all_do_at_the_same_iteration() {
    const NAME: &str = "what_one_rank_asks_for_all_do_at_the_same_iteration";
    if let Some((role, folder)) = role() {
        let pg = join();
        let second = pg.rank() == 1;
        let batches = if role == "length" { 30 + pg.rank() } else { 30 };
        let what = role.clone();
        let mut trainer = Engine::new(move |_: &mut (), engine, _: ()| {
            let bad = second && what == "nan" && engine.state.iteration == 4;
            Ok(if bad { f64::NAN } else { 1. })
        });
        trainer.distributed(&pg);
        trainer.attach(TerminateOnNan::new()).attach(InterruptOn::signals().unwrap());
        let what = role.clone();
        trainer.on(Event::IterationCompleted.once(4), move |_, engine| {
            match what.as_str() {
                "terminate" if second => engine.terminate(),
                "signal" if second => {
                    let id = std::process::id().to_string();
                    assert!(Command::new("kill").args(["-TERM", &id]).status()?.success());
                    // Another thread may receive the signal, so this one waits for it.
                    std::thread::sleep(Duration::from_millis(200));
                }
                _ => {}
            }
            Ok(())
        });
        let result = trainer.run(&mut (), vec![(); batches], Until::epochs(2));
        let outcome = match (&result, role.as_str()) {
            (Ok(summary), "signal") => {
                assert_eq!(summary.stop, Stop::Signal(15));
                summary.iterations as f64
            }
            (Ok(summary), _) => {
                assert_eq!(summary.stop, Stop::Terminated);
                summary.iterations as f64
            }
            (Err(error), "length") => {
                let text = error.to_string();
                assert!(text.contains("rank 0 has 30, rank 1 has 31"), "{text}");
                0.
            }
            (Err(error), _) => panic!("{error:#}"),
        };
        return leave(&folder, &pg, &[outcome]);
    }
    for (role, iterations) in [("terminate", 11.), ("nan", 11.), ("signal", 11.), ("length", 0.)] {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(outcomes(NAME, role, 2, folder.path()), [[iterations], [iterations]], "{role}");
    }
}

#[test]
fn the_learning_rate_finder_gives_all_ranks_the_curve_of_their_mean_loss() {
    const NAME: &str = "the_learning_rate_finder_gives_all_ranks_the_curve_of_their_mean_loss";
    // The loss falls for some iterations, rises far in two, on rank 1 by less, and is small again.
    let loss = |rank: usize, iteration: u64| match iteration {
        ..6 => 10. - iteration as f64 + rank as f64,
        6..8 => 10f64.powi(iteration as i32 - 6 - rank as i32),
        _ => 0.5,
    };
    if let Some((role, folder)) = role() {
        let pg = join();
        let num_iter: u64 = role.parse().unwrap();
        let vs = VarStore::new(Device::Cpu);
        let _ = vs.root().zeros("w", &[1]);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
        let most = std::rc::Rc::new(std::cell::Cell::new(0f64));
        let (lr, highest) = (optimizer.knob("lr").unwrap(), most.clone());
        let rank = pg.rank();
        let mut trainer = Engine::new(move |_: &mut (), engine, _: ()| {
            highest.set(highest.get().max(lr.get()?));
            Ok(loss(rank, engine.state.iteration))
        });
        trainer.distributed(&pg);
        let finder = LrFinder::new(&optimizer, &vs).start_lr(0.1).end_lr(1.).smooth_f(0.);
        let finder = finder.num_iter(num_iter);
        let curve = finder.run(&mut trainer, &mut (), vec![(); 40], |loss: &f64| *loss).unwrap();
        assert!(most.get() <= 1., "{}", most.get());
        let mut values = vec![f64::from(u8::from(curve.diverged()))];
        values.extend(curve.loss());
        return leave(&folder, &pg, &values);
    }
    // The first search ends at the end of its learning rates, the second one because the loss has diverged.
    for (num_iter, iterations, diverged) in [(4, 5, 0.), (30, 7, 1.)] {
        let folder = tempfile::tempdir().unwrap();
        let all = outcomes(NAME, &num_iter.to_string(), 2, folder.path());
        let mean = |iteration| (loss(0, iteration) + loss(1, iteration)) / 2.;
        let expected: Vec<_> =
            std::iter::once(diverged).chain((1..=iterations).map(mean)).collect();
        assert_eq!(all, [expected.clone(), expected]);
    }
}

#[test]
fn handlers_of_all_ranks_keep_their_own_states() {
    const NAME: &str = "handlers_of_all_ranks_keep_their_own_states";
    if let Some((role, folder)) = role() {
        let pg = join();
        let rank = pg.rank();
        let mut trainer = Engine::new(move |_: &mut (), _, x: f64| Ok(x + 100. * rank as f64));
        trainer.distributed(&pg).agree_every(1);
        // Up to iteration 3 both ranks skip one batch, but not the same.
        let skip = SkipBatch::when(move |x: &f64| *x as usize % 3 == 2 - rank);
        let outputs = EpochOutputStore::of(|x: &f64| *x).tracked();
        let own = std::rc::Rc::new(std::cell::RefCell::new(Sum::default()));
        trainer.attach(skip.clone()).attach(outputs.clone()).attach(own.clone());
        trainer.metric("mean", Mean::new());
        trainer.attach(Checkpoint::new(folder.join("checkpoints")).on(Event::IterationCompleted));
        trainer.resume(&mut (), folder.join("checkpoints")).unwrap();
        let batches: Vec<_> = (0..12).map(f64::from).collect();
        let until = Until::iterations(role.parse().unwrap());
        trainer.run(&mut (), batches, until.epoch_length(8)).unwrap();
        let mut values = vec![skip.skipped() as f64, own.borrow().0];
        values.extend(outputs.data().iter());
        return leave(&folder, &pg, &values);
    }
    let straight = tempfile::tempdir().unwrap();
    let straight = outcomes(NAME, "6", 2, straight.path());
    assert_ne!(straight[0], straight[1]);
    let folder = tempfile::tempdir().unwrap();
    outcomes(NAME, "3", 2, folder.path());
    let file = folder.path().join("checkpoints/checkpoint_3.safetensors");
    let state = tch_ignite::checkpoint::read_state(file).unwrap();
    let handlers = state.part("ranks").unwrap().part("1").unwrap().part("handlers").unwrap();
    assert!(handlers.part("sum").is_ok() && handlers.part("epoch output store").is_ok());
    // The counts of skipped batches are equal, and the metric's state is that of all ranks together.
    assert!(handlers.part("metric mean").is_err());
    assert_eq!(outcomes(NAME, "6", 2, folder.path()), straight);
    // With another number of ranks the main rank goes on as before.
    for ranks in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        outcomes(NAME, "3", 2, folder.path());
        assert_eq!(outcomes(NAME, "6", ranks, folder.path())[0], straight[0]);
    }
}

/// Sums the outputs of its rank.
#[derive(Default)]
struct Sum(f64);

impl<C, B> Handler<C, B, f64> for Sum {
    fn spec(&self) -> tch_ignite::Result<HandlerSpec> {
        Ok(HandlerSpec::new("sum", Event::IterationCompleted))
    }

    fn save_state(&self) -> tch_ignite::Result<Option<StateDict>> {
        let mut state = StateDict::new();
        state.set_value("sum", self.0)?;
        Ok(Some(state))
    }

    fn load_state(&mut self, state: StateDict) -> tch_ignite::Result<()> {
        self.0 = state.value("sum")?;
        Ok(())
    }

    fn call(
        &mut self,
        _: Event,
        _: &mut C,
        engine: &mut Engine<'_, C, B, f64>,
    ) -> anyhow::Result<()> {
        self.0 += engine.state.output.unwrap_or_default();
        Ok(())
    }
}

#[test]
fn ranks_that_skip_different_numbers_of_batches_are_told() {
    const NAME: &str = "ranks_that_skip_different_numbers_of_batches_are_told";
    if let Some((role, folder)) = role() {
        let pg = join();
        let first = if role == "other" { pg.rank() } else { 0 };
        let skips = if role == "more" { 1 + pg.rank() } else { 1 };
        let mut trainer = Engine::new(|_: &mut (), _, _: usize| Ok(()));
        trainer.distributed(&pg);
        trainer.attach(SkipBatch::when(move |x: &usize| (first..first + skips).contains(x)));
        let until = Until::epochs(2).epoch_length(4);
        let summary = trainer.run(&mut (), (0..6).collect::<Vec<_>>(), until).unwrap();
        let told = summary.warnings.iter().filter(|text| text.contains("SkipBatch")).count();
        return leave(&folder, &pg, &[told as f64]);
    }
    for (role, told) in [("more", 1.), ("other", 0.), ("same", 0.)] {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(outcomes(NAME, role, 2, folder.path()), [[told], [told]], "{role}");
    }
}

/// Runs this test in a process that launches a rank, and returns the process.
fn launcher(test: &str, role: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env(FOLDER, folder);
    command
}

#[test]
fn a_signal_ends_a_process_whose_ranks_have_ended() {
    const NAME: &str = "a_signal_ends_a_process_whose_ranks_have_ended";
    if let Some((role, folder)) = role() {
        if role == "rank" {
            return;
        }
        // A second job is no different.
        for _ in 0..2 {
            start(NAME, "rank", 1, &folder);
        }
        let id = std::process::id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        return std::thread::sleep(Duration::from_secs(60));
    }
    let folder = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let status = launcher(NAME, "launcher", folder.path()).status().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(15), "{status}");
    assert!(begin.elapsed() < Duration::from_secs(50));
}

#[test]
fn the_last_output_of_ranks_is_shown_whatever_the_grace_is() {
    const NAME: &str = "the_last_output_of_ranks_is_shown_whatever_the_grace_is";
    const LINES: usize = 3000;
    if let Some((role, folder)) = role() {
        if role == "rank" {
            if std::env::var("RANK").unwrap() == "1" {
                (0..LINES).for_each(|line| println!("line {line} of a rank that prints a lot"));
                std::process::exit(3);
            }
            return;
        }
        let grace = if role == "max" { Duration::MAX } else { Duration::ZERO };
        let job = Launch::new(2).unwrap().env(ROLE, "rank").env(FOLDER, &folder).grace(grace);
        assert_eq!(job.run().unwrap().failed, Some(1));
        std::process::exit(0);
    }
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;
    for role in ["zero", "max"] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = launcher(NAME, role, folder.path());
        let mut job = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Nobody reads the launcher's output until the rank has ended, so that much of it is still in the pipes.
        let mut errors = BufReader::new(job.stderr.take().unwrap()).lines();
        assert!(errors.any(|line| line.unwrap().contains("rank 1 failed")), "{role}");
        let mut output = String::new();
        job.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        assert!(job.wait().unwrap().success(), "{role}");
        assert_eq!(output.matches("of a rank that prints a lot").count(), LINES, "{role}");
    }
}

#[test]
fn when_a_rank_fails_the_others_are_ended() {
    const NAME: &str = "when_a_rank_fails_the_others_are_ended";
    if role().is_some() {
        if std::env::var("RANK").unwrap() == "1" {
            std::process::exit(3);
        }
        return std::thread::sleep(Duration::from_secs(60));
    }
    let folder = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let ended = start(NAME, "fail", 3, folder.path());
    assert_eq!((ended.failed, ended.code()), (Some(1), 3));
    use std::os::unix::process::ExitStatusExt;
    assert_eq!([0, 2].map(|rank: usize| ended.statuses[rank].signal()), [Some(9), Some(9)]);
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_signal_goes_to_all_ranks() {
    const NAME: &str = "a_signal_goes_to_all_ranks";
    if let Some((_, folder)) = role() {
        let pg = join();
        let mut engine = Engine::new(|_: &mut (), _, _: ()| {
            std::thread::sleep(Duration::from_millis(5));
            Ok(())
        });
        engine.distributed(&pg).attach(InterruptOn::signals().unwrap());
        engine.on_main(Event::IterationCompleted.once(3), |_, _| {
            let parent = std::os::unix::process::parent_id().to_string();
            assert!(Command::new("kill").args(["-TERM", &parent]).status()?.success());
            Ok(())
        });
        let summary = engine.run(&mut (), vec![(); 2000], Until::epochs(1)).unwrap();
        assert_eq!(summary.stop, Stop::Signal(15));
        return leave(&folder, &pg, &[summary.iterations as f64]);
    }
    let folder = tempfile::tempdir().unwrap();
    let all = outcomes(NAME, "signal", 2, folder.path());
    assert_eq!(all[0], all[1]);
}

/// A metric that sums its inputs and fails in one of its methods, chosen by `role`.
struct Odd {
    sum: f64,
    role: String,
    loads: usize,
}

impl Metric<f64> for Odd {
    fn reset(&mut self) {
        self.sum = 0.;
    }

    fn update(&mut self, x: &f64) -> anyhow::Result<()> {
        assert!(!self.role.contains("update"), "odd in update");
        self.sum += x;
        Ok(())
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        assert!(!self.role.contains("compute"), "odd in compute");
        Ok(self.sum.into())
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        assert!(self.role != "state" || self.sum == 0., "odd in state");
        let sum = Tensor::from(self.sum);
        Ok(vec![Accumulated::new("sum", sum, tch_ignite::metrics::Reduce::Sum)])
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        self.loads += 1;
        // The engine loads the joined state of all ranks first, then the rank's own state.
        anyhow::ensure!(self.role != "back" || self.loads != 2, "odd in load_state");
        anyhow::ensure!(self.role != "saved", "a checkpoint loads no metric");
        self.sum = f64::try_from(Accumulated::find(state, "sum")?)?;
        Ok(())
    }
}

#[test]
fn a_metric_that_fails_where_ranks_join_is_named_and_counts_nothing_twice() {
    const NAME: &str = "a_metric_that_fails_where_ranks_join_is_named_and_counts_nothing_twice";
    if let Some((role, folder)) = role() {
        let pg = join();
        // Only the main rank's metric fails. Each rank has one batch of 1 and one of 2.
        let odd = if pg.is_main() { role.clone() } else { String::new() };
        let mut trainer = Engine::new(|_: &mut (), _, x: f64| Ok(x));
        trainer.distributed(&pg).metric("first", Mean::new());
        let usage = if role == "update" { Usage::RunningBatchWise } else { Usage::EpochWise };
        trainer.metric_with("odd", Odd { sum: 0., role: odd, loads: 0 }, usage);
        trainer.metric("last", Mean::new());
        if role == "saved" {
            // The checkpoint is written in mid epoch, when the metric has accumulated something. The run then ends,
            // because the value at the epoch's end is not tested here.
            let checkpoint = Checkpoint::new(folder.join("checkpoints"));
            trainer.attach(checkpoint.on(Event::IterationCompleted.once(1)));
            trainer.agree_every(1).on(Event::IterationCompleted.once(1), |_, engine| {
                engine.terminate();
                Ok(())
            });
        }
        let ended = trainer.run(&mut (), vec![1., 2.], Until::epochs(1));
        let text = match ended {
            Ok(_) => String::new(),
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        std::fs::write(folder.join(format!("error-{}", pg.rank())), text).unwrap();
        return;
    }
    for (role, said) in [
        ("update", "handler 'metric odd' of ITERATION_COMPLETED failed"),
        ("compute", "odd in compute"),
        ("state", "odd in state"),
        ("back", "its own state could not be put back, and was reset"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        start(NAME, role, 2, folder.path());
        let text = std::fs::read_to_string(folder.path().join("error-0")).unwrap();
        assert!(text.contains("'metric odd'") && text.contains(said), "{role}: {text}");
        assert!(!text.contains("data source"), "{role}: {text}");
    }
    // A checkpoint in mid epoch has the sums of both ranks, and no metric is loaded for it.
    let folder = tempfile::tempdir().unwrap();
    start(NAME, "saved", 2, folder.path());
    for rank in 0..2 {
        let text = std::fs::read_to_string(folder.path().join(format!("error-{rank}"))).unwrap();
        assert_eq!(text, "", "rank {rank}");
    }
    let file = folder.path().join("checkpoints/checkpoint_1.safetensors");
    let state = tch_ignite::checkpoint::read_state(file).unwrap();
    let odd = state.part("handlers").unwrap().part("metric odd").unwrap();
    assert_eq!(f64::try_from(odd.tensor("sum").unwrap()).unwrap(), 2.);
}
