//! Who gave a command: a person at a terminal, or a program that hears of the progress.

use std::ffi::OsString;
use std::sync::Arc;

/// Whoever gave a command and waits for it.
#[derive(Clone)]
pub struct Caller {
    /// The command's words after the program's name.
    pub(super) words: Vec<OsString>,
    pub(super) ear: Ear,
}

impl Caller {
    /// The same, who is told nothing but errors.
    pub(super) fn quiet(&self) -> Self {
        Self {
            words: self.words.clone(),
            ear: Ear::Terminal { is_quiet: true },
        }
    }

    /// Whether a person is told what happens.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self.ear, Ear::Terminal { .. })
    }
}

/// What progress is told to.
#[derive(Clone)]
pub(super) enum Ear {
    /// A terminal, or what stderr is instead; Ctrl-C ends the command.
    Terminal { is_quiet: bool },
    /// A program.
    Listener(Arc<dyn Listener>),
}

/// How far a command has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// What is counted: layers, runs, or questions under the name of their task.
    pub what: String,
    /// How many of them are done.
    pub n_done: usize,
    /// How many there are.
    pub n: usize,
    /// What is being done within the present one, where it has parts.
    pub stage: Option<String>,
}

/// A program that waits for a command; asked from the threads that work.
pub trait Listener: Send + Sync {
    /// The command has come so far.
    fn on_step(&self, step: Step);
    /// Whether the command is to end; it does so at its next step.
    fn is_cancelled(&self) -> bool;
}

/// What a command did.
pub struct Done {
    /// The object of `--json`; `None` where the text is all there is.
    pub json: Option<serde_json::Value>,
    /// The same for people.
    pub text: String,
    /// False if the command worked and found what must not be.
    pub is_good: bool,
}

impl Done {
    pub(super) fn new(json: serde_json::Value, text: String) -> Self {
        Self {
            json: Some(json),
            text,
            is_good: true,
        }
    }

    pub(super) fn of_text(text: String) -> Self {
        Self {
            json: None,
            text,
            is_good: true,
        }
    }
}

/// Why a command was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was wrong.
    pub message: String,
    /// What can be done about it.
    pub hint: String,
}
