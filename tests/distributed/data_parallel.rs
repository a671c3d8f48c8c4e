//! Tests that several processes train the same model as one process with their batches joined.

use std::time::Duration;

use tch::nn::{self, Module, ModuleT, OptimizerConfig, VarStore};
use tch::{Device, Kind, Tensor};
use tch_ignite::amp::GradScaler;
use tch_ignite::distributed::{
    Compression, DdpOptions, DistributedDataParallel, FailureKind, ProcessGroup,
    ProcessGroupOptions,
};
use tch_ignite::handlers::EMAHandler;
use tch_ignite::optim::Optimizer;
use tch_ignite::supervised::Supervised;
use tch_ignite::{Error, GradientAccumulator, WeightedLoss};

use crate::ranks::{Ranks, role};

fn join() -> ProcessGroup {
    tch::set_num_threads(1);
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(30));
    ProcessGroup::from_env_or_single(options).unwrap()
}

/// Samples and targets, computed from a formula, so that they are the same in all processes.
pub fn data(kind: Kind) -> (Tensor, Tensor) {
    let x = (Tensor::arange(96 * 6, (Kind::Double, Device::Cpu)) * 0.7).sin().view([96, 6]);
    let y = (Tensor::arange(96, (Kind::Double, Device::Cpu)) * 0.3).cos().view([96, 1]);
    (x.to_kind(kind), y.to_kind(kind))
}

fn net(vs: &VarStore) -> nn::Sequential {
    let root = vs.root();
    let layer = |name: &str, from, to| nn::linear(&root / name, from, to, Default::default());
    nn::seq()
        .add(layer("a", 6, 32))
        .add_fn(|x| x.tanh())
        .add(layer("b", 32, 32))
        .add_fn(|x| x.tanh())
        .add(layer("c", 32, 1))
}

/// All parameters in one row, in the order of their names.
fn flat(vs: &VarStore) -> Tensor {
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    let rows: Vec<_> = variables.iter().map(|(_, tensor)| tensor.detach().reshape([-1])).collect();
    Tensor::cat(&rows, 0)
}

pub fn print(case: &str, values: &Tensor) {
    let values = Vec::<f64>::try_from(values.to_kind(Kind::Double)).unwrap();
    let bits: Vec<_> = values.iter().map(|value| format!("{:016x}", value.to_bits())).collect();
    println!("\nCASE {case} = {}", bits.join(" "));
}

/// The names of the cases that a rank printed, and the numbers of each.
pub fn printed(output: &str) -> Vec<(&str, Vec<f64>)> {
    let case = |line: &'_ str| -> Option<(usize, usize)> {
        line.starts_with("CASE ").then(|| (5, line.find(" = ").unwrap()))
    };
    output
        .lines()
        .filter_map(|line| {
            let (from, to) = case(line)?;
            let bits = line[to + 3..].split(' ');
            let values = bits.map(|bits| f64::from_bits(u64::from_str_radix(bits, 16).unwrap()));
            Some((&line[from..to], values.collect()))
        })
        .collect()
}

#[derive(Debug, Clone, Copy)]
struct Case {
    adamw: bool,
    fused: bool,
    accumulate: u64,
    bucket_cap_mb: f64,
    view: bool,
}

fn train(pg: &ProcessGroup, case: Case) -> Tensor {
    const STEPS: i64 = 24;
    // Each rank makes other weights; all must then get those of rank 0.
    tch::manual_seed(5 + pg.rank() as i64);
    let mut vs = VarStore::new(Device::Cpu);
    let net = net(&vs);
    vs.double();
    let optimizer = if case.adamw {
        Optimizer::adamw(&vs).lr(1e-2).build().unwrap()
    } else {
        let momentum = nn::Sgd { momentum: 0.9, wd: 1e-3, ..Default::default() };
        Optimizer::builder(momentum, &vs).lr(0.05).build().unwrap()
    };
    optimizer.set_fused(case.fused).unwrap();
    let options =
        DdpOptions::new().bucket_cap_mb(case.bucket_cap_mb).gradient_as_bucket_view(case.view);
    let ddp = DistributedDataParallel::new(pg, &vs, options).unwrap();
    let ema = EMAHandler::new(&vs, 0.1).unwrap();
    let mut cx =
        Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, tch::Reduction::Mean))
            .data_parallel(ddp)
            .clip_grad_norm(0.5)
            .accumulate(case.accumulate)
            .unwrap();
    let (x, y) = data(Kind::Double);
    // Each step uses 24 samples, divided among the ranks and accumulated batches.
    let (world, rank) = (pg.world_size() as i64, pg.rank() as i64);
    let local = 24 / case.accumulate as i64 / world;
    for iteration in 0..STEPS * case.accumulate as i64 {
        let from = (iteration * local * world) % 96 + rank * local;
        let _ = cx.train_step((x.narrow(0, from, local), y.narrow(0, from, local))).unwrap();
        if (iteration + 1) % case.accumulate as i64 == 0 {
            ema.update().unwrap();
        }
    }
    let averages = ema.averages();
    let mut averages: Vec<_> = averages.iter().map(|(name, t)| (name, t.reshape([-1]))).collect();
    averages.sort_by_key(|(name, _)| *name);
    let averages: Vec<_> = averages.into_iter().map(|(_, tensor)| tensor).collect();
    Tensor::cat(&[flat(&vs), Tensor::cat(&averages, 0)], 0)
}

#[test]
fn two_and_four_ranks_train_as_one_does() {
    const NAME: &str = "data_parallel::two_and_four_ranks_train_as_one_does";
    if role().is_some() {
        let pg = join();
        for adamw in [false, true] {
            for (fused, accumulate, bucket_cap_mb, view) in [
                (true, 1, 25., false),
                (true, 1, 0.001, true),
                (false, 3, 0.004, false),
                (true, 3, 25., true),
                (false, 1, 0.001, true),
            ] {
                let case = Case { adamw, fused, accumulate, bucket_cap_mb, view };
                print(&format!("{case:?}"), &train(&pg, case));
            }
        }
        return;
    }
    let one = Ranks::start(NAME, "all", 1).succeed().remove(0);
    let one = printed(&one);
    assert_eq!(one.len(), 10);
    for world in [2, 4] {
        let outputs = Ranks::start(NAME, "all", world).succeed();
        let ranks: Vec<_> = outputs.iter().map(|output| printed(output)).collect();
        for rank in 1..world {
            assert!(ranks[rank] == ranks[0], "rank {rank} of {world} has other bits");
        }
        for ((case, expected), (_, values)) in one.iter().zip(&ranks[0]) {
            let difference = expected.iter().zip(values).map(|(a, b)| (a - b).abs());
            let difference = difference.fold(0., f64::max);
            println!("{world} ranks, {case}: {difference:e}");
            assert!(difference < 1e-12, "{world} ranks, {case}: {difference}");
        }
    }
    // Cases with accumulation give the same step as those with the joined batch.
    let of = |index: usize| &one[index].1;
    for (a, b) in [(0, 3), (5, 8)] {
        let difference = of(a).iter().zip(of(b)).map(|(a, b)| (a - b).abs()).fold(0., f64::max);
        assert!(difference < 1e-12, "{difference}");
    }
}

/// Trains on batches of 1 to 4 samples each, or of some tokens and padding, in windows of `accumulate` batches, the
/// last of which is cut short. With a group each of two ranks has its own batches; without one, all samples of a
/// window are one batch.
fn train_unequal(pg: Option<&ProcessGroup>, accumulate: u64, tokens: bool) -> Tensor {
    tch::manual_seed(5);
    let mut vs = VarStore::new(Device::Cpu);
    let net = net(&vs);
    vs.double();
    let optimizer = Optimizer::adamw(&vs).lr(1e-2).build().unwrap();
    let loss = move |y_pred: &Tensor, y: &Tensor| {
        let square = (y_pred - y).square();
        if !tokens {
            return WeightedLoss::from(square.mean(Kind::Double));
        }
        let mask = y.ge(-0.7).to_kind(Kind::Double);
        let count = mask.sum(Kind::Double);
        ((square * mask).sum(Kind::Double) / count.clamp_min(1.), count).into()
    };
    let mut cx = Supervised::new(net, optimizer, loss).clip_grad_norm(0.5);
    if let Some(pg) = pg {
        let ddp = DistributedDataParallel::new(pg, &vs, DdpOptions::new()).unwrap();
        cx = cx.data_parallel(ddp).accumulate(accumulate).unwrap();
    }
    let (x, y) = data(Kind::Double);
    // The samples are mixed, so that no window is all padding.
    let order = (Tensor::arange(96, (Kind::Int64, Device::Cpu)) * 37).remainder(96);
    let (x, y) = (x.index_select(0, &order), y.index_select(0, &order));
    let mut from = 0;
    for window in 0..6 {
        let (mut xs, mut ys) = (vec![], vec![]);
        let batches = accumulate as i64 - i64::from(window == 5 && accumulate > 1);
        for index in 0..batches {
            for rank in 0..2 {
                let size = 1 + (3 * window + 2 * index + 5 * rank) % 4;
                let batch = (x.narrow(0, from % 90, size), y.narrow(0, from % 90, size));
                from += size;
                match pg {
                    Some(pg) if pg.rank() as i64 == rank => drop(cx.train_step(batch).unwrap()),
                    Some(_) => {}
                    None => {
                        xs.push(batch.0);
                        ys.push(batch.1);
                    }
                }
            }
        }
        if pg.is_none() {
            let _ = cx.train_step((Tensor::cat(&xs, 0), Tensor::cat(&ys, 0))).unwrap();
        }
    }
    assert_eq!(cx.finish_window().unwrap(), pg.is_some() && accumulate > 1);
    flat(&vs)
}

#[test]
fn ranks_with_unequal_batches_train_as_one_does_with_all_samples() {
    if role().is_none() {
        let test = "data_parallel::ranks_with_unequal_batches_train_as_one_does_with_all_samples";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    for tokens in [false, true] {
        for accumulate in 1..4 {
            let one = train_unequal(None, accumulate, tokens);
            let ours = train_unequal(Some(&pg), accumulate, tokens);
            let difference = (&one - &ours).abs().max().double_value(&[]);
            assert!(difference < 1e-12, "{tokens} {accumulate}: {difference:e}");
            let all = pg.all_gather(&ours).unwrap();
            assert_eq!(all[0], all[1]);
        }
    }
    // Equal batches give the same bits as without weights, which is torch's way.
    let (x, y) = data(Kind::Float);
    let train = |equal: bool| {
        tch::manual_seed(5);
        let vs = VarStore::new(Device::Cpu);
        let net = net(&vs);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
        let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
        let mse = |y_pred: &Tensor, y: &Tensor| y_pred.mse_loss(y, tch::Reduction::Mean);
        let mut cx = Supervised::new(net, optimizer, mse).data_parallel(ddp).accumulate(3).unwrap();
        if equal {
            cx = cx.equal_weights();
        }
        for iteration in 0..6 {
            let from = 14 * iteration + 7 * pg.rank() as i64;
            let _ = cx.train_step((x.narrow(0, from, 7), y.narrow(0, from, 7))).unwrap();
        }
        flat(&vs)
    };
    assert_eq!(train(false), train(true));
}

/// A model with batch normalisation.
fn normalised(vs: &VarStore) -> nn::SequentialT {
    let root = vs.root();
    nn::seq_t()
        .add(nn::linear(&root / "a", 6, 8, Default::default()))
        .add(nn::batch_norm1d(&root / "bn", 8, Default::default()))
        .add_fn(|x| x.relu())
        .add(nn::linear(&root / "b", 8, 1, Default::default()))
}

#[test]
fn buffers_follow_rank_0_unless_told_otherwise() {
    if role().is_none() {
        Ranks::start("data_parallel::buffers_follow_rank_0_unless_told_otherwise", "all", 2)
            .succeed();
        return;
    }
    let pg = join();
    let (x, _) = data(Kind::Float);
    let own = x.narrow(0, 20 * pg.rank() as i64, 20);
    for broadcast in [true, false] {
        tch::manual_seed(pg.rank() as i64);
        let vs = VarStore::new(Device::Cpu);
        let net = normalised(&vs);
        let options = DdpOptions::new().broadcast_buffers(broadcast);
        let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
        let step = || {
            let loss = ddp.forward(|| net.forward_t(&own, true)).unwrap().mean(Kind::Float);
            for parameter in vs.trainable_variables() {
                let _ = parameter.grad().defined().then(|| parameter.grad().zero_());
            }
            ddp.backward(&loss).unwrap();
        };
        step();
        // Until the next forward each rank has its own running mean.
        let mean = &vs.variables()["bn.running_mean"];
        let means = pg.all_gather(mean).unwrap();
        assert_ne!(means[0], means[1]);
        step();
        let means = pg.all_gather(mean).unwrap();
        let expected = |before: &Tensor, rank: i64| {
            let x = x.narrow(0, 20 * rank, 20);
            let hidden = x.linear(&vs.variables()["a.weight"], Some(&vs.variables()["a.bias"]));
            before * 0.9 + hidden.mean_dim(0i64, false, Kind::Float) * 0.1
        };
        // Rank 1 has continued rank 0's mean if buffers are broadcast, and its own otherwise.
        let first = |rank| expected(&Tensor::zeros([8], (Kind::Float, Device::Cpu)), rank);
        let before = first(if broadcast { 0 } else { 1 });
        let difference = (expected(&before, 1) - &means[1]).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{broadcast}: {difference}");
    }
}

#[test]
fn parameters_without_gradients() {
    if role().is_none() {
        Ranks::start("data_parallel::parameters_without_gradients", "all", 2).succeed();
        return;
    }
    let pg = join();
    let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
    let model = |find| {
        let vs = VarStore::new(Device::Cpu);
        let root = vs.root();
        let layer = |name: &str| nn::linear(&root / name, 3, 1, Default::default());
        let layers = [layer("all"), layer("one"), layer("none"), layer("frozen")];
        let mut frozen = vs.variables();
        for name in ["frozen.weight", "frozen.bias"] {
            let _ = frozen.get_mut(name).unwrap().set_requires_grad(false);
        }
        let options = DdpOptions::new().find_unused_parameters(find);
        let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
        (vs, layers, ddp)
    };
    let (vs, layers, ddp) = model(true);
    for _ in 0..3 {
        let loss = ddp.forward(|| {
            let y = layers[0].forward(&x) + layers[3].forward(&x);
            if pg.is_main() { y + layers[1].forward(&x) } else { y }
        });
        ddp.backward(&loss.unwrap().sum(Kind::Float)).unwrap();
    }
    let gradient = |name: &str| vs.variables()[name].grad();
    assert!(!gradient("none.weight").defined() && !gradient("frozen.weight").defined());
    // After three backwards without zeroing, the gradients are sums, and half of rank 0's gradient where rank 1 has
    // none.
    let values =
        |name| Vec::<f64>::try_from(gradient(name).view([-1]).to_kind(Kind::Double)).unwrap();
    assert_eq!(values("all.weight").len(), 3);
    assert!(values("one.weight").iter().all(|value| *value > 0.));

    let (_vs, layers, ddp) = model(false);
    let step = || -> Result<(), Error> {
        let loss = ddp.forward(|| layers[0].forward(&x))?.sum(Kind::Float);
        ddp.backward(&loss)
    };
    step().unwrap();
    let text = step().unwrap_err().to_string();
    assert!(text.contains("Expected to have finished reduction"), "{text}");
}

#[test]
fn compression_rounds_gradients_and_all_ranks_stay_alike() {
    if role().is_none() {
        let test = "data_parallel::compression_rounds_gradients_and_all_ranks_stay_alike";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let (x, y) = data(Kind::Float);
    let own = |t: &Tensor| t.narrow(0, 48 * pg.rank() as i64, 48);
    let trained = |compression| {
        tch::manual_seed(3);
        let vs = VarStore::new(Device::Cpu);
        let net = net(&vs);
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
        let options = DdpOptions::new().compression(compression);
        let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
        for _ in 0..10 {
            let y_pred = ddp.forward(|| net.forward(&own(&x))).unwrap();
            optimizer.zero_grad().unwrap();
            ddp.backward(&y_pred.mse_loss(&own(&y), tch::Reduction::Mean)).unwrap();
            optimizer.step().unwrap();
        }
        let all = pg.all_gather(&flat(&vs)).unwrap();
        assert_eq!(all[0], all[1], "{compression:?}");
        all[0].shallow_clone()
    };
    let exact = trained(Compression::None);
    for (compression, bound) in [(Compression::Fp16, 1e-3), (Compression::Bf16, 1e-2)] {
        let difference = (trained(compression) - &exact).abs().max().double_value(&[]);
        assert!(difference > 0. && difference < bound, "{compression:?}: {difference}");
    }
}

#[test]
fn a_scaler_skips_on_all_ranks_what_overflows_on_one() {
    if role().is_none() {
        let test = "data_parallel::a_scaler_skips_on_all_ranks_what_overflows_on_one";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let vs = VarStore::new(Device::Cpu);
    let net = net(&vs);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    let scaler = GradScaler::new();
    let mut cx =
        Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, tch::Reduction::Mean))
            .data_parallel(ddp)
            .autocast(Kind::BFloat16)
            .grad_scaler(scaler.clone());
    let (x, y) = data(Kind::Float);
    for iteration in 0..6 {
        let bad = iteration == 3 && !pg.is_main();
        let x = if bad { &x * f64::INFINITY } else { x.shallow_clone() };
        let _ = cx.train_step((x, y.shallow_clone())).unwrap();
    }
    assert_eq!((scaler.skipped().unwrap(), scaler.get_scale().unwrap()), (1, 32768.));
    let all = pg.all_gather(&flat(&vs)).unwrap();
    assert_eq!(all[0], all[1]);
    assert!(bool::try_from(all[0].isfinite().all()).unwrap());
}

#[test]
fn what_is_left_of_a_window_is_averaged() {
    if role().is_none() {
        let test = "data_parallel::what_is_left_of_a_window_is_averaged";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let vs = VarStore::new(Device::Cpu);
    let net = net(&vs);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    let mut cx =
        Supervised::new(net, optimizer, |y_pred, y| y_pred.mse_loss(y, tch::Reduction::Mean))
            .data_parallel(ddp)
            .accumulate(4)
            .unwrap();
    let (x, y) = data(Kind::Float);
    let before = flat(&vs);
    for iteration in 0..6 {
        let from = 10 * iteration + 5 * pg.rank() as i64;
        let _ = cx.train_step((x.narrow(0, from, 5), y.narrow(0, from, 5))).unwrap();
    }
    assert!(cx.finish_window().unwrap());
    assert_ne!(flat(&vs), before);
    let all = pg.all_gather(&flat(&vs)).unwrap();
    assert_eq!(all[0], all[1]);
}

/// Two layers of equal shapes, of which each rank uses another one, and one that nobody uses.
fn choice(vs: &VarStore) -> [nn::Linear; 3] {
    let root = vs.root();
    ["a", "b", "unused"].map(|name| nn::linear(&root / name, 6, 1, Default::default()))
}

#[test]
fn what_is_left_of_a_window_is_averaged_by_parameter() {
    if role().is_none() {
        let test = "data_parallel::what_is_left_of_a_window_is_averaged_by_parameter";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let (x, _) = data(Kind::Float);
    let x = x.narrow(0, 5 * pg.rank() as i64, 5);
    let vs = VarStore::new(Device::Cpu);
    let layers = choice(&vs);
    let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
    let options = DdpOptions::new().find_unused_parameters(true);
    let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
    let mut accumulator = GradientAccumulator::new(3).unwrap().data_parallel(ddp);
    let window = accumulator.next_window();
    accumulator.begin(&optimizer, window).unwrap();
    let loss = accumulator.forward(|| layers[pg.rank()].forward(&x).mean(Kind::Float)).unwrap();
    assert!(!accumulator.backward(&optimizer, &loss, 5).unwrap());
    let own = vs.variables()[["a.weight", "b.weight"][pg.rank()]].grad().copy();
    assert!(accumulator.finish(&optimizer).unwrap());
    // The window has 10 samples of 2 ranks instead of 5, and each layer got half of them.
    let of_ranks = pg.all_gather(&(own * 3. / 2.)).unwrap();
    for (name, expected) in ["a.weight", "b.weight"].into_iter().zip(&of_ranks) {
        let gradient = vs.variables()[name].grad();
        assert!((gradient - expected).abs().max().double_value(&[]) < 1e-6, "{name}");
    }
    assert!(!vs.variables()["unused.weight"].grad().defined());
}

#[test]
fn a_rank_whose_last_batch_has_weight_0_adds_nothing() {
    if role().is_none() {
        let test = "data_parallel::a_rank_whose_last_batch_has_weight_0_adds_nothing";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let (x, _) = data(Kind::Double);
    let nan = Tensor::from(f64::NAN);
    for (find_unused, view, steps, without_graph) in [
        (false, false, 1, false),
        (false, true, 2, false),
        (true, false, 2, false),
        (true, false, 1, false),
        (false, false, 2, true),
        (true, false, 1, true),
    ] {
        let mut vs = VarStore::new(Device::Cpu);
        let layers = choice(&vs);
        vs.double();
        let optimizer = Optimizer::sgd(&vs).lr(0.1).build().unwrap();
        let options =
            DdpOptions::new().find_unused_parameters(find_unused).gradient_as_bucket_view(view);
        let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
        let mut accumulator = GradientAccumulator::new(steps).unwrap().data_parallel(ddp);
        let used = if find_unused { &layers[..2] } else { &layers[..] };
        let mean = |x: &Tensor| {
            used.iter().map(|layer| layer.forward(x).mean(Kind::Double)).sum::<Tensor>()
        };
        // The group goes on after such a window.
        for round in 0..2 {
            let mut seen = vec![];
            for step in 0..steps as i64 {
                let window = accumulator.next_window();
                accumulator.begin(&optimizer, window).unwrap();
                for rank in 0..2 {
                    let from = 20 * round + 10 * step + 5 * rank;
                    let batch = x.narrow(0, from, 3 + rank);
                    let empty = round == 0 && window.last && rank == 1;
                    if !empty {
                        seen.push(batch.shallow_clone());
                    }
                    if pg.rank() as i64 != rank {
                        continue;
                    }
                    let forward = || match (empty, without_graph) {
                        (false, _) => mean(&batch),
                        (true, false) => mean(&batch) * &nan,
                        (true, true) => nan.shallow_clone(),
                    };
                    let loss = accumulator.forward(forward).unwrap();
                    let weight = if empty { 0 } else { 3 + rank };
                    let ready = accumulator.backward(&optimizer, &loss, weight).unwrap();
                    assert_eq!(ready, window.last);
                }
            }
            let all = Tensor::cat(&seen, 0).mean_dim(0i64, true, Kind::Double);
            let case = format!("{find_unused} {view} {steps} {without_graph} {round}");
            for name in ["a", "b", "unused"] {
                let gradient = vs.variables()[&format!("{name}.weight")].grad();
                if name == "unused" && find_unused {
                    // A loss without a graph does not say what is unused.
                    assert!(without_graph || !gradient.defined(), "{case}");
                    continue;
                }
                let difference = (gradient - &all).abs().max().double_value(&[]);
                assert!(difference < 1e-12, "{case} {name}: {difference}");
            }
        }
    }
}

#[test]
fn models_that_differ_are_refused() {
    if role().is_none() {
        Ranks::start("data_parallel::models_that_differ_are_refused", "all", 2).succeed();
        return;
    }
    let pg = join();
    let odd = pg.rank() as i64;
    let refused = |vs: &VarStore, options: DdpOptions| -> String {
        match DistributedDataParallel::new(&pg, vs, options).unwrap_err() {
            Error::Distributed { kind: FailureKind::Mismatch, message, .. } => message,
            other => panic!("{other}"),
        }
    };
    let vs = VarStore::new(Device::Cpu);
    let _ = nn::linear(vs.root() / "a", 2 + odd, 3, Default::default());
    assert_eq!(
        refused(&vs, DdpOptions::new()),
        "the models are not alike: rank 0 has a.weight [3, 2] Float, rank 1 has a.weight [3, 3] Float"
    );
    let vs = VarStore::new(Device::Cpu);
    for layer in 0..2 + odd {
        let _ = nn::linear(vs.root() / layer, 2, 2, Default::default());
    }
    let text = refused(&vs, DdpOptions::new());
    assert!(text.contains("rank 0 has nothing more, rank 1 has 2."), "{text}");
    let vs = VarStore::new(Device::Cpu);
    let _ = nn::linear(vs.root(), 2, 2, Default::default());
    let text = refused(&vs, DdpOptions::new().bucket_cap_mb(1. + odd as f64));
    assert!(text.contains("bucket_bytes: 1048576"), "{text}");
    // The group can still be used.
    let options = DdpOptions::new();
    let ddp = DistributedDataParallel::new(&pg, &vs, options).unwrap();
    let _ = nn::linear(vs.root() / "late", 2, 2, Default::default());
    let text = ddp.forward(Tensor::new).unwrap_err().to_string();
    assert!(text.contains("had 2 parameters"), "{text}");
    pg.barrier().unwrap();
}

#[test]
fn a_parameter_with_two_names_is_reduced_and_stepped_once() {
    if role().is_none() {
        let test = "data_parallel::a_parameter_with_two_names_is_reduced_and_stepped_once";
        Ranks::start(test, "all", 2).succeed();
        return;
    }
    let pg = join();
    let (x, y) = data(Kind::Double);
    let train = |pg: &ProcessGroup| {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let start = Tensor::arange(36, (Kind::Double, Device::Cpu)).sin().view([6, 6]);
        let w = (vs.root() / "first").add("weight", start, true);
        let other = (vs.root() / "again").add("weight", w.shallow_clone(), true);
        let optimizer = Optimizer::adam(&vs).lr(0.01).build().unwrap();
        let ddp = DistributedDataParallel::new(pg, &vs, DdpOptions::new()).unwrap();
        let rows = 24 / pg.world_size() as i64;
        for step in 0..4 {
            let from = 24 * step + rows * pg.rank() as i64;
            let (x, y) = (x.narrow(0, from, rows), y.narrow(0, from, rows));
            let y_pred = ddp
                .forward(|| x.matmul(&w).tanh().matmul(&other).mean_dim(1i64, true, Kind::Double));
            optimizer.zero_grad().unwrap();
            ddp.backward(&y_pred.unwrap().mse_loss(&y, tch::Reduction::Mean)).unwrap();
            let _ = optimizer.step_clipped(0.1).unwrap();
        }
        w.detach().copy()
    };
    let (ours, alone) = (train(&pg), train(&ProcessGroup::single()));
    assert!((ours - alone).abs().max().double_value(&[]) < 1e-12);
}

#[test]
fn in_a_group_of_one_everything_is_as_without() {
    let pg = ProcessGroup::single();
    let case = Case { adamw: true, fused: true, accumulate: 3, bucket_cap_mb: 25., view: true };
    let with = train(&pg, case);
    assert_eq!(with, train(&pg, case));
    let vs = VarStore::new(Device::Cpu);
    let net = net(&vs);
    let mut optimizer = nn::Sgd::default().build(&vs, 0.1).unwrap();
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new()).unwrap();
    let (x, y) = data(Kind::Float);
    let loss = ddp.forward(|| net.forward(&x)).unwrap().mse_loss(&y, tch::Reduction::Mean);
    optimizer.backward_step(&loss);
    assert!(ddp.logging_data().unwrap().is_empty());
    ddp.reduce_gradients().unwrap();
    for wrong in [0., -1., f64::NAN] {
        let options = DdpOptions::new().bucket_cap_mb(wrong);
        assert!(DistributedDataParallel::new(&pg, &vs, options).is_err());
    }
}
