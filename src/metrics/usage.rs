use crate::event::Event;
use crate::event_filter::FilteredEvent;

/// When a metric is reset, updated and computed: ignite's `MetricUsage`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Usage {
    /// Reset at the start of each epoch, updated at each iteration, computed at the end of the epoch.
    EpochWise,
    /// Reset at the start of a run, updated with the last output of each epoch and computed there.
    /// [`RunningAverage::of_metric`](super::RunningAverage::of_metric) takes the value of its metric over each epoch.
    RunningEpochWise,
    /// Reset, updated and computed at each iteration.
    BatchWise,
    /// Reset at the start of a run, updated and computed at each iteration.
    RunningBatchWise,
    /// Reset at the start of each epoch, updated and computed at each iteration.
    SingleEpochRunningBatchWise,
    /// Reset at the start of each epoch, updated at the iterations that pass the filter, computed at the end of the
    /// epoch. The event must be [`Event::IterationCompleted`], as in `Event::IterationCompleted.every(10)`.
    BatchFiltered(FilteredEvent),
}

impl Usage {
    /// Returns the events at which the metric is reset, updated and computed.
    pub(crate) fn events(&self) -> (Event, Event, Event) {
        use Event::*;
        match self {
            Self::EpochWise | Self::BatchFiltered(_) => {
                (EpochStarted, IterationCompleted, EpochCompleted)
            }
            Self::RunningEpochWise => (Started, EpochCompleted, EpochCompleted),
            Self::BatchWise => (IterationStarted, IterationCompleted, IterationCompleted),
            Self::RunningBatchWise => (Started, IterationCompleted, IterationCompleted),
            Self::SingleEpochRunningBatchWise => {
                (EpochStarted, IterationCompleted, IterationCompleted)
            }
        }
    }
}
