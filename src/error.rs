//! The one error type of the library.
//!
//! Every variant names the file or module it speaks of, what was expected, what was found, and
//! leaves the user something to do: [`Error::hint`] is printed as the last line of a failed run.

use std::path::{Path, PathBuf};

/// Result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and what was expected instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a read, write, rename or listing.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// File or folder concerned.
        path: PathBuf,
        /// What was being done, as a verb phrase: "read", "create the output folder".
        action: &'static str,
        /// The operating system's own error.
        source: std::io::Error,
    },
    /// A file exists but its content breaks its format.
    #[error("{path}: {at}: {why}", path = path.display())]
    Format {
        /// File concerned.
        path: PathBuf,
        /// Place inside the file: a key, a line, a tensor name, "header".
        at: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A file, tensor, key or token that the work needs is not there.
    #[error("missing {what} in {place}")]
    Missing {
        /// The thing that is absent, by name.
        what: String,
        /// Where it was looked for.
        place: String,
    },
    /// A tensor or matrix has another shape than its module needs.
    #[error("{module}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Checkpoint name of the tensor or module.
        module: String,
        /// Shape that the configuration demands.
        expected: Vec<usize>,
        /// Shape that was found.
        found: Vec<usize>,
    },
    /// A valid request or file that this version does not handle.
    #[error("unsupported: {what}")]
    Unsupported {
        /// What was asked for, and the nearest thing that is supported.
        what: String,
    },
    /// Two requests or settings contradict each other, or a value is outside its range.
    #[error("{what}: {why}")]
    Invalid {
        /// Option, key or argument.
        what: String,
        /// What was given and what is allowed.
        why: String,
    },
    /// A Hessian stayed singular after the whole damping ladder.
    #[error(
        "{module}: the damped Hessian is not positive definite (pivot {pivot}, dampening_frac {dampening_frac})"
    )]
    Singular {
        /// Module being solved.
        module: String,
        /// Index of the first non-positive pivot.
        pivot: usize,
        /// Last relative damping that was tried.
        dampening_frac: f64,
    },
    /// NaN or infinity where only finite numbers make sense.
    #[error("{module}: {count} value(s) are NaN or infinite in {stage}")]
    NotFinite {
        /// Module, tensor or sample.
        module: String,
        /// Stage of the work: "weights", "hidden states", "hessian".
        stage: String,
        /// How many values are not finite.
        count: usize,
    },
    /// An output exists already, and nothing is ever overwritten.
    #[error("{path}: exists already", path = path.display())]
    Exists {
        /// The path in the way.
        path: PathBuf,
    },
    /// Another process is at work on the same output.
    #[error("{path}: another process is at work here", path = path.display())]
    Busy {
        /// Its progress folder.
        path: PathBuf,
    },
    /// There is progress of a run that was made of something else.
    #[error("{path}: holds finished layers of a run with other {what}", path = path.display())]
    OtherRun {
        /// The progress folder.
        path: PathBuf,
        /// What was otherwise.
        what: String,
    },
    /// There are answers of a run that was started otherwise.
    #[error("{path}: holds answers of a run with another {what}", path = path.display())]
    OtherAnswers {
        /// The output folder.
        path: PathBuf,
        /// What was otherwise.
        what: String,
    },
    /// Another rank ended the run, or is not of this run.
    #[error("rank {rank}: {why}")]
    Rank {
        /// Which one.
        rank: usize,
        /// What is known of it, or what it said.
        why: String,
    },
    /// Another rank is gone without a word.
    #[error("rank {rank} is lost: {why}")]
    RankLost {
        /// Which one.
        rank: usize,
        /// How that was noticed.
        why: String,
    },
    /// The network refused a connection.
    #[error("cannot {action} {place}: {source}")]
    Network {
        /// Which rank or address.
        place: String,
        /// What was being done, as a verb phrase: "reach".
        action: &'static str,
        /// The operating system's own error.
        source: std::io::Error,
    },
    /// The user asked the run to stop.
    #[error("interrupted; nothing unfinished was kept")]
    Interrupted,
    /// A GPU, its driver or a library of it failed.
    #[error("{device}: cannot {action}: {why}")]
    Device {
        /// The device, as it is named on the command line.
        device: String,
        /// What was being done, as a verb phrase: "open", "launch solve_block".
        action: String,
        /// What it said.
        why: String,
    },
    /// The tensor library failed; shapes and devices are in its message.
    #[error("{context}: {source}")]
    Tensor {
        /// What was being computed.
        context: String,
        /// The tensor library's own error.
        source: candle_core::Error,
    },
}

impl Error {
    /// An [`Error::Io`] for `path` while doing `action`.
    pub fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            action,
            source,
        }
    }

    /// An [`Error::Format`] at a place inside a file.
    pub fn format(path: &Path, at: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Format {
            path: path.to_path_buf(),
            at: at.into(),
            why: why.into(),
        }
    }

    /// What the user can do about it; the last line of a failed run.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => {
                "check that the path exists, is readable or writable, and that the disk has room"
            }
            Self::Format { .. } => "the file is damaged or of another kind; fetch or make it again",
            Self::Missing { .. } => {
                "put what is named there; a checkpoint needs config.json, its safetensors, tokenizer.json \
                 and the processor's files, a sample its image"
            }
            Self::Shape { .. } => {
                "config.json and the tensors disagree; use the config that came with these weights"
            }
            Self::Unsupported { .. } => "run `vlmq inspect MODEL` to see what is supported",
            Self::Invalid { .. } => "see `vlmq help` for the allowed values",
            Self::Singular { .. } => {
                "use more or more varied samples, or raise it with --set dampening_frac=0.05"
            }
            Self::NotFinite { .. } => {
                "the weights or the calibration data hold NaN or infinity; check their source"
            }
            Self::Exists { .. } => "choose another --output, or remove that folder yourself",
            Self::Busy { .. } => "wait until it is done, or choose another --output",
            Self::OtherRun { .. } => {
                "start it as it was started then, choose another --output, or give up those layers with \
                 --resume never"
            }
            Self::OtherAnswers { .. } => {
                "start it as it was started then, choose another --output, or remove that folder yourself"
            }
            Self::Rank { .. } | Self::RankLost { .. } => {
                "start all ranks again, as many as you like: layers that are finished are gone on with"
            }
            Self::Network { .. } => {
                "all ranks need the same MASTER_ADDR and MASTER_PORT, of a machine that they can reach"
            }
            Self::Device { .. } => {
                "`nvidia-smi` tells what GPUs there are and how much memory is free; `--device cpu` does \
                 without"
            }
            Self::Interrupted => "start the command again to have the rest",
            Self::Tensor { .. } => {
                "this is a bug in vlmq unless memory ran out; please report it with the command"
            }
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::Tensor {
            context: "tensor operation".into(),
            source,
        }
    }
}
