//! The native part of the Python package: commands, and what a calibration pass sees as arrays.
//!
//! Work runs on a thread of its own without Python's lock; Python's thread waits for it, hands on
//! its progress and hears of Ctrl-C. What the functions take and give is written down for users in
//! `vlmq/__init__.py`; here are the shapes that it is made of.

mod array;
mod command;
mod error;
mod job;
mod statistics;

use pyo3::prelude::*;
use vlmq::dataset::chosen_rows;

/// Which of `n_rows` rows a run with this seed calibrates on: the same as of a file of them.
#[pyfunction]
fn choose(n_rows: usize, n: usize, seed: u64) -> Vec<usize> {
    chosen_rows(n_rows, n, seed)
}

#[pymodule]
fn _vlmq(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<statistics::Groups>()?;
    module.add_function(wrap_pyfunction!(choose, module)?)?;
    module.add_function(wrap_pyfunction!(command::call, module)?)?;
    module.add_function(wrap_pyfunction!(command::main, module)?)?;
    module.add_function(wrap_pyfunction!(statistics::statistics, module)?)
}
