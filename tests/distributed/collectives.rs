//! Tests of collectives between processes, and of the errors if the ranks do not agree.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tch_ignite::Error;
use tch_ignite::distributed::{FailureKind, ProcessGroup, ProcessGroupOptions, ReduceOp};

use crate::ranks::{Ranks, role};

fn join() -> ProcessGroup {
    tch::set_num_threads(1);
    let options = ProcessGroupOptions::new().timeout(Duration::from_secs(20));
    ProcessGroup::from_env(options).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).reshape([-1]).try_into().unwrap()
}

#[test]
fn collectives_of_tensors() {
    if role().is_none() {
        for world in [2, 4] {
            Ranks::start("collectives::collectives_of_tensors", "all", world).succeed();
        }
        return;
    }
    let pg = join();
    let (rank, world) = (pg.rank() as f64, pg.world_size() as f64);
    let sum = (0..pg.world_size()).sum::<usize>() as f64;
    assert_eq!((pg.local_rank(), pg.is_main()), (pg.rank(), rank == 0.));

    let f = |kind| Tensor::full([3], rank, (kind, Device::Cpu));
    for (op, expected) in [
        (ReduceOp::Sum, sum),
        (ReduceOp::Avg, sum / world),
        (ReduceOp::Min, 0.),
        (ReduceOp::Max, world - 1.),
        (ReduceOp::Product, 0.),
    ] {
        let tensor = f(Kind::Double);
        pg.all_reduce(&[&tensor], op).unwrap();
        assert_eq!(values(&tensor), [expected; 3], "{op:?}");
    }
    // The list has tensors of several types, a view that is not contiguous, a parameter with gradients, and a tensor
    // without elements.
    let base = Tensor::full([2, 3], rank, (Kind::Float, Device::Cpu));
    let parameter = Tensor::full([2], rank, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let empty = Tensor::zeros([0], (Kind::Float, Device::Cpu));
    let list = [f(Kind::Float), f(Kind::Int64), base.transpose(0, 1), parameter, empty];
    pg.all_reduce(&list, ReduceOp::Sum).unwrap();
    for tensor in &list {
        assert!(values(tensor).iter().all(|value| *value == sum), "{tensor:?}");
    }
    assert_eq!(values(&base), [sum; 6]);
    assert!(list[3].requires_grad() && list[3].is_leaf());

    let root = pg.world_size() - 1;
    let base = Tensor::full([2, 3], rank, (Kind::Float, Device::Cpu));
    let (a, b) = (f(Kind::Float), base.transpose(0, 1));
    pg.broadcast(&[&a, &b], root).unwrap();
    assert_eq!(values(&a), [root as f64; 3]);
    assert_eq!(values(&base), [root as f64; 6]);
    assert!(pg.broadcast(&[&a], 9).unwrap_err().to_string().contains("no rank 9"));

    let gathered = pg.all_gather(&f(Kind::Int64)).unwrap();
    assert_eq!(gathered.len(), pg.world_size());
    for (rank, tensor) in gathered.iter().enumerate() {
        assert_eq!((tensor.kind(), values(tensor)), (Kind::Int64, vec![rank as f64; 3]));
    }
    let text = pg.all_reduce(&[&Tensor::new()], ReduceOp::Sum).unwrap_err().to_string();
    assert!(text.contains("undefined"), "{text}");
    pg.all_reduce::<Tensor>(&[], ReduceOp::Sum).unwrap();
    pg.barrier().unwrap();
}

#[test]
fn messages() {
    if role().is_none() {
        for world in [2, 4] {
            Ranks::start("collectives::messages", "all", world).succeed();
        }
        return;
    }
    let pg = join();
    let control = pg.control();
    let world = pg.world_size();
    let sum = (0..world).sum::<usize>() as f64;
    let mut values = vec![pg.rank() as f64; 3];
    control.all_reduce_f64(&mut values, ReduceOp::Sum).unwrap();
    assert_eq!(values, [sum; 3]);
    // These values do not fit into one frame.
    let mut values = vec![pg.rank() as f64; 1000];
    control.all_reduce_f64(&mut values, ReduceOp::Max).unwrap();
    assert_eq!(values, [world as f64 - 1.; 1000]);
    // The bits of numbers are exchanged, not decimal texts, so NaN and -0 stay what they are.
    let mut values = [if pg.is_main() { f64::NAN } else { 1. }, -0.];
    control.all_reduce_f64(&mut values, ReduceOp::Max).unwrap();
    assert!(values[0].is_nan() && values[1].is_sign_negative());

    for length in [0, 10, 5000] {
        let own = vec![pg.rank() as u8; pg.rank() * length];
        let all = control.all_gather_bytes(&own).unwrap();
        for (rank, bytes) in all.iter().enumerate() {
            assert_eq!(*bytes, vec![rank as u8; rank * length]);
        }
    }
    let own = format!("from {}", pg.rank()).repeat(100);
    let got = control.broadcast_bytes(own.as_bytes(), 1).unwrap();
    assert_eq!(got, "from 1".repeat(100).into_bytes());
    control.agree("seeds", 5).unwrap();
    let begin = Instant::now();
    for _ in 0..100 {
        control.barrier().unwrap();
    }
    println!("a barrier: {:?}", begin.elapsed() / 100);
}

#[test]
fn differences_are_errors_on_all_ranks_and_do_no_harm() {
    if role().is_none() {
        let test = "collectives::differences_are_errors_on_all_ranks_and_do_no_harm";
        Ranks::start(test, "all", 3).succeed();
        return;
    }
    let pg = join();
    let mismatch = |error: Error| match error {
        Error::Distributed { kind: FailureKind::Mismatch, rank, missing, message, .. } => {
            assert_eq!((rank, missing), (pg.rank(), vec![]));
            message
        }
        other => panic!("{other}"),
    };
    let odd = i64::from(pg.rank() == 1);
    let tensor = Tensor::zeros([2 + odd], (Kind::Float, Device::Cpu));
    let text = mismatch(pg.all_reduce(&[&tensor], ReduceOp::Sum).unwrap_err());
    assert_eq!(
        text,
        "ranks [0, 2]: all_reduce Sum of [2] Float; rank 1: all_reduce Sum of [3] Float"
    );
    let text = mismatch(pg.all_gather(&tensor).unwrap_err());
    assert!(text.contains("rank 1: all_gather of [3] Float"), "{text}");
    let mut numbers = vec![0.; 4 + odd as usize];
    let text = mismatch(pg.control().all_reduce_f64(&mut numbers, ReduceOp::Sum).unwrap_err());
    assert!(text.contains("rank 1: all_reduce_f64 Sum of 5 values"), "{text}");
    let text = mismatch(pg.control().agree("batches in an epoch", 10 + odd).unwrap_err());
    assert_eq!(text, "batches in an epoch: rank 0 has 10, rank 1 has 11, rank 2 has 10");
    let text = mismatch(match odd {
        1 => pg.barrier().unwrap_err(),
        _ => pg.broadcast(&[&tensor], 0).unwrap_err(),
    });
    assert_eq!(text, "ranks [0, 2]: broadcast from 0 of [2] Float; rank 1: barrier");
    pg.barrier().unwrap();
    let same = Tensor::ones([2], (Kind::Float, Device::Cpu));
    pg.all_reduce(&[&same], ReduceOp::Sum).unwrap();
    assert_eq!(values(&same), [3., 3.]);
}

#[test]
fn a_group_of_one_is_the_identity() {
    let pg = ProcessGroup::single();
    assert_eq!((pg.rank(), pg.world_size(), pg.local_rank(), pg.is_main()), (0, 1, 0, true));
    let tensor = Tensor::from_slice(&[1f32, 2.]);
    for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max] {
        pg.all_reduce(&[&tensor], op).unwrap();
    }
    pg.broadcast(&[&tensor], 0).unwrap();
    let gathered = pg.all_gather(&tensor).unwrap();
    assert_eq!((values(&tensor), values(&gathered[0])), (vec![1., 2.], vec![1., 2.]));
    assert_ne!(gathered[0].data_ptr(), tensor.data_ptr());
    let mut numbers = [1., 2.];
    pg.control().all_reduce_f64(&mut numbers, ReduceOp::Avg).unwrap();
    assert_eq!(numbers, [1., 2.]);
    assert_eq!(pg.control().all_gather_bytes(b"a").unwrap(), [b"a"]);
    assert_eq!(pg.control().broadcast_bytes(b"a", 0).unwrap(), b"a");
    assert!(pg.broadcast(&[&tensor], 1).is_err());
    assert!(pg.all_reduce(&[Tensor::new()], ReduceOp::Sum).is_err());
    pg.barrier().unwrap();
}
