//! Runs that stop in mid pass and go on. A run that goes on asks whether libtorch's generator of random numbers was
//! drawn from, which all threads share: no test here draws from it, and those that do are in other programs.

mod data;
mod engine;
