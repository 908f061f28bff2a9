//! The commands of the program.

use crate::error;
use crate::job::{Cancel, Job};
use pyo3::prelude::*;
use std::ffi::OsString;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use vlmq::cli::{Listener, Step};

/// Hands on what the command tells, and whether it is to end.
struct Ear {
    steps: Mutex<Sender<Step>>,
    cancel: Cancel,
}

impl Listener for Ear {
    fn on_step(&self, step: Step) {
        let steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever no longer listens has asked for the end.
        let _ = steps.send(step);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_asked()
    }
}

/// Does the command that these words give, without the program's name; returns the object that
/// `--json` would print, its text for people, and whether all was well. `progress` is called with
/// (what, n_done, n, stage).
#[pyfunction]
pub fn call(
    py: Python<'_>,
    words: Vec<OsString>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Option<String>, String, bool)> {
    let (sender, steps) = mpsc::channel();
    let cancel = Cancel::default();
    let ear = Ear {
        steps: Mutex::new(sender),
        cancel: cancel.clone(),
    };
    let work = move || vlmq::cli::call(words, Arc::new(ear));
    let mut job = Job::start(steps, cancel, work)?;
    let waited = wait(py, &job, progress.as_ref());
    if waited.is_err() {
        job.cancel();
    }
    let done = job.join(py)?;
    waited?;
    match done {
        Some(Ok(done)) => Ok((done.json.map(|j| j.to_string()), done.text, done.is_good)),
        Some(Err(failure)) => Err(error::raised(py, &failure)),
        None => Ok((None, String::new(), false)),
    }
}

fn wait<T: Send + 'static>(
    py: Python<'_>,
    job: &Job<Step, T>,
    progress: Option<&Py<PyAny>>,
) -> PyResult<()> {
    while let Some(step) = job.next(py)? {
        if let Some(progress) = progress {
            progress.call1(py, (step.what, step.n_done, step.n, step.stage))?;
        }
    }
    Ok(())
}

/// The program itself, with these words after its name; returns its exit code.
#[pyfunction]
pub fn main(py: Python<'_>, words: Vec<OsString>) -> u8 {
    let words = [OsString::from("vlmq")].into_iter().chain(words);
    let words: Vec<OsString> = words.collect();
    py.detach(|| vlmq::cli::run_words(words))
}
