use std::cell::{Cell, RefCell};
use std::ops::{Add, Div, Mul, Neg, Rem, Sub};
use std::rc::{Rc, Weak};

use tch::{Device, Kind, Tensor};

use super::{Accumulated, Metric, Reduce, Usage};
use crate::error::{Error, Result};
use crate::metrics::MetricValue;

/// A metric to compute with: ignite's `MetricsLambda`, and the handle that [`Metric::shared`] gives.
///
/// `+ - * / %` with numbers and other handles, and the methods below, make metrics whose value is
/// computed from the values of others, as tensors and without a host sync. Clones share the metric.
///
/// A metric that occurs several times, in one expression or in several attached ones, is updated once: the first of
/// the living handles that is reset or updated, with its own [`Usage`], does so for all of them, until its value is
/// computed. So handles may be attached to several engines that run one after the other, each over whole epochs, but
/// not to two whose epochs are under way at the same time. Handles that are called by hand follow the same rule.
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
    /// Each metric of the expression once, in the order in which the expression names them.
    leaves: Vec<Rc<Leaf<'a, O>>>,
    /// The identity of this handle; a leaf notes with it which handle updates its metric.
    user: Rc<()>,
}

crate::debug::opaque_debug!(MetricsLambda<'a, O>);

struct Leaf<'a, O> {
    metric: RefCell<Box<dyn Metric<O> + 'a>>,
    /// The handle whose resets and updates count for the metric.
    user: RefCell<Weak<()>>,
    /// Whether that handle has reset or updated the metric since it last computed the value. Until then no other handle
    /// may take over.
    under_way: Cell<bool>,
}

type Function<'a> = Box<dyn Fn(&[Tensor]) -> anyhow::Result<Tensor> + 'a>;

enum Node<'a, O> {
    Metric(Rc<Leaf<'a, O>>),
    Number(f64),
    Apply(Function<'a>, Vec<Rc<Node<'a, O>>>),
    /// An expression with wrong arguments; attaching it is an error with this text.
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
    /// Makes a handle of a metric, as [`Metric::shared`] does.
    pub fn of(metric: impl Metric<O> + 'a) -> Self {
        let metric = RefCell::new(Box::new(metric) as Box<dyn Metric<O> + 'a>);
        let leaf = Rc::new(Leaf { metric, user: RefCell::default(), under_way: Cell::new(false) });
        Self::from_node(Node::Metric(leaf.clone()), vec![leaf])
    }

    /// Makes a metric of a function of the values of others, in this order.
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

    /// Makes a handle that cannot be attached, for this reason.
    pub(super) fn refused(reason: impl Into<String>) -> Self {
        Self::from_node(Node::Refused(reason.into()), vec![])
    }

    fn from_node(node: Node<'a, O>, leaves: Vec<Rc<Leaf<'a, O>>>) -> Self {
        Self { node: Rc::new(node), leaves, user: Rc::default() }
    }

    /// Applies a function to the value.
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

    /// Takes the mean of all elements.
    pub fn mean(self) -> Self {
        self.apply(|value| Ok(value.f_mean(super::to_value::accumulator_kind(value.device()))?))
    }

    /// Takes the sum of all elements.
    pub fn sum(self) -> Self {
        self.apply(|value| Ok(value.f_sum(None)?))
    }

    /// Takes element, or row, number `index` along the first dimension; a negative one counts from the end.
    pub fn index(self, index: i64) -> Self {
        self.apply(move |value| Ok(value.f_select(0, index)?))
    }

    /// Raises the value to a power, element by element.
    pub fn pow(self, exponent: impl Into<Self>) -> Self {
        self.with(exponent, tch::Tensor::f_pow)
    }

    /// Divides and rounds down, element by element: Python's `//`.
    pub fn floor_divide(self, other: impl Into<Self>) -> Self {
        self.with(other, tch::Tensor::f_floor_divide)
    }

    /// Returns the metrics that this handle resets and updates: those that no other living handle has under way.
    fn mine(&self) -> impl Iterator<Item = &Leaf<'a, O>> {
        self.leaves.iter().map(|leaf| &**leaf).filter(|leaf| {
            let mut user = leaf.user.borrow_mut();
            if user.strong_count() == 0 || !leaf.under_way.get() {
                *user = Rc::downgrade(&self.user);
            }
            let is_mine = user.as_ptr() == Rc::as_ptr(&self.user);
            leaf.under_way.set(true);
            is_mine
        })
    }

    /// Whether this handle resets and updates the metric, and has it under way.
    fn is_updating(&self, leaf: &Leaf<'a, O>) -> bool {
        leaf.under_way.get() && leaf.user.borrow().as_ptr() == Rc::as_ptr(&self.user)
    }
}

/// Clones share the metric.
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
        let value = match &*self.node {
            Node::Metric(leaf) => leaf.metric.try_borrow()?.compute(),
            node => node.tensor().map(MetricValue::from),
        };
        let mine = self.leaves.iter().filter(|leaf| self.is_updating(leaf));
        mine.for_each(|leaf| leaf.under_way.set(false));
        value
    }

    /// Returns the usage of the first metric in the expression.
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
            if self.is_updating(leaf) {
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
            if state.iter().any(|part| part.name == updates_it) {
                *leaf.user.borrow_mut() = Rc::downgrade(&self.user);
                leaf.under_way.set(true);
            } else if self.is_updating(leaf) {
                leaf.under_way.set(false);
            }
        }
        Ok(())
    }
}

/// The name of a part which notes that this handle updates the metric; another handle might come first when a run
/// goes on.
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
