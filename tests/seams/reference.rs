//! Runs a program by a textbook's loop: plain tensors and formulas, no engine, no handler, no optimizer of ours. The
//! loop does not know about resuming: a run that was stopped and resumed is right if it equals one that was not.

use tch::{Kind, Tensor};

use super::compare::{Outcome, Trace, numbers};
use super::program::{
    Algorithm, At, Budget, Data, Driven, How, Place, Program, Sharpness, Watch, Weights, When,
};
use super::world;

/// Whether a handler, a source or a step went well.
#[derive(Clone, Copy, PartialEq)]
enum Went {
    Well,
    Wrong,
}
use Went::*;

/// One tensor that is trained.
struct Parameter {
    tensor: Tensor,
    group: usize,
    /// The sum of the window's gradients, each times the weight of its batch.
    gradient: Option<Vec<f64>>,
    step: i32,
    /// The momentum or first moment (the points that the steps move, if the optimizer is Schedule-Free), then the second
    /// moment, then a third buffer that some variants have.
    momentum: Option<Vec<f64>>,
    square: Vec<f64>,
    third: Vec<f64>,
    /// Numbers that torch keeps in f32.
    rounded: [f32; 2],
}

/// The numbers that a Schedule-Free optimizer counts for each group.
#[derive(Clone, Copy)]
struct Counted {
    steps: f64,
    largest_lr: f64,
    weights: f64,
    /// The learning rate of the step, and the share of its points in the average.
    lr: f64,
    share: f64,
}

/// L-BFGS remembers this from one iteration to the next. Vectors hold all parameters, one behind the other.
#[derive(Clone, Default)]
struct Lbfgs {
    iterations: u64,
    direction: Vec<f64>,
    length: f64,
    gradient: Vec<f64>,
    diagonal: f64,
    /// How gradient and parameters changed.
    changes: Vec<(Vec<f64>, Vec<f64>)>,
}

/// The best value so far, and how many values in a row were not better.
#[derive(Default)]
struct Patience {
    best: Option<f64>,
    bad: u64,
    cooldown: u64,
}

struct Reference<'p> {
    program: &'p Program,
    x: Tensor,
    y: Tensor,
    validation: (Tensor, Tensor),
    /// The parameters in the order of their names. Two may be the same tensor.
    tensors: Vec<Tensor>,
    parameters: Vec<Parameter>,
    lr: [f64; 2],
    /// The factors by which the plateaus have lowered the learning rates.
    reduction: [f64; 2],
    weight_decay: f64,
    momentum: f64,
    algorithm: Algorithm,
    lbfgs: Lbfgs,
    rho: f64,
    /// How often the loss was computed in the iteration.
    evaluations: u32,
    counted: [Counted; 2],
    /// The scale of the loss, and (below) how many steps were made since it changed.
    scale: f64,
    good_steps: u32,
    /// The sum of the weights of batches whose gradients wait for a step.
    pending: f64,
    /// The number of the first batch of the window of these batches.
    window_began: u64,
    norm: Option<f64>,
    events_of_schedules: Vec<u64>,
    ema: Vec<Vec<f64>>,
    ema_momentum: f64,
    ema_updates: u64,
    swa: Vec<Vec<f64>>,
    swa_count: f64,
    plateau: Patience,
    early_stopping: Patience,
    position: Position,
    batch_size: usize,
    changes_of_batch_size: u64,
    epoch_length: Option<u64>,
    epoch: u64,
    iteration: u64,
    samples: u64,
    updates: u64,
    windows: u64,
    /// The last output of the step.
    loss: Option<f64>,
    losses_of_epoch: Vec<f64>,
    mean_loss: f64,
    running: Option<f64>,
    error: f64,
    terminate: bool,
    end_of_epoch: bool,
    happened: Vec<bool>,
    trace: Trace,
    log: Vec<(String, u64, f64)>,
    /// The mean losses and file names of the best epochs, the best first.
    best: Vec<(f64, String)>,
    budget: Budget,
    other_size_after: Option<u64>,
}

/// The program's outcome, if all first parameters are larger by the share `shaken`. From the iteration
/// `other_size_after` on, batches have the size that the program has for resumed runs.
pub fn run(program: &Program, shaken: f64, other_size_after: Option<u64>) -> Outcome {
    tch::manual_seed(program.seed as i64);
    let mut this = Reference::new(program, shaken);
    this.other_size_after = other_size_after;
    let mut ended = String::new();
    for budget in budgets(program) {
        this.budget = budget;
        let early = loop {
            let early = this.train();
            if early && this.at(At::Terminate) == Wrong && !this.all_is_done() {
                // An error at this event ends the call of `run`; the next call goes on with another epoch.
                this.next_pass();
                continue;
            }
            break early;
        };
        this.at(At::Completed);
        ended = end(early, this.epoch, this.iteration);
        this.next_pass();
    }
    let mut best: Vec<_> = this.best.iter().map(|(_, name)| name.clone()).collect();
    best.sort();
    Outcome { trace: this.trace.records, end: ended, log: this.log, best, other_size_after }
}

/// The budgets of the calls of `run`, one after the other.
pub fn budgets(program: &Program) -> Vec<Budget> {
    let first = program.first_budget.map(|first| match program.budget {
        Budget::Epochs(_) => Budget::Epochs(first),
        _ => Budget::Iterations(first),
    });
    first.into_iter().chain([program.budget]).collect()
}

/// The text that describes the end of a run.
pub fn end(early: bool, epochs: u64, iterations: u64) -> String {
    let how = if early { "terminated" } else { "completed" };
    format!("{how} after {epochs} epochs and {iterations} iterations")
}

/// The position in the data: the pass, and the sample (of a loader) or batch within it.
#[derive(Clone, Copy, Default)]
struct Position {
    pass: u64,
    next: usize,
}

impl<'p> Reference<'p> {
    fn new(program: &'p Program, shaken: f64) -> Self {
        let (x, y) = world::samples(program.samples, program.seed);
        let named = world::parameters(program.model, program.seed);
        let tensors: Vec<_> =
            named.iter().map(|(_, t)| t.shallow_clone().set_requires_grad(true)).collect();
        shake(&tensors, shaken);
        let mut parameters: Vec<Parameter> = vec![];
        let initial = match program.optimizer {
            Algorithm::Adagrad { initial, .. } => initial,
            _ => 0.,
        };
        for ((name, _), tensor) in named.iter().zip(&tensors) {
            if parameters.iter().any(|known| known.tensor.data_ptr() == tensor.data_ptr()) {
                continue;
            }
            let size = tensor.numel();
            let second_group = program.lr_of_biases.is_some() && world::is_bias(name);
            parameters.push(Parameter {
                tensor: tensor.shallow_clone(),
                group: usize::from(second_group),
                gradient: None,
                step: 0,
                momentum: None,
                square: vec![initial; size],
                third: vec![0.; size],
                rounded: [1.; 2],
            });
        }
        let momentum = match program.optimizer {
            Algorithm::Muon { .. } => 0.95,
            Algorithm::SparseAdam { beta1, .. } => beta1,
            other => other.momentum().unwrap_or(0.),
        };
        let weight_decay = program.optimizer.weight_decay().unwrap_or(0.);
        let values: Vec<_> = tensors.iter().map(|tensor| numbers([tensor])).collect();
        let mut this = Self {
            program,
            x,
            y,
            validation: world::samples(4, program.seed + 1),
            parameters,
            lr: [program.lr, program.lr_of_biases.unwrap_or(program.lr)],
            reduction: [1.; 2],
            weight_decay,
            momentum,
            algorithm: program.optimizer,
            lbfgs: Lbfgs::default(),
            rho: program.sam.map_or(0., |sam| sam.rho),
            evaluations: 0,
            counted: [Counted { steps: 0., largest_lr: -1., weights: 0., lr: 0., share: 0. }; 2],
            scale: program.scaler.as_ref().map_or(1., |scaler| scaler.scale),
            good_steps: 0,
            pending: 0.,
            window_began: 0,
            norm: None,
            events_of_schedules: vec![0; program.schedules.len()],
            ema: values.clone(),
            ema_momentum: program.ema.map_or(0., |ema| ema.momentum),
            ema_updates: 0,
            swa: values,
            swa_count: 0.,
            plateau: Patience::default(),
            early_stopping: Patience::default(),
            position: Position::default(),
            batch_size: match program.data {
                Data::Loader { batch, .. } => batch * program.ranks,
                _ => 0,
            },
            changes_of_batch_size: 0,
            epoch_length: None,
            epoch: 0,
            iteration: 0,
            samples: 0,
            updates: 0,
            windows: 0,
            loss: None,
            losses_of_epoch: vec![],
            mean_loss: f64::NAN,
            running: None,
            error: f64::NAN,
            terminate: false,
            end_of_epoch: false,
            happened: vec![false; program.breaks.len()],
            trace: Trace::default(),
            log: vec![],
            best: vec![],
            budget: program.budget,
            other_size_after: None,
            tensors,
        };
        this.epoch_length = program.epoch_length.or(this.batches_of_a_pass());
        // Such a schedule sets its first value before the first update.
        for index in 0..program.schedules.len() {
            if program.schedules[index].on.at.is_after_the_step() {
                this.next_value(index);
            }
        }
        this
    }

    /// Trains until the budget is used up; true if the run was ended early.
    fn train(&mut self) -> bool {
        self.terminate = false;
        self.until_it_goes_well(At::Started);
        if self.terminate {
            return true;
        }
        self.take_other_size(0);
        while !self.budget_is_used_up() {
            self.epoch += 1;
            if self.program.batch_after_resume.is_some() {
                self.epoch_length = self.batches_of_a_pass();
            }
            self.until_it_goes_well(At::EpochStarted);
            if self.terminate || self.epoch_goes_on_too_long() {
                return true;
            }
            self.at(At::EpochCompleted);
            self.end_of_epoch = false;
            if self.terminate {
                return true;
            }
        }
        false
    }

    /// Whether nothing of the budget is left after the run was ended early.
    fn all_is_done(&self) -> bool {
        match self.budget {
            Budget::Epochs(epochs) => self.epoch >= epochs,
            Budget::Iterations(iterations) => self.iteration >= iterations,
            Budget::Samples(_) => false,
        }
    }

    fn next_pass(&mut self) {
        self.position = Position { pass: self.position.pass + 1, next: 0 };
    }

    /// Changes the batch size if this is the iteration for that. The epoch under way then ends with its pass.
    fn take_other_size(&mut self, batches: u64) {
        if self.other_size_after == Some(self.iteration)
            && let Some(size) = self.program.batch_after_resume
        {
            self.other_size_after = None;
            self.batch_size = size;
            let left = world::order(self.program, self.position.pass).len() - self.position.next;
            self.epoch_length = match batches {
                0 => self.batches_of_a_pass(),
                batches => Some(batches + left.div_ceil(size) as u64),
            };
        }
    }

    fn budget_is_used_up(&self) -> bool {
        match self.budget {
            Budget::Epochs(epochs) => self.epoch >= epochs,
            _ => self.iterations_are_used_up(),
        }
    }

    fn iterations_are_used_up(&self) -> bool {
        match self.budget {
            Budget::Epochs(_) => false,
            Budget::Iterations(iterations) => self.iteration >= iterations,
            Budget::Samples(samples) => self.samples >= samples,
        }
    }

    /// Does the iterations of an epoch; true if the run is to end before the epoch does.
    fn epoch_goes_on_too_long(&mut self) -> bool {
        let mut batches = 0;
        while self.epoch_length.is_none_or(|length| batches < length) {
            let batch = self.batch();
            if self.terminate {
                return true;
            }
            if std::mem::take(&mut self.end_of_epoch) {
                self.next_pass();
                self.at(At::TerminateSingleEpoch);
                return false;
            }
            let Some(batch) = batch else {
                // The first pass of data of unknown length is over.
                self.epoch_length = Some(batches);
                return false;
            };
            batches += 1;
            self.iteration += 1;
            // An error at this event gives up the iteration.
            if self.at(At::IterationStarted) == Well
                && !self.terminate
                && !self.end_of_epoch
                && self.step(&batch, batches, self.window(batches)) == Well
            {
                self.at(At::IterationCompleted);
            }
            if self.terminate {
                return true;
            }
            if std::mem::take(&mut self.end_of_epoch) {
                self.next_pass();
                self.at(At::TerminateSingleEpoch);
                return false;
            }
            self.take_other_size(batches);
            let in_mid_epoch = self.epoch_length.is_none_or(|length| batches < length);
            if in_mid_epoch && self.iterations_are_used_up() {
                return true;
            }
        }
        false
    }

    /// The samples of the next batch; none if the epoch or the run is to end.
    fn batch(&mut self) -> Option<Vec<i64>> {
        loop {
            // After an error before the step, the fetch is repeated.
            if self.at(At::GetBatchStarted) == Wrong {
                continue;
            }
            if self.terminate || self.end_of_epoch {
                return None;
            }
            if self.breaks(Place::Fetch) == Wrong {
                continue;
            }
            let mut before = self.position;
            let batch = match self.next() {
                Some(batch) => batch,
                None if self.epoch_length.is_none() => return None,
                None => {
                    if self.at(At::DataloaderStopIteration) == Wrong {
                        continue;
                    }
                    if self.terminate || self.end_of_epoch {
                        return None;
                    }
                    before = Position { pass: self.position.pass + 1, next: 0 };
                    self.position = before;
                    self.next().expect("there is data")
                }
            };
            self.samples += batch.len() as u64;
            self.loss = None;
            if self.at(At::GetBatchCompleted) == Wrong {
                self.position = before;
                continue;
            }
            return if self.terminate || self.end_of_epoch { None } else { Some(batch) };
        }
    }

    /// The samples of the next batch of the pass.
    fn next(&mut self) -> Option<Vec<i64>> {
        let Position { pass, next } = self.position;
        let Data::Loader { drop_last, .. } = self.program.data else {
            let batches = world::listed(self.program);
            let place = match self.program.data {
                Data::Stream(_) => next % batches.len(),
                _ => next,
            };
            let batch = batches.get(place).cloned()?;
            self.position.next += 1;
            return Some(batch);
        };
        let order = world::order(self.program, pass);
        let end = (next + self.batch_size).min(order.len());
        if next == end || drop_last && end - next < self.batch_size {
            return None;
        }
        self.position.next = end;
        Some(order[next..end].to_vec())
    }

    fn batches_of_a_pass(&self) -> Option<u64> {
        let samples = world::order(self.program, 0).len();
        let batches = match &self.program.data {
            Data::Loader { drop_last: true, .. } => samples / self.batch_size,
            Data::Loader { drop_last: false, .. } => samples.div_ceil(self.batch_size),
            Data::Batches(sizes) => sizes.len(),
            Data::Restartable(_) | Data::Stream(_) => return None,
        };
        Some(batches as u64)
    }

    /// For batch `number` of an epoch: the number of the first batch of its window, and whether it is the window's
    /// last batch.
    fn window(&self, number: u64) -> (u64, bool) {
        let size = self.program.accumulate;
        let last = number.is_multiple_of(size) || Some(number) == self.epoch_length;
        ((number - 1) / size * size + 1, last)
    }

    fn step(&mut self, batch: &[i64], number: u64, (begin, last): (u64, bool)) -> Went {
        // Batches of a window whose last batch was lost still wait for their step.
        let left_over = self.pending > 0. && (number == begin || self.window_began != begin);
        if left_over && self.update() == Wrong {
            return Wrong;
        }
        if self.pending == 0. {
            self.parameters.iter_mut().for_each(|parameter| parameter.gradient = None);
            self.window_began = begin;
        }
        if let Algorithm::Lbfgs { max_iter, history } = self.algorithm {
            return self.step_of_lbfgs(batch, max_iter.into(), history as usize);
        }
        let Some(loss) = self.evaluated_loss(batch) else { return Wrong };
        if let Some(sam) = self.program.sam
            && self.gradients_beside(batch, sam) == Wrong
        {
            return Wrong;
        }
        if last && self.update() == Wrong {
            return Wrong;
        }
        self.loss = Some(loss);
        Well
    }

    /// Adds the gradients of a batch to those of its window, and returns its loss; none if something broke.
    fn evaluated_loss(&mut self, batch: &[i64]) -> Option<f64> {
        self.evaluations += 1;
        if self.breaks(Place::InTheLoss(self.evaluations)) == Wrong {
            return None;
        }
        let (x, y) = (self.select(&self.x, batch), self.select(&self.y, batch));
        let prediction = world::forward(self.program.model, &self.tensors, &x);
        let (mut loss, weight) = world::loss(self.program, &prediction, &y);
        if self.program.noise {
            loss = &loss * world::noise();
        }
        if world::overflows(self.program, self.iteration) {
            loss = &loss * f64::INFINITY;
        }
        let weight = match self.program.weights {
            Weights::Equally => 1.,
            _ => numbers([&weight])[0],
        };
        (&loss * self.scale).backward();
        for parameter in &mut self.parameters {
            let mut gradient = parameter.tensor.grad();
            if !parameter.tensor.requires_grad() || !gradient.defined() {
                continue;
            }
            let new = match gradient.is_sparse() {
                true => numbers([&gradient.to_dense(None, false)]),
                false => numbers([&gradient]),
            };
            let _ = gradient.zero_();
            let sum = parameter.gradient.get_or_insert_with(|| vec![0.; new.len()]);
            sum.iter_mut().zip(new).for_each(|(sum, new)| *sum += new * weight);
        }
        self.pending += weight;
        Some(numbers([&loss])[0])
    }

    /// Takes the mean gradients of the window. Parameters that have none get zeros.
    fn take_gradients(&mut self) -> Vec<Vec<f64>> {
        let count = std::mem::take(&mut self.pending);
        let taken = self.parameters.iter_mut().map(|parameter| {
            let gradient = parameter.gradient.take();
            let gradient = gradient.unwrap_or_else(|| vec![0.; parameter.square.len()]);
            gradient.iter().map(|value| value / count).collect()
        });
        taken.collect()
    }

    /// Replaces the gradients by those at the place that the formulas of SAM or ASAM lead to.
    fn gradients_beside(&mut self, batch: &[i64], sam: Sharpness) -> Went {
        let values: Vec<_> = self.parameters.iter().map(|one| numbers([&one.tensor])).collect();
        let sizes = values.iter().flatten().map(|w| if sam.adaptive { w.abs() } else { 1. });
        let sizes: Vec<_> = sizes.collect();
        let gradient = self.take_gradients().concat();
        let lengths = gradient.iter().zip(&sizes).map(|(g, size)| (g * size).powi(2));
        let norm = lengths.sum::<f64>().sqrt();
        let mut moves = gradient
            .iter()
            .zip(&sizes)
            .map(|(g, size)| self.rho * g * size * size / (norm + 1e-12));
        for (parameter, values) in self.parameters.iter().zip(&values) {
            let moved = values.iter().zip(&mut moves).map(|(w, moved)| w + moved);
            set(&parameter.tensor, &moved.collect::<Vec<_>>());
        }
        let loss = self.evaluated_loss(batch);
        for (parameter, values) in self.parameters.iter().zip(&values) {
            set(&parameter.tensor, values);
        }
        if loss.is_some() { Well } else { Wrong }
    }

    /// Makes a step of L-BFGS for a batch; where something breaks, parameters and memory are as before.
    fn step_of_lbfgs(&mut self, batch: &[i64], max_iter: u64, history: usize) -> Went {
        let values: Vec<_> = self.parameters.iter().map(|one| numbers([&one.tensor])).collect();
        let memory = self.lbfgs.clone();
        let Some(loss) = self.iterations_of_lbfgs(batch, max_iter, history) else {
            for (parameter, values) in self.parameters.iter().zip(&values) {
                set(&parameter.tensor, values);
            }
            self.lbfgs = memory;
            return Wrong;
        };
        if self.at(At::OptimizerStepped) == Wrong || self.at(At::WindowCompleted) == Wrong {
            return Wrong;
        }
        self.loss = Some(loss);
        Well
    }

    /// Does what torch.optim.LBFGS does without a line search. Returns the first loss; none if something broke.
    fn iterations_of_lbfgs(&mut self, batch: &[i64], max_iter: u64, history: usize) -> Option<f64> {
        const TOLERANCE_OF_GRADIENTS: f64 = 1e-7;
        const TOLERANCE_OF_CHANGES: f64 = 1e-9;
        let first = self.evaluated_loss(batch)?;
        let (mut loss, mut gradient) = (first, self.take_gradients().concat());
        let (mut evaluations, lr) = (1, self.lr[0]);
        if largest(&gradient) <= TOLERANCE_OF_GRADIENTS {
            return Some(first);
        }
        for iteration in 1..=max_iter {
            self.lbfgs.iterations += 1;
            let mut direction = self.lbfgs.next_direction(&gradient, history);
            let mut from = 0;
            for parameter in &self.parameters {
                let until = from + parameter.square.len();
                if !parameter.tensor.requires_grad() {
                    direction[from..until].fill(0.);
                }
                from = until;
            }
            let is_first = self.lbfgs.iterations == 1;
            let sum: f64 = gradient.iter().map(|g| g.abs()).sum();
            let length = if is_first { (1. / sum).min(1.) * lr } else { lr };
            self.lbfgs.length = length;
            self.lbfgs.gradient.clone_from(&gradient);
            self.lbfgs.direction.clone_from(&direction);
            if product(&gradient, &direction) > -TOLERANCE_OF_CHANGES {
                break;
            }
            let mut moves = direction.iter().map(|d| length * d);
            for parameter in &self.parameters {
                let moved = numbers([&parameter.tensor]).into_iter().zip(&mut moves);
                set(&parameter.tensor, &moved.map(|(w, moved)| w + moved).collect::<Vec<_>>());
            }
            let before = loss;
            if iteration != max_iter {
                loss = self.evaluated_loss(batch)?;
                gradient = self.take_gradients().concat();
                evaluations += 1;
            }
            let moved: Vec<_> = direction.iter().map(|d| d * length).collect();
            if evaluations >= max_iter * 5 / 4
                || largest(&gradient) <= TOLERANCE_OF_GRADIENTS
                || largest(&moved) <= TOLERANCE_OF_CHANGES
                || (loss - before).abs() < TOLERANCE_OF_CHANGES
            {
                break;
            }
        }
        Some(first)
    }

    fn select(&self, from: &Tensor, batch: &[i64]) -> Tensor {
        from.index_select(0, &Tensor::from_slice(batch))
    }

    /// Makes one update for the batches that wait.
    fn update(&mut self) -> Went {
        let factor = 1. / (self.pending * self.scale);
        self.pending = 0.;
        let mut gradients: Vec<_> =
            self.parameters.iter_mut().map(|parameter| parameter.gradient.take()).collect();
        let all = |gradients: &Vec<Option<Vec<f64>>>| -> Vec<f64> {
            gradients.iter().flatten().flatten().copied().collect()
        };
        let overflow = all(&gradients).iter().any(|value| !value.is_finite());
        gradients.iter_mut().flatten().flatten().for_each(|value| *value *= factor);
        if let Some(max) = self.program.clip_value {
            let clip = |value: &mut f64| *value = value.clamp(-max, max);
            gradients.iter_mut().flatten().flatten().for_each(clip);
        }
        if let Some(max) = self.program.clip_norm {
            let norm = all(&gradients).iter().map(|value| value * value).sum::<f64>().sqrt();
            self.norm = Some(norm);
            let factor = (max / (norm + 1e-6)).min(1.);
            gradients.iter_mut().flatten().flatten().for_each(|value| *value *= factor);
        }
        let scaled = self.program.scaler.is_some();
        if !(scaled && overflow) {
            self.count();
            for (index, gradient) in gradients.into_iter().enumerate() {
                if let Some(gradient) = gradient {
                    self.update_one(index, gradient);
                }
            }
        }
        if let Some(scaler) = &self.program.scaler {
            self.good_steps = if overflow { 0 } else { self.good_steps + 1 };
            if overflow {
                self.scale /= 2.;
            } else if self.good_steps == scaler.interval {
                (self.scale, self.good_steps) = (self.scale * 2., 0);
            }
        }
        if !(scaled && overflow) && self.at(At::OptimizerStepped) == Wrong {
            return Wrong;
        }
        self.at(At::WindowCompleted)
    }

    /// Counts a step of a Schedule-Free optimizer.
    fn count(&mut self) {
        let (warmup, r) = match self.algorithm {
            Algorithm::SgdScheduleFree { warmup, r, .. } => (f64::from(warmup), r),
            Algorithm::AdamWScheduleFree { warmup, .. } => (f64::from(warmup), 0.),
            _ => return,
        };
        for (counted, lr) in self.counted.iter_mut().zip(self.lr) {
            counted.steps += 1.;
            counted.lr = if counted.steps < warmup { lr * counted.steps / warmup } else { lr };
            counted.largest_lr = counted.largest_lr.max(counted.lr);
            let weight = counted.steps.powf(r) * counted.largest_lr.powi(2);
            counted.weights += weight;
            counted.share = if counted.weights > 0. { weight / counted.weights } else { 0. };
        }
    }

    /// The values of the tensors in evaluations, by the names' order.
    fn evaluated(&self) -> Vec<Tensor> {
        let evaluated = |tensor: &Tensor| {
            let mut parameters = self.parameters.iter();
            let parameter = parameters.find(|own| own.tensor.data_ptr() == tensor.data_ptr());
            let z = parameter.and_then(|parameter| parameter.momentum.as_ref());
            let copy = tensor.detach().copy();
            if let (Some(z), true) = (z, self.algorithm.is_schedule_free()) {
                let values = numbers([tensor]).into_iter().zip(z);
                let values = values.map(|(y, z)| (y - (1. - self.momentum) * z) / self.momentum);
                set(&copy, &values.collect::<Vec<_>>());
            }
            copy
        };
        self.tensors.iter().map(evaluated).collect()
    }

    /// Updates one parameter by the formulas of torch.optim.Adafactor, which are about rows and columns.
    fn update_by_factors(&mut self, index: usize, gradient: &[f64], d: f64) {
        let parameter = &mut self.parameters[index];
        let (lr, mut values) = (self.lr[parameter.group], numbers([&parameter.tensor]));
        parameter.step += 1;
        let step = f64::from(parameter.step);
        let root_mean_square = |values: &[f64]| {
            (values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64).sqrt()
        };
        let size = root_mean_square(&values).max(1e-3) * lr.min(1. / step.sqrt());
        let share = step.powf(-0.8);
        let variances: Vec<f64> = if let [rows, columns] = parameter.tensor.size()[..] {
            let (rows, columns) = (rows as usize, columns as usize);
            let g = |row: usize, column: usize| gradient[row * columns + column];
            for row in 0..rows {
                let mean = (0..columns).map(|column| g(row, column).powi(2)).sum::<f64>();
                let mean = mean / columns as f64;
                parameter.square[row] += (mean - parameter.square[row]) * share;
            }
            for column in 0..columns {
                let mean = (0..rows).map(|row| g(row, column).powi(2)).sum::<f64>() / rows as f64;
                parameter.third[column] += (mean - parameter.third[column]) * share;
            }
            let mean = parameter.square[..rows].iter().sum::<f64>() / rows as f64;
            let variance = |place: usize| {
                let (row, column) = (place / columns, place % columns);
                parameter.square[row] * parameter.third[column] / mean.max(f64::EPSILON)
            };
            (0..values.len()).map(variance).collect()
        } else {
            for (square, g) in parameter.square.iter_mut().zip(gradient) {
                *square += (g * g - *square) * share;
            }
            parameter.square.clone()
        };
        let changes = variances.iter().zip(gradient);
        let changes: Vec<_> =
            changes.map(|(v, g)| g / v.max(f64::EPSILON * f64::EPSILON).sqrt()).collect();
        let most = (root_mean_square(&changes) / d).max(1.);
        for (value, change) in values.iter_mut().zip(changes) {
            *value = *value * (1. - lr * self.weight_decay) - size / most * change;
        }
        set(&parameter.tensor, &values);
    }

    /// Updates one matrix by the formulas of torch.optim.Muon without its iteration: the momentum over its norm, in bf16.
    fn update_by_norm(&mut self, index: usize, gradient: &[f64], nesterov: bool) {
        let parameter = &mut self.parameters[index];
        let (lr, mut values) = (self.lr[parameter.group], numbers([&parameter.tensor]));
        let momentum = parameter.momentum.get_or_insert_with(|| vec![0.; values.len()]);
        let mut changes = vec![];
        for (m, g) in momentum.iter_mut().zip(gradient) {
            *m += (g - *m) * (1. - self.momentum);
            changes.push(if nesterov { g + (*m - g) * self.momentum } else { *m });
        }
        let size = parameter.tensor.size();
        let changes = Tensor::from_slice(&changes).view(&size[..]).to_kind(Kind::BFloat16);
        let changes = &changes / changes.norm().clamp_min(1e-7);
        let scale = (size[0] as f64 / size[1] as f64).max(1.).sqrt();
        for (value, change) in values.iter_mut().zip(numbers([&changes.to_kind(Kind::Double)])) {
            *value = *value * (1. - lr * self.weight_decay) - lr * scale * change;
        }
        set(&parameter.tensor, &values);
    }

    /// Updates one parameter by the formulas of torch.optim.
    fn update_one(&mut self, index: usize, gradient: Vec<f64>) {
        let (mut algorithm, mut first) = (self.algorithm, self.momentum);
        match algorithm {
            Algorithm::Adafactor { d, .. } => return self.update_by_factors(index, &gradient, d),
            Algorithm::Muon { nesterov, .. } if self.parameters[index].group == 0 => {
                return self.update_by_norm(index, &gradient, nesterov);
            }
            Algorithm::Muon { .. } | Algorithm::SparseAdam { .. }
                if self.parameters[index].group == 1 =>
            {
                let (beta1, beta2) = (0.9, 0.999);
                algorithm = Algorithm::AdamW { beta1, beta2, weight_decay: 0., amsgrad: false };
                first = beta1;
            }
            _ => {}
        }
        let parameter = &mut self.parameters[index];
        let (lr, decay) = (self.lr[parameter.group], self.weight_decay);
        let mut values = numbers([&parameter.tensor]);
        parameter.step += 1;
        let is_new = parameter.momentum.is_none();
        let size = values.len();
        let momentum = match algorithm {
            // SGD's momentum buffer begins with the first step that has a momentum.
            Algorithm::Sgd { .. } if first == 0. => &mut vec![],
            averaged if averaged.is_schedule_free() => {
                parameter.momentum.get_or_insert_with(|| values.clone())
            }
            _ => parameter.momentum.get_or_insert_with(|| vec![0.; size]),
        };
        let step = f64::from(parameter.step);
        let counted = self.counted[parameter.group];
        // Numbers that are the same for all elements, and that torch keeps in f32.
        let rounded = parameter.rounded;
        let mut of_nadam = (0., 0.);
        match algorithm {
            Algorithm::NAdam { .. } => {
                let mu = |step: f64| first * (1. - 0.5 * 0.96f64.powf(step * 0.004));
                parameter.rounded[0] *= mu(step) as f32;
                let product = f64::from(parameter.rounded[0]);
                of_nadam = (
                    lr * (1. - mu(step)) / (1. - product),
                    lr * mu(step + 1.) / (1. - product * mu(step + 1.)),
                );
            }
            Algorithm::Asgd { lambd, t0, .. } => {
                let eta = lr / (1. + lambd * lr * step).powf(0.75);
                parameter.rounded = [eta as f32, (1. / (step - t0).max(1.)) as f32];
            }
            _ => {}
        }
        let [eta, mu] = if is_new { [lr as f32, 1.] } else { rounded }.map(f64::from);
        for i in 0..size {
            let (mut g, w) = (gradient[i], values[i]);
            match algorithm {
                Algorithm::Adafactor { .. } | Algorithm::Muon { .. } | Algorithm::Lbfgs { .. } => {}
                // The row that is never looked up has moments of 0, so it stays where it is.
                Algorithm::SparseAdam { beta2, .. } => {
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                    let lr = lr * (1. - beta2.powf(step)).sqrt() / (1. - first.powf(step));
                    values[i] = w - lr * momentum[i] / (parameter.square[i].sqrt() + 1e-8);
                }
                Algorithm::Sgd { dampening, nesterov, .. } => {
                    g += decay * w;
                    if first != 0. {
                        let share = if is_new { 1. } else { 1. - dampening };
                        momentum[i] = momentum[i] * first + share * g;
                        g = if nesterov { g + first * momentum[i] } else { momentum[i] };
                    }
                    values[i] = w - lr * g;
                }
                Algorithm::Adam { beta2, amsgrad, .. }
                | Algorithm::AdamW { beta2, amsgrad, .. } => {
                    let decoupled = matches!(algorithm, Algorithm::AdamW { .. });
                    let mut w = w;
                    if decoupled {
                        w *= 1. - lr * decay;
                    } else {
                        g += decay * w;
                    }
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                    let mut square = parameter.square[i];
                    if amsgrad {
                        parameter.third[i] = parameter.third[i].max(square);
                        square = parameter.third[i];
                    }
                    let correction1 = 1. - first.powi(parameter.step);
                    let correction2 = 1. - beta2.powi(parameter.step);
                    let denominator = square.sqrt() / correction2.sqrt() + 1e-8;
                    values[i] = w - lr / correction1 * momentum[i] / denominator;
                }
                Algorithm::RmsProp { alpha, centered, .. } => {
                    g += decay * w;
                    parameter.square[i] = parameter.square[i] * alpha + (1. - alpha) * g * g;
                    let mut square = parameter.square[i];
                    if centered {
                        parameter.third[i] = parameter.third[i] * alpha + (1. - alpha) * g;
                        square -= parameter.third[i] * parameter.third[i];
                    }
                    let mut change = g / (square.sqrt() + 1e-8);
                    if first > 0. {
                        momentum[i] = momentum[i] * first + change;
                        change = momentum[i];
                    }
                    values[i] = w - lr * change;
                }
                Algorithm::Adagrad { lr_decay, .. } => {
                    g += decay * w;
                    parameter.square[i] += g * g;
                    let lr = lr / (1. + (step - 1.) * lr_decay);
                    values[i] = w - lr * g / (parameter.square[i].sqrt() + 1e-10);
                }
                Algorithm::NAdam { beta2, decoupled, .. } => {
                    let w = decayed(decoupled, w, &mut g, lr, decay);
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                    let correction2 = 1. - beta2.powf(step);
                    let denominator = (parameter.square[i] / correction2).sqrt() + 1e-8;
                    let (of_gradient, of_moment) = of_nadam;
                    values[i] = w - (of_gradient * g + of_moment * momentum[i]) / denominator;
                }
                Algorithm::RAdam { beta2, decoupled, .. } => {
                    let w = decayed(decoupled, w, &mut g, lr, decay);
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                    let corrected = momentum[i] / (1. - first.powf(step));
                    let correction2 = 1. - beta2.powf(step);
                    let most = 2. / (1. - beta2) - 1.;
                    let now = most - 2. * step * beta2.powf(step) / correction2;
                    let change = if now > 5. {
                        let rectified = (now - 4.) * (now - 2.) * most;
                        let rectified = (rectified / ((most - 4.) * (most - 2.) * now)).sqrt();
                        let denominator = parameter.square[i].sqrt() + 1e-8;
                        corrected * rectified * correction2.sqrt() / denominator
                    } else {
                        corrected
                    };
                    values[i] = w - lr * change;
                }
                Algorithm::Adamax { beta2, .. } => {
                    g += decay * w;
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.square[i] = (parameter.square[i] * beta2).max(g.abs() + 1e-8);
                    let lr = lr / (1. - first.powf(step));
                    values[i] = w - lr * momentum[i] / parameter.square[i];
                }
                Algorithm::Adadelta { rho, .. } => {
                    g += decay * w;
                    parameter.square[i] = parameter.square[i] * rho + (1. - rho) * g * g;
                    let change = (parameter.third[i] + 1e-6).sqrt() * g;
                    let change = change / (parameter.square[i] + 1e-6).sqrt();
                    parameter.third[i] = parameter.third[i] * rho + (1. - rho) * change * change;
                    values[i] = w - lr * change;
                }
                Algorithm::Asgd { lambd, .. } => {
                    g += decay * w;
                    values[i] = w * (1. - lambd * eta) - eta * g;
                    // Nothing of the average is compared.
                    momentum[i] += (values[i] - momentum[i]) * mu;
                }
                Algorithm::Rprop => {
                    if is_new {
                        parameter.square[i] = lr;
                    }
                    let before = momentum[i];
                    let factor = match g * before {
                        same if same > 0. => 1.2,
                        turned if turned < 0. => 0.5,
                        _ => 1.,
                    };
                    parameter.square[i] = (parameter.square[i] * factor).clamp(1e-6, 50.);
                    if factor < 1. {
                        g = 0.;
                    }
                    momentum[i] = g;
                    values[i] = w - sign(g) * parameter.square[i];
                }
                Algorithm::Lion { beta2, .. } => {
                    let w = w * (1. - lr * decay);
                    values[i] = w - lr * sign(momentum[i] * first + (1. - first) * g);
                    momentum[i] = momentum[i] * beta2 + (1. - beta2) * g;
                }
                Algorithm::AdEMAMix { beta2, warmup, .. } => {
                    let part = (step / f64::from(warmup)).min(1.);
                    let half_life = |beta: f64| 0.5f64.ln() / (beta + 1e-8).ln() - 1.;
                    let beta3 = match part < 1. {
                        true => {
                            let now = (1. - part) * half_life(first) + part * half_life(0.99);
                            0.5f64.powf(1. / (now + 1.))
                        }
                        false => 0.99,
                    };
                    momentum[i] = momentum[i] * first + (1. - first) * g;
                    parameter.third[i] = parameter.third[i] * beta3 + (1. - beta3) * g;
                    parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                    let correction2 = 1. - beta2.powf(step);
                    let denominator = (parameter.square[i] / correction2).sqrt() + 1e-8;
                    let fast = momentum[i] / (1. - first.powf(step));
                    let change = (fast + 2. * part * parameter.third[i]) / denominator;
                    values[i] = w - lr * (change + decay * w);
                }
                Algorithm::SgdScheduleFree { .. } | Algorithm::AdamWScheduleFree { .. } => {
                    if let Algorithm::AdamWScheduleFree { beta2, .. } = algorithm {
                        parameter.square[i] = parameter.square[i] * beta2 + (1. - beta2) * g * g;
                        let correction = 1. - beta2.powf(counted.steps);
                        g /= (parameter.square[i] / correction).sqrt() + 1e-8;
                    }
                    g += decay * w;
                    // The average of all points z, the next z, and the point y between the two.
                    let x = (w - (1. - first) * momentum[i]) / first;
                    momentum[i] -= counted.lr * g;
                    let x = x + (momentum[i] - x) * counted.share;
                    values[i] = (1. - first) * momentum[i] + first * x;
                }
            }
        }
        set(&parameter.tensor, &values);
    }

    fn until_it_goes_well(&mut self, at: At) {
        while self.at(at) == Wrong {}
    }

    /// Does what the program asks for at an event, in this order.
    fn at(&mut self, at: At) -> Went {
        let program = self.program;
        let ends = matches!(at, At::EpochCompleted | At::TerminateSingleEpoch | At::Terminate);
        if ends && self.pending > 0. && self.update() == Wrong {
            (self.terminate, self.end_of_epoch) = (false, false);
            return Wrong;
        }
        let number = match at {
            At::OptimizerStepped => {
                self.updates += 1;
                self.updates
            }
            At::WindowCompleted => {
                self.windows += 1;
                self.windows
            }
            _ if at.is_of_epochs() => self.epoch,
            _ => self.iteration,
        };
        let passes = |when: When| when.passes(at, number);
        match at {
            At::Started => self.running = None,
            At::IterationStarted => self.evaluations = 0,
            At::EpochStarted => self.losses_of_epoch.clear(),
            At::IterationCompleted => {
                let loss = self.loss.unwrap_or(f64::NAN);
                self.losses_of_epoch.push(loss);
                let old = self.running;
                self.running = Some(old.map_or(loss, |old| old * 0.9 + (1. - 0.9) * loss));
            }
            At::EpochCompleted => {
                let losses = &self.losses_of_epoch;
                if losses.is_empty() {
                    // No iteration was completed, and a mean of nothing is an error. The next call of `run` has its own
                    // budget of samples.
                    self.samples = 0;
                    return Wrong;
                }
                self.mean_loss = losses.iter().sum::<f64>() / losses.len() as f64;
            }
            At::OptimizerStepped => {
                let [of_weights, of_biases] = self.lr;
                let mut values = vec![
                    ("rates", vec![of_weights, of_biases]),
                    ("weight decay", vec![self.weight_decay]),
                    ("momentum", vec![self.momentum]),
                ];
                values.extend(self.norm.map(|norm| ("norm", vec![norm])));
                self.trace.record("update in iteration", self.iteration, values);
            }
            _ => {}
        }
        if at == At::IterationStarted
            && let Some(frozen) = program.frozen
        {
            let now = (frozen.from..frozen.until).contains(&self.iteration);
            for ((name, _), tensor) in world::parameters(program.model, 0).iter().zip(&self.tensors)
            {
                if world::is_bias(name) == frozen.biases {
                    let _ = tensor.set_requires_grad(!now);
                }
            }
        }
        for (index, schedule) in program.schedules.iter().enumerate() {
            if passes(schedule.on) {
                self.next_value(index);
            }
        }
        if let Some(sizes) = &program.batch_sizes
            && at == At::EpochStarted
        {
            self.batch_size = sizes.value(self.changes_of_batch_size).round() as usize;
            self.changes_of_batch_size += 1;
            self.epoch_length = self.batches_of_a_pass();
        }
        if let Some(ema) = program.ema
            && passes(ema.on.unwrap_or(When::each(At::WindowCompleted)))
        {
            if let Some((from, updates)) = ema.warmup {
                let share = self.ema_updates as f64 / (updates.max(2) - 1) as f64;
                let value = from + (ema.momentum - from) * share;
                let rising = ema.momentum >= from;
                self.ema_momentum =
                    if rising { value.min(ema.momentum) } else { value.max(ema.momentum) };
            }
            self.ema_updates += 1;
            let momentum = self.ema_momentum;
            let now = self.evaluated();
            average(&mut self.ema, &now, |old, new| old * (1. - momentum) + new * momentum);
        }
        if program.swa.is_some_and(passes) {
            self.swa_count += 1.;
            let count = self.swa_count;
            let now = self.evaluated();
            average(&mut self.swa, &now, |old, new| old + (new - old) / count);
        }
        if let Some(evaluation) = program.evaluation
            && passes(evaluation.on)
        {
            self.error = f64::NAN;
            if self.breaks(Place::InTheEvaluation) == Wrong {
                (self.terminate, self.end_of_epoch) = (false, false);
                return Wrong;
            }
            self.error = self.evaluate(evaluation.averages);
        }
        if let Some(plateau) = program.plateau
            && passes(program.watched_on(plateau.watch))
        {
            self.plateau(plateau.factor, plateau.patience, plateau.cooldown);
        }
        if let Some(stop) = program.early_stopping
            && passes(program.watched_on(stop.watch))
        {
            let value = self.watched(stop.watch);
            let state = &mut self.early_stopping;
            if state.best.map_or(!value.is_nan(), |best| value < best) {
                (state.best, state.bad) = (Some(value), 0);
            } else {
                state.bad += 1;
                self.terminate |= state.bad >= stop.patience;
            }
        }
        if self.breaks(Place::In(at)) == Wrong {
            if at.comes_again_after_an_error() {
                // The requests of its handlers come again, too.
                (self.terminate, self.end_of_epoch) = (false, false);
            }
            return Wrong;
        }
        if world::RECORDED.contains(&at) {
            self.record(at, number);
        }
        if program.log.is_some_and(passes) {
            self.log.extend(self.loss.map(|loss| ("loss".into(), number, loss)));
            self.log.push(("lr".into(), number, self.lr[0]));
        }
        if program.best && at == At::EpochCompleted {
            self.keep_if_best(number);
        }
        Well
    }

    /// Keeps the files of the two best epochs: a new file replaces the worse one if it is better.
    fn keep_if_best(&mut self, epoch: u64) {
        let (loss, kept) = (self.mean_loss, &mut self.best);
        if loss.is_nan() || kept.len() == 2 && loss >= kept[1].0 {
            return;
        }
        kept.truncate(1);
        kept.push((loss, format!("model_{epoch}_loss={loss:.4}.safetensors")));
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
    }

    fn record(&mut self, at: At, number: u64) {
        let mut values = vec![
            ("epoch and iteration", vec![self.epoch as f64, self.iteration as f64]),
            ("weights", numbers(&self.tensors)),
        ];
        if at == At::IterationCompleted {
            values.extend(self.loss.map(|loss| ("loss", vec![loss])));
            values.extend(self.running.map(|running| ("running loss", vec![running])));
        }
        if at == At::EpochCompleted {
            values.push(("mean loss", vec![self.mean_loss]));
            // With several ranks, each has a loss of its own, so none is recorded.
            let own = self.loss.filter(|_| self.program.ranks == 1);
            values.extend(own.map(|loss| ("last loss", vec![loss])));
        }
        values.push(("error of the evaluation", vec![self.error]));
        if self.program.ema.is_some() {
            values.push(("moving average", self.ema.concat()));
        }
        if self.program.swa.is_some() {
            values.push(("plain average", self.swa.concat()));
        }
        if self.program.scaler.is_some() {
            values.push(("scale", vec![self.scale]));
        }
        self.trace.record(format!("{at:?}"), number, values);
    }

    /// Sets the value that a schedule drives to the schedule's next value.
    fn next_value(&mut self, index: usize) {
        let event = self.events_of_schedules[index];
        self.events_of_schedules[index] += 1;
        let schedule = &self.program.schedules[index];
        let value = schedule.shape.value(event);
        match schedule.knob {
            Driven::LrOf(group) if self.program.lr_of_biases.is_some() => {
                self.lr[group] = value * self.reduction[group];
            }
            Driven::Lr | Driven::LrOf(_) => self.lr = self.reduction.map(|factor| value * factor),
            Driven::WeightDecay => self.weight_decay = value,
            Driven::Momentum => self.momentum = value,
            Driven::EmaMomentum => self.ema_momentum = value,
            Driven::Rho => self.rho = value,
        }
    }

    /// The mean of the squared errors, without gradients.
    fn evaluate(&self, of_averages: bool) -> f64 {
        let _guard = tch::no_grad_guard();
        let copies = self.evaluated();
        if of_averages {
            copies.iter().zip(&self.ema).for_each(|(copy, average)| set(copy, average));
        }
        let (x, y) = &self.validation;
        let prediction = world::forward(self.program.model, &copies, x);
        numbers([&(prediction - y).square().mean(Kind::Double)])[0]
    }

    fn watched(&self, watch: Watch) -> f64 {
        match watch {
            Watch::MeanLoss => self.mean_loss,
            Watch::Validation => self.error,
        }
    }

    /// torch's ReduceLROnPlateau with its defaults.
    fn plateau(&mut self, factor: f64, patience: u64, cooldown: u64) {
        let value = self.program.plateau.map_or(f64::NAN, |plateau| self.watched(plateau.watch));
        let state = &mut self.plateau;
        if value < state.best.unwrap_or(f64::INFINITY) * (1. - 1e-4) {
            (state.best, state.bad) = (Some(value), 0);
        } else {
            state.bad += 1;
        }
        if state.cooldown > 0 {
            state.cooldown -= 1;
            state.bad = 0;
        }
        if state.bad > patience {
            for (lr, reduction) in self.lr.iter_mut().zip(&mut self.reduction) {
                if *lr - *lr * factor > 1e-8 {
                    *lr *= factor;
                    *reduction *= factor;
                }
            }
            (state.cooldown, state.bad) = (cooldown, 0);
        }
    }

    /// Makes the breaks that are planted here happen. Breaks that leave no trace are left out.
    fn breaks(&mut self, place: Place) -> Went {
        for (planted, happened) in self.program.breaks.iter().zip(&mut self.happened) {
            if planted.leaves_a_trace(self.program)
                && planted.is_due(place, self.epoch, self.iteration)
                && !std::mem::replace(happened, true)
            {
                match planted.how {
                    How::EndOfEpoch => self.end_of_epoch = true,
                    How::End => self.terminate = true,
                    _ => return Wrong,
                }
            }
        }
        Well
    }
}

impl Lbfgs {
    /// Remembers the last iteration, and returns the direction of the next one by the recursion of two loops.
    fn next_direction(&mut self, gradient: &[f64], history: usize) -> Vec<f64> {
        let negative = || gradient.iter().map(|g| -g).collect::<Vec<_>>();
        if self.iterations == 1 {
            self.diagonal = 1.;
            return negative();
        }
        let of_gradient: Vec<_> = gradient.iter().zip(&self.gradient).map(|(g, b)| g - b).collect();
        let of_place: Vec<_> = self.direction.iter().map(|d| d * self.length).collect();
        let curvature = product(&of_gradient, &of_place);
        if curvature > 1e-10 {
            if self.changes.len() == history {
                self.changes.remove(0);
            }
            self.diagonal = curvature / product(&of_gradient, &of_gradient);
            self.changes.push((of_gradient, of_place));
        }
        let add = |to: &mut Vec<f64>, factor: f64, vector: &[f64]| {
            to.iter_mut().zip(vector).for_each(|(to, value)| *to += factor * value);
        };
        let (mut direction, mut factors) = (negative(), vec![]);
        for (y, s) in self.changes.iter().rev() {
            let factor = product(s, &direction) / product(y, s);
            add(&mut direction, -factor, y);
            factors.push(factor);
        }
        direction.iter_mut().for_each(|value| *value *= self.diagonal);
        for ((y, s), factor) in self.changes.iter().zip(factors.iter().rev()) {
            let other = product(y, &direction) / product(y, s);
            add(&mut direction, factor - other, s);
        }
        direction
    }
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The largest magnitude; NaN if there is one.
fn largest(values: &[f64]) -> f64 {
    let larger = |most: f64, value: &f64| match value.abs() {
        value if value > most || value.is_nan() => value,
        _ => most,
    };
    values.iter().fold(0., larger)
}

fn set(tensor: &Tensor, values: &[f64]) {
    let _guard = tch::no_grad_guard();
    tensor.shallow_clone().copy_(&Tensor::from_slice(values).view_as(tensor));
}

/// Makes all values larger by a share.
fn shake(tensors: &[Tensor], share: f64) {
    for (index, tensor) in tensors.iter().enumerate() {
        if tensors[..index].iter().all(|other| other.data_ptr() != tensor.data_ptr()) {
            let values: Vec<_> =
                numbers([tensor]).iter().map(|value| value * (1. + share)).collect();
            set(tensor, &values);
        }
    }
}

/// The parameter before a step with decoupled weight decay; otherwise the decay is added to the gradient.
fn decayed(decoupled: bool, w: f64, g: &mut f64, lr: f64, decay: f64) -> f64 {
    if decoupled {
        return w * (1. - lr * decay);
    }
    *g += decay * w;
    w
}

/// 1, -1, or 0.
fn sign(x: f64) -> f64 {
    if x == 0. { 0. } else { x.signum() }
}

fn average(averages: &mut [Vec<f64>], tensors: &[Tensor], new: impl Fn(f64, f64) -> f64) {
    for (average, tensor) in averages.iter_mut().zip(tensors) {
        let values = numbers([tensor]);
        average.iter_mut().zip(values).for_each(|(old, value)| *old = new(*old, value));
    }
}
