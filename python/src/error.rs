//! Failures as the package's own exception, with the text that a terminal would show.

use pyo3::prelude::*;
use vlmq::cli::Failure;

/// `vlmq.Error(message, hint)`.
pub fn raised(py: Python<'_>, failure: &Failure) -> PyErr {
    let class = py.import("vlmq._error").and_then(|m| m.getattr("Error"));
    let made = class.and_then(|class| class.call1((&failure.message, &failure.hint)));
    made.map_or_else(|error| error, PyErr::from_value)
}

/// The same of the library's error.
pub fn of_library(py: Python<'_>, error: &vlmq::Error) -> PyErr {
    let failure = Failure {
        message: error.to_string(),
        hint: error.hint().to_owned(),
    };
    raised(py, &failure)
}
