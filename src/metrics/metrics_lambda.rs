use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Rem, Sub};
use std::rc::{Rc, Weak};

use tch::{Device, Kind, Tensor};

use super::{Accumulated, Metric, Reduce, Usage};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;

/// A metric to compute with: ignite's `MetricsLambda`, and the handle that [`Metric::shared`] gives.
///
/// `+ - * / %` with numbers and other handles, and the methods below, make metrics whose value is
/// computed from those of others, as tensors and without a host sync. Clones share the metric.
///
/// A metric that occurs several times, in one expression or in several that are attached to the same
/// engine, is updated once: by the first that is attached, with its [`Usage`]. All must be attached
/// to one engine. Two of them called by hand do not update it twice either.
///
/// ```
/// use tch::Tensor;
/// use tch_ignite::metrics::{Metric, Precision, Recall, pair};
/// let (p, r) = (Precision::of(pair).shared(), Recall::of(pair).shared());
/// let mut f1 = (&p * &r * 2. / (p + r)).mean();
/// let scores = Tensor::from_slice2(&[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]);
/// f1.update(&(scores, Tensor::from_slice(&[0i64, 0, 1])))?;
/// assert!((f1.compute()?.read()? - 2. / 3.).abs() < 1e-12);
/// # anyhow::Ok(())
/// ```
pub struct MetricsLambda<'a, O> {
    node: Rc<Node<'a, O>>,
    /// Each metric in it once.
    leaves: Vec<Rc<Leaf<'a, O>>>,
    /// Tells handles apart that were attached by themselves.
    user: Rc<()>,
}

struct Leaf<'a, O> {
    metric: RefCell<Box<dyn Metric<O> + 'a>>,
    /// Whose calls count.
    user: RefCell<Weak<()>>,
}

type Function<'a> = Box<dyn Fn(&[Tensor]) -> anyhow::Result<Tensor> + 'a>;

enum Node<'a, O> {
    Metric(Rc<Leaf<'a, O>>),
    Number(f64),
    Apply(Function<'a>, Vec<Rc<Node<'a, O>>>),
    /// Wrong arguments.
    Refused(String),
}

impl<O> Node<'_, O> {
    fn tensor(&self) -> anyhow::Result<Tensor> {
        match self {
            Self::Metric(leaf) => Ok(leaf.metric.try_borrow()?.compute()?.tensor()?),
            Self::Number(number) => Ok(Tensor::from(*number)),
            Self::Apply(function, of) => {
                let of = of.iter().map(|node| node.tensor()).collect::<anyhow::Result<Vec<_>>>()?;
                function(&of)
            }
            Self::Refused(reason) => anyhow::bail!("{reason}"),
        }
    }

    fn validate(&self) -> Result<()> {
        match self {
            Self::Metric(leaf) => leaf.metric.borrow().validate(),
            Self::Number(_) => Ok(()),
            Self::Apply(_, of) => of.iter().try_for_each(|node| node.validate()),
            Self::Refused(reason) => Err(Error::invalid(reason.as_str())),
        }
    }
}

impl<'a, O> MetricsLambda<'a, O> {
    /// What [`Metric::shared`] does.
    pub fn of(metric: impl Metric<O> + 'a) -> Self {
        let metric = RefCell::new(Box::new(metric) as Box<dyn Metric<O> + 'a>);
        let leaf = Rc::new(Leaf { metric, user: RefCell::default() });
        Self::from_node(Node::Metric(leaf.clone()), vec![leaf])
    }

    /// A function of the values of others, in this order.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_ignite::metrics::{Mean, Metric, MetricsLambda};
    /// let (a, b) = (Mean::of(|x: &f64| *x).shared(), Mean::of(|x: &f64| x * x).shared());
    /// let mut larger = MetricsLambda::new(|v: &[Tensor]| Ok(v[0].f_maximum(&v[1])?), [a, b]);
    /// larger.update(&3.)?;
    /// assert_eq!(larger.compute()?.read()?, 9.);
    /// # anyhow::Ok(())
    /// ```
    pub fn new(
        function: impl Fn(&[Tensor]) -> anyhow::Result<Tensor> + 'a,
        of: impl IntoIterator<Item = Self>,
    ) -> Self {
        let (mut nodes, mut leaves) = (vec![], Vec::<Rc<Leaf<'a, O>>>::new());
        for lambda in of {
            nodes.push(lambda.node);
            for leaf in lambda.leaves {
                if !leaves.iter().any(|known| Rc::ptr_eq(known, &leaf)) {
                    leaves.push(leaf);
                }
            }
        }
        Self::from_node(Node::Apply(Box::new(function), nodes), leaves)
    }

    /// Attaching it is an error.
    pub(super) fn refused(reason: impl Into<String>) -> Self {
        Self::from_node(Node::Refused(reason.into()), vec![])
    }

    fn from_node(node: Node<'a, O>, leaves: Vec<Rc<Leaf<'a, O>>>) -> Self {
        Self { node: Rc::new(node), leaves, user: Rc::default() }
    }

    /// A function of the value.
    pub fn apply(self, function: impl Fn(&Tensor) -> anyhow::Result<Tensor> + 'a) -> Self {
        Self::new(move |values| function(&values[0]), [self])
    }

    fn with(
        self,
        other: impl Into<Self>,
        function: fn(&Tensor, &Tensor) -> Result<Tensor, tch::TchError>,
    ) -> Self {
        Self::new(move |values| Ok(function(&values[0], &values[1])?), [self, other.into()])
    }

    /// The mean of all elements.
    pub fn mean(self) -> Self {
        self.apply(|value| Ok(value.f_mean(super::to_value::accumulator_kind(value.device()))?))
    }

    /// The sum of all elements.
    pub fn sum(self) -> Self {
        self.apply(|value| Ok(value.f_sum(None)?))
    }

    /// Element, or row, number `index` along the first dimension; from the end where it is negative.
    pub fn index(self, index: i64) -> Self {
        self.apply(move |value| Ok(value.f_select(0, index)?))
    }

    /// To this power, element by element.
    pub fn pow(self, exponent: impl Into<Self>) -> Self {
        self.with(exponent, |a, b| a.f_pow(b))
    }

    /// Divided and rounded down, element by element: Python's `//`.
    pub fn floor_divide(self, other: impl Into<Self>) -> Self {
        self.with(other, |a, b| a.f_floor_divide(b))
    }

    /// The metrics that this handle updates: those that no living handle did before.
    fn mine(&self) -> impl Iterator<Item = &Leaf<'a, O>> {
        self.leaves.iter().map(|leaf| &**leaf).filter(|leaf| {
            let mut user = leaf.user.borrow_mut();
            if user.strong_count() == 0 {
                *user = Rc::downgrade(&self.user);
            }
            user.as_ptr() == Rc::as_ptr(&self.user)
        })
    }
}

/// Shares the metric.
impl<O> Clone for MetricsLambda<'_, O> {
    fn clone(&self) -> Self {
        Self { node: self.node.clone(), leaves: self.leaves.clone(), user: Rc::default() }
    }
}

impl<O> From<f64> for MetricsLambda<'_, O> {
    fn from(number: f64) -> Self {
        Self::from_node(Node::Number(number), vec![])
    }
}

impl<O> From<&Self> for MetricsLambda<'_, O> {
    fn from(lambda: &Self) -> Self {
        lambda.clone()
    }
}

impl<O> Metric<O> for MetricsLambda<'_, O> {
    fn reset(&mut self) {
        self.mine().for_each(|leaf| leaf.metric.borrow_mut().reset());
    }

    fn update(&mut self, output: &O) -> anyhow::Result<()> {
        self.mine().try_for_each(|leaf| leaf.metric.try_borrow_mut()?.update(output))
    }

    fn observe(&mut self, output: &O) -> anyhow::Result<()> {
        self.mine().try_for_each(|leaf| leaf.metric.try_borrow_mut()?.observe(output))
    }

    fn compute(&self) -> anyhow::Result<MetricValue> {
        match &*self.node {
            Node::Metric(leaf) => leaf.metric.try_borrow()?.compute(),
            node => Ok(node.tensor()?.into()),
        }
    }

    /// That of the first metric in it.
    fn usage(&self) -> Usage {
        self.leaves.first().map_or(Usage::EpochWise, |leaf| leaf.metric.borrow().usage())
    }

    fn validate(&self) -> Result<()> {
        self.node.validate()
    }

    fn state(&self) -> anyhow::Result<Vec<Accumulated>> {
        let mut state = vec![];
        for (index, leaf) in self.leaves.iter().enumerate() {
            for part in leaf.metric.try_borrow()?.state()? {
                state.push(Accumulated { name: format!("{index}/{}", part.name), ..part });
            }
            if leaf.user.borrow().as_ptr() == Rc::as_ptr(&self.user) {
                let nothing = Tensor::f_zeros([0], (Kind::Int64, Device::Cpu))?;
                state.push(Accumulated::new(updates_it(index), nothing, Reduce::Concat));
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &[Accumulated]) -> anyhow::Result<()> {
        for (index, leaf) in self.leaves.iter().enumerate() {
            let parts = Accumulated::within(state, &index.to_string());
            leaf.metric.try_borrow_mut()?.load_state(&parts)?;
            let updates_it = updates_it(index);
            let is_mine = leaf.user.borrow().as_ptr() == Rc::as_ptr(&self.user);
            if state.iter().any(|part| part.name == updates_it) {
                *leaf.user.borrow_mut() = Rc::downgrade(&self.user);
            } else if is_mine {
                *leaf.user.borrow_mut() = Weak::new();
            }
        }
        Ok(())
    }
}

/// Notes whose calls count for a metric: another handle might come first when a run goes on.
fn updates_it(index: usize) -> String {
    format!("{index} is updated by this")
}

macro_rules! operator {
    ($($operator:ident $method:ident $function:ident),*) => {$(
        impl<'a, O, R: Into<MetricsLambda<'a, O>>> $operator<R> for MetricsLambda<'a, O> {
            type Output = Self;
            fn $method(self, other: R) -> Self {
                self.with(other, |a, b| a.$function(b))
            }
        }

        impl<'a, O, R: Into<MetricsLambda<'a, O>>> $operator<R> for &MetricsLambda<'a, O> {
            type Output = MetricsLambda<'a, O>;
            fn $method(self, other: R) -> MetricsLambda<'a, O> {
                self.clone().with(other, |a, b| a.$function(b))
            }
        }

        impl<'a, O> $operator<MetricsLambda<'a, O>> for f64 {
            type Output = MetricsLambda<'a, O>;
            fn $method(self, other: MetricsLambda<'a, O>) -> MetricsLambda<'a, O> {
                MetricsLambda::from(self).with(other, |a, b| a.$function(b))
            }
        }

        impl<'a, O> $operator<&MetricsLambda<'a, O>> for f64 {
            type Output = MetricsLambda<'a, O>;
            fn $method(self, other: &MetricsLambda<'a, O>) -> MetricsLambda<'a, O> {
                MetricsLambda::from(self).with(other, |a, b| a.$function(b))
            }
        }
    )*};
}

operator!(Add add f_add, Sub sub f_sub, Mul mul f_mul, Div div f_div, Rem rem f_remainder_tensor);

impl<O> Neg for MetricsLambda<'_, O> {
    type Output = Self;
    fn neg(self) -> Self {
        self.apply(|value| Ok(value.f_neg()?))
    }
}
