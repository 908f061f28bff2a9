//! Arrays of numpy. They are made by numpy itself and filled through the buffer protocol, so that
//! no version of its C interface is bound to.

use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// A number that numpy has a type for.
pub trait Number: Element {
    const DTYPE: &'static str;
}

impl Number for f32 {
    const DTYPE: &'static str = "float32";
}

impl Number for u32 {
    const DTYPE: &'static str = "uint32";
}

/// A new array of this shape with these values, row by row.
pub fn array<'py, T: Number>(
    py: Python<'py>,
    shape: &[usize],
    values: &[T],
) -> PyResult<Bound<'py, PyAny>> {
    let shape = PyTuple::new(py, shape)?;
    let array = py
        .import("numpy")?
        .call_method1("empty", (shape, T::DTYPE))?;
    PyBuffer::<T>::get(&array)?.copy_from_slice(py, values)?;
    Ok(array)
}
