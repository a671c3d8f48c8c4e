use std::fmt;

use serde_json::Value;

use crate::engine::State;
use crate::error::{Error, Result};

/// The direction in which a metric gets better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Smaller values are better, as of a loss.
    Min,
    /// Larger values are better, as of an accuracy.
    Max,
}

/// The score that decides which files are kept: larger is better. File names show a float with four decimals.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// A whole number.
    Int(i64),
    /// Any other number. A file whose score is NaN is never kept.
    Float(f64),
}

impl From<i64> for Score {
    fn from(score: i64) -> Self {
        Self::Int(score)
    }
}

impl From<f64> for Score {
    fn from(score: f64) -> Self {
        Self::Float(score)
    }
}

impl Score {
    pub(super) fn as_f64(self) -> f64 {
        match self {
            Self::Int(score) => score as f64,
            Self::Float(score) => score,
        }
    }

    pub(super) fn negated(self) -> Self {
        match self {
            Self::Int(score) => Self::Int(score.saturating_neg()),
            // Subtracting from 0 gives a zero without a sign.
            Self::Float(score) => Self::Float(0. - score),
        }
    }

    /// The score as JSON; an infinity becomes a text, because JSON has none.
    pub(super) fn saved(self) -> Value {
        match self {
            Self::Int(score) => score.into(),
            Self::Float(score) if score.is_finite() => score.into(),
            Self::Float(score) => score.to_string().into(),
        }
    }

    pub(super) fn loaded(saved: &Value) -> Result<Self> {
        let score = match saved {
            Value::Number(score) => {
                score.as_i64().map(Self::Int).or(score.as_f64().map(Self::Float))
            }
            Value::String(score) => score.parse().ok().map(Self::Float),
            _ => None,
        };
        score.ok_or_else(|| Error::State(format!("{saved} is no score of a checkpoint")))
    }
}

/// Shows the score as ignite writes it.
impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(score) => write!(f, "{score}"),
            Self::Float(score) => write!(f, "{score:.4}"),
        }
    }
}

pub(super) type ScoreFn<B, O> = Box<dyn Fn(&State<B, O>) -> Result<Score>>;

/// How the score is computed. Without one, the step is the score.
pub(super) struct Scoring<B, O> {
    pub(super) name: Option<String>,
    pub(super) of: ScoreFn<B, O>,
    /// Whether smaller values of the metric are better, so that the score is its negative.
    pub(super) negated: bool,
}
