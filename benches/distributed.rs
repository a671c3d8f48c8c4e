//! Measures an all-reduce of 10 MB and a step of data-parallel training in two processes, ours and torch's in the
//! same run: `scripts/bench.sh distributed`. `TORCH_PYTHON` names a Python with torch (`python3` unless set).

#[path = "../tests/distributed/ranks.rs"]
#[allow(dead_code)]
mod ranks;

use std::process::Command;
use std::time::Instant;

use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_ignite::distributed::{
    DdpOptions, DistributedDataParallel, ProcessGroup, ProcessGroupOptions, ReduceOp,
};
use tch_ignite::optim::Optimizer;

// These numbers are the same as in distributed.py.
const REPEATS: usize = 30;
const STEPS: usize = 20;
const LAYERS: usize = 8;
const WIDTH: i64 = 1024;
const BATCH: i64 = 32;
const ROUNDS: usize = 5;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn median_ms(
    pg: &ProcessGroup,
    repeats: usize,
    mut call: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let mut times = vec![];
    for index in 0..repeats + 5 {
        pg.barrier()?;
        let begin = Instant::now();
        call()?;
        if index >= 5 {
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(median(times))
}

fn rank() -> anyhow::Result<()> {
    tch::set_num_threads(1);
    let pg = ProcessGroup::from_env(ProcessGroupOptions::new())?;
    let options = (Kind::Float, Device::Cpu);
    let tensor = Tensor::ones([2_500_000], options);
    let all_reduce = median_ms(&pg, REPEATS, || Ok(pg.all_reduce(&[&tensor], ReduceOp::Avg)?))?;

    tch::manual_seed(1);
    let vs = VarStore::new(Device::Cpu);
    let mut net = nn::seq();
    for layer in 0..LAYERS {
        let linear = nn::linear(vs.root() / layer, WIDTH, WIDTH, Default::default());
        net = net.add(linear).add_fn(|x| x.relu());
    }
    let momentum = nn::Sgd { momentum: 0.9, ..Default::default() };
    let optimizer = Optimizer::builder(momentum, &vs).lr(1e-3).build()?;
    let ddp = DistributedDataParallel::new(&pg, &vs, DdpOptions::new())?;
    let (x, y) = (Tensor::ones([BATCH, WIDTH], options), Tensor::ones([BATCH, WIDTH], options));
    let step = median_ms(&pg, STEPS, || {
        let loss = ddp.forward(|| net.forward(&x))?.mse_loss(&y, Reduction::Mean);
        optimizer.zero_grad()?;
        ddp.backward(&loss)?;
        Ok(optimizer.step()?)
    })?;
    println!("\nMEASURED {all_reduce} {step}");
    if pg.is_main() && std::env::var_os("TCH_IGNITE_DDP_LOGGING").is_some() {
        println!("{:#?}", ddp.logging_data()?);
    }
    Ok(())
}

/// Milliseconds that an all-reduce and a step take on rank 0.
fn measured(python: Option<&str>) -> [f64; 2] {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/distributed.py");
    let command = |_| {
        python.map(|python| {
            let mut command = Command::new(python);
            command.arg(script);
            command
        })
    };
    let outputs = ranks::Ranks::start_some("", "rank", 2, command).succeed();
    let line = outputs[0].lines().find_map(|line| line.strip_prefix("MEASURED ")).unwrap();
    let numbers: Vec<f64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
    [numbers[0], numbers[1]]
}

fn main() -> anyhow::Result<()> {
    if ranks::role().is_some() {
        return rank();
    }
    let python = std::env::var("TORCH_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python).args(["-c", "import torch"]).output();
    let python = has.is_ok_and(|output| output.status.success()).then_some(python);
    if python.is_none() {
        eprintln!("no Python with torch: set TORCH_PYTHON; only this crate is measured");
    }
    // Ours and theirs run in turns, so that a busy machine slows both.
    let (mut ours, mut theirs) = (vec![], vec![]);
    for round in 0..ROUNDS {
        ours.push(measured(None));
        theirs.extend(python.as_deref().map(|python| measured(Some(python))));
        eprintln!("round {} of {ROUNDS}: {:?} {:?}", round + 1, ours.last(), theirs.last());
    }
    println!("| two processes, gloo over loopback, median ms | tch-ignite | Python | ratio |");
    println!("|---|---|---|---|");
    for (index, name) in ["all-reduce of 10 MB", "step, 8 layers of 1024"].into_iter().enumerate() {
        let of = |list: &[[f64; 2]]| median(list.iter().map(|values| values[index]).collect());
        let our = of(&ours);
        if theirs.is_empty() {
            println!("| {name} | {our:.2} | | |");
        } else {
            let their = of(&theirs);
            println!("| {name} | {our:.2} | {their:.2} | {:.2} |", our / their);
        }
    }
    Ok(())
}
