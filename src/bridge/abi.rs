//! The numbers that Rust and C++ both know: what Rust passes to a function of the bridge, and what it gets back. abi.h
//! has the same enums with the same names; the test below compares the two.

/// Makes each enum, its values from their numbers, and for the test a list of all numbers.
macro_rules! numbers {
    ($($(#[$outer:meta])* enum $name:ident {
        $($(#[$inner:meta])* $value:ident = $number:literal,)*
    })*) => {
        $(
            $(#[$outer])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
            #[repr(i32)]
            pub(crate) enum $name {
                $($(#[$inner])* $value = $number,)*
            }

            $(#[$outer])*
            impl TryFrom<i32> for $name {
                type Error = String;

                fn try_from(number: i32) -> Result<Self, String> {
                    match number {
                        $($number => Ok(Self::$value),)*
                        _ => Err(format!("{} {number} of the C++ side is unknown", stringify!($name))),
                    }
                }
            }
        )*

        /// A line for each enum and each of its numbers, as `tig_numbers` writes them.
        #[cfg(test)]
        const LINES: &[&str] = &[$(
            concat!("enum ", stringify!($name)),
            $(concat!(stringify!($value), " = ", $number),)*
        )*];
    };
}

numbers! {
    /// The C++ class of an optimizer: one of libtorch's, or ours (own.h), whose options name the algorithm.
    enum Class {
        Sgd = 0,
        Adam = 1,
        AdamW = 2,
        RmsProp = 3,
        Own = 4,
    }

    /// The algorithm of an optimizer.
    enum Algorithm {
        Sgd = 0,
        Adam = 1,
        AdamW = 2,
        RmsProp = 3,
        Adagrad = 4,
        NAdam = 5,
        RAdam = 6,
        Adamax = 7,
        Adadelta = 8,
        Asgd = 9,
        Rprop = 10,
        Lion = 11,
        Adafactor = 12,
        Muon = 13,
        SparseAdam = 14,
        AdamWScheduleFree = 15,
        SgdScheduleFree = 16,
        AdEMAMix = 17,
        Lbfgs = 18,
    }

    /// A hyper-parameter of a group.
    enum Hyper {
        Lr = 0,
        Momentum = 1,
        Dampening = 2,
        WeightDecay = 3,
        Nesterov = 4,
        Beta1 = 5,
        Beta2 = 6,
        Eps = 7,
        Amsgrad = 8,
        Alpha = 9,
        Centered = 10,
        Maximize = 11,
        LrDecay = 12,
        InitialAccumulatorValue = 13,
        MomentumDecay = 14,
        DecoupledWeightDecay = 15,
        Rho = 16,
        Lambd = 17,
        T0 = 18,
        EtaMinus = 19,
        EtaPlus = 20,
        StepSizeMin = 21,
        StepSizeMax = 22,
        Beta2Decay = 23,
        /// 0 stands for the precision of the parameter's type.
        Eps1 = 24,
        Eps2 = 25,
        D = 26,
        NsA = 27,
        NsB = 28,
        NsC = 29,
        NsSteps = 30,
        MatchRmsAdamW = 31,
        R = 32,
        WarmupSteps = 33,
        WeightLrPower = 34,
        /// The number of steps of the group.
        K = 35,
        /// The sum of the weights of all steps in the average.
        WeightSum = 36,
        LrMax = 37,
        /// 0 while parameters have their values for evaluation.
        TrainMode = 38,
        Beta3 = 39,
        /// 0 for no warm-up.
        Beta3Warmup = 40,
        /// 0 for no warm-up.
        AlphaWarmup = 41,
        MaxIter = 42,
        /// 0 stands for five quarters of the iterations.
        MaxEval = 43,
        ToleranceGrad = 44,
        ToleranceChange = 45,
        HistorySize = 46,
        StrongWolfe = 47,
    }

    /// How steps are made.
    enum Mode {
        /// libtorch's own loop, parameter by parameter.
        Loop = 0,
        /// One pass of our own on the CPU, libtorch's fused kernels on CUDA, the loop for parameters that neither can
        /// handle.
        Fused = 1,
        /// libtorch's fused kernels on the CPU too, so that tests without a GPU take CUDA's path.
        Kernels = 2,
    }

    /// An update of averages from their sources. The values of [`Average`](super::Average) say what each does.
    enum Update {
        Lerp = 0,
        Mean = 1,
        Copy = 2,
        Swap = 3,
        SwapBack = 4,
    }

    /// A device that has autocast.
    enum AutocastDevice {
        Cpu = 0,
        Cuda = 1,
    }

    #[cfg(feature = "distributed")]
    /// The kind of one of c10d's exceptions.
    enum Cause {
        /// An exception that c10d gives no type: one of gloo's, or another error.
        Other = 0,
        TimedOut = 1,
        Store = 2,
        Network = 3,
    }

    #[cfg(feature = "distributed")]
    /// How the tensors of all ranks become one.
    enum Reduction {
        Sum = 0,
        Avg = 1,
        Product = 2,
        Min = 3,
        Max = 4,
    }

    #[cfg(feature = "distributed")]
    /// The type to which gradients are rounded on their way to other ranks.
    enum Compression {
        None = 0,
        Fp16 = 1,
        Bf16 = 2,
    }

    /// How f16 and bf16 parameters are stored between steps.
    enum LowPrecision {
        None = 0,
        MasterWeights = 1,
        KahanSum = 2,
        StochasticRounding = 3,
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{CStr, c_char};

    use super::*;

    unsafe extern "C" {
        fn tig_numbers() -> *const c_char;
    }

    /// A number that one side has and the other does not, or that has another name there, is found here.
    #[test]
    fn both_sides_have_the_same_numbers() {
        // SAFETY: the C++ side returns a constant that ends with NUL.
        let theirs = unsafe { CStr::from_ptr(tig_numbers()) }.to_str().unwrap();
        assert_eq!(theirs.lines().collect::<Vec<_>>(), LINES);
    }
}
