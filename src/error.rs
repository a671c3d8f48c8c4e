use std::path::PathBuf;

use crate::event::Event;

/// What can go wrong, with who, where and when.
///
/// Step functions and handlers return [`anyhow::Result`], so that any error passes with `?`; the
/// engine wraps what they return into [`Error::Step`] or [`Error::Handler`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument outside what is allowed. The text says which, what was given and what to do.
    #[error("{0}")]
    InvalidArgument(String),

    /// No parameter group of that name or number.
    #[error("no parameter group {group}; this optimizer has: {}", available.join(", "))]
    UnknownGroup {
        /// What was asked for.
        group: String,
        /// The groups there are.
        available: Vec<String>,
    },

    /// The optimizer has no hyper-parameter of that name.
    #[error("{optimizer} has no hyper-parameter '{name}'; it has: {}", available.join(", "))]
    UnknownHyperParameter {
        /// What was asked for.
        name: String,
        /// The optimizer, by its PyTorch name.
        optimizer: &'static str,
        /// What it has.
        available: Vec<&'static str>,
    },

    /// libtorch (or tch) refused an operation.
    #[error("{operation}: {message}")]
    Libtorch {
        /// What was being done.
        operation: String,
        /// libtorch's own words, without its C++ stack.
        message: String,
    },

    /// The step function returned an error or panicked.
    #[error("the step of iteration {iteration} (epoch {epoch}) failed")]
    Step {
        /// Epoch, from 1.
        epoch: u64,
        /// Iteration, from 1.
        iteration: u64,
        /// What the step returned.
        source: anyhow::Error,
    },

    /// A handler returned an error or panicked.
    #[error("handler {handler} of {event} failed at iteration {iteration} (epoch {epoch})")]
    Handler {
        /// The handler's name: for a closure, where it was registered.
        handler: String,
        /// The event that was fired.
        event: Event,
        /// Epoch, from 1 once running.
        epoch: u64,
        /// Iteration, from 1 once running.
        iteration: u64,
        /// What the handler returned.
        source: anyhow::Error,
    },

    /// The data source could not give a batch.
    #[error("no batch for iteration {} (epoch {epoch})", iteration + 1)]
    Data {
        /// Epoch, from 1.
        epoch: u64,
        /// The last iteration that had its batch.
        iteration: u64,
        /// What the source returned.
        source: anyhow::Error,
    },

    /// A saved state that does not fit. The text names the part.
    #[error("{0}")]
    State(String),

    /// A file could not be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },

    /// Something between the processes of a [`ProcessGroup`](crate::distributed::ProcessGroup) went wrong. End the
    /// process with a code other than 0.
    #[cfg(feature = "distributed")]
    #[error("rank {rank}, {op}: {kind}: {message}{}", crate::failure_kind::unanswered(missing))]
    Distributed {
        /// What it was.
        kind: crate::failure_kind::FailureKind,
        /// The rank that says so: this process.
        rank: usize,
        /// What was being done.
        op: String,
        /// Other ranks that did not answer within 2 seconds of the failure, or did not join. A rank that was busy with
        /// something else for so long is among them.
        missing: Vec<usize>,
        /// libtorch's own words, or how the ranks differ.
        message: String,
    },
}

/// A panic caught in a step or handler, as an error: its message.
#[derive(Debug, thiserror::Error)]
#[error("panicked: {0}")]
pub struct Panicked(pub String);

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::InvalidArgument(text.into())
    }

    pub(crate) fn libtorch(operation: impl Into<String>, message: impl ToString) -> Self {
        let message = message.to_string();
        // What follows is a C++ stack trace.
        let message =
            message.split("\nException raised from").next().unwrap_or_default().to_owned();
        Self::Libtorch { operation: operation.into(), message }
    }

    /// This error, which also tells of another that came of it or beside it.
    pub(crate) fn besides(mut self, other: Self) -> Self {
        let text = format!("(besides: {:#})", anyhow::Error::from(other));
        match &mut self {
            Self::Step { source, .. }
            | Self::Handler { source, .. }
            | Self::Data { source, .. } => {
                let cause = std::mem::replace(source, anyhow::Error::msg(""));
                *source = cause.context(text);
            }
            Self::InvalidArgument(message)
            | Self::State(message)
            | Self::Libtorch { message, .. } => {
                message.push(' ');
                message.push_str(&text);
            }
            #[cfg(feature = "distributed")]
            Self::Distributed { message, .. } => {
                message.push(' ');
                message.push_str(&text);
            }
            Self::Io { source, .. } => {
                *source = std::io::Error::new(source.kind(), format!("{source} {text}"));
            }
            Self::UnknownGroup { .. } | Self::UnknownHyperParameter { .. } => {
                self = Self::InvalidArgument(format!("{self} {text}"));
            }
        }
        self
    }
}
