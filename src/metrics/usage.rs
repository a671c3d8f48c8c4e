use crate::event::Event;
use crate::event_filter::FilteredEvent;

/// When a metric is reset, updated and computed: ignite's `MetricUsage`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Usage {
    /// Over the iterations of each epoch, computed at its end.
    EpochWise,
    /// Over all epochs of a run, by the output at the end of each;
    /// [`RunningAverage::of_metric`](super::RunningAverage::of_metric) by its metric over each.
    RunningEpochWise,
    /// Of each iteration alone.
    BatchWise,
    /// Over all iterations of a run, computed at each.
    RunningBatchWise,
    /// Over the iterations of each epoch, computed at each.
    SingleEpochRunningBatchWise,
    /// Over those iterations of each epoch that pass the filter, computed at its end. The event must
    /// be [`Event::IterationCompleted`], as in `Event::IterationCompleted.every(10)`.
    BatchFiltered(FilteredEvent),
}

impl Usage {
    /// The events to reset, update and compute at.
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
