//! Work on a thread of its own. Only the thread that called may hear of Ctrl-C and run Python.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two looks whether Ctrl-C was pressed.
const LOOK: Duration = Duration::from_millis(50);

/// As much as a program's first thread has.
const STACK_BYTES: usize = 8 << 20;

/// Whether the work is to end; shared with it.
#[derive(Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Work that gives a `T`, and tells `M`s until then.
pub struct Job<M, T> {
    told: Mutex<Receiver<M>>,
    cancel: Cancel,
    thread: Option<JoinHandle<T>>,
}

impl<M: Send + 'static, T: Send + 'static> Job<M, T> {
    /// `work` must drop the sender that belongs to `told` at its end.
    pub fn start(
        told: Receiver<M>,
        cancel: Cancel,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> PyResult<Self> {
        let thread = std::thread::Builder::new()
            .name("vlmq".into())
            .stack_size(STACK_BYTES)
            .spawn(work)?;
        Ok(Self {
            told: Mutex::new(told),
            cancel,
            thread: Some(thread),
        })
    }

    /// The next message, `None` when there will be none. Python's lock is free meanwhile.
    ///
    /// # Errors
    /// What a handler of signals raised, KeyboardInterrupt as a rule; the work is then to end.
    pub fn next(&self, py: Python<'_>) -> PyResult<Option<M>> {
        loop {
            let told = py.detach(|| {
                let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.recv_timeout(LOOK)
            });
            if let Err(raised) = py.check_signals() {
                self.cancel.ask();
                return Err(raised);
            }
            match told {
                Ok(message) => return Ok(Some(message)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    /// Waits for the end; what is told meanwhile is let go. `None` if it was waited for before.
    ///
    /// # Errors
    /// RuntimeError if the work panicked.
    pub fn join(&mut self, py: Python<'_>) -> PyResult<Option<T>> {
        let Some(thread) = self.thread.take() else {
            return Ok(None);
        };
        let joined = py.detach(|| {
            let told = self.told.get_mut().unwrap_or_else(PoisonError::into_inner);
            while told.recv().is_ok() {}
            thread.join()
        });
        let panicked = |_| PyRuntimeError::new_err("this is a bug in vlmq; please report it");
        joined.map(Some).map_err(panicked)
    }

    pub fn cancel(&self) {
        self.cancel.ask();
    }
}

impl<M, T> Drop for Job<M, T> {
    /// Work that nobody waits for any more is to end; it does so by itself.
    fn drop(&mut self) {
        self.cancel.ask();
    }
}
