//! The `vlmq` command: flags to plans, results to text.
//!
//! At a terminal ([`run`]) data goes to stdout, everything else to stderr; the exit code is 0 for
//! done, 1 for a quality gate missed, 2 for an error. A program can give the same commands
//! ([`call`]) and has the object of `--json`.

mod calibrate;
mod caller;
mod compare;
mod eval;
mod export;
mod generate;
mod inspect;
mod launch;
mod log;
mod merge;
mod pad;
mod pages;
mod progress;
mod prompt;
mod quantize;
mod report;
mod rotate;
mod score;
mod summary;
mod trace;
mod verify;

pub use self::caller::{Caller, Done, Failure, Listener, Step};
pub use self::launch::default_threads;

use self::caller::Ear;
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::families;
use crate::model::{ModelDevice, ModelSource};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the objects that `--json` prints.
const SCHEMA: u32 = 1;

/// More threads than any machine has cores; far more of them take minutes to start.
const MAX_THREADS: usize = 1024;

#[derive(Parser)]
#[command(name = "vlmq", version, about, propagate_version = true)]
struct Cli {
    /// Print one JSON object on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Threads to compute with; all cores if absent
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    log: log::LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a model, and what each number format would make of it
    Inspect(inspect::Args),
    /// Quantize a model into a new folder
    Quantize(quantize::Args),
    /// Sum up what a model's linears see of samples, once, for `vlmq quantize --statistics`
    Calibrate(calibrate::Args),
    /// Add up what `vlmq calibrate` made of shards of the samples
    Merge(merge::Args),
    /// Write a quantized folder once more, in another format
    Export(export::Args),
    /// Read a quantized folder as its readers will, and compare it with its source
    Verify(verify::Args),
    /// Turn a model's residual stream by an orthogonal matrix, its function kept, into a new folder
    Rotate(rotate::Args),
    /// Widen a model's MLPs by zeros, its function kept, so that engines can share it out
    Pad(pad::Args),
    /// Answer the questions of a task and count right answers
    Eval(eval::Args),
    /// Score answers that were written down, or hold two models' answers against each other
    Score(score::Args),
    /// Write what a run did as a page with pictures, or as Markdown
    Report(report::Args),
    /// Run methods, formats and seeds on one model and make a table
    Compare(compare::Args),
    /// Answer one prompt about images
    Generate(generate::Args),
    /// Write the tensors of one forward pass, to hold them against another implementation
    Trace(trace::Args),
    /// Print what makes a shell complete this command's words
    Completions(pages::CompletionArgs),
    /// Print the manual page, or write those of all commands into a folder
    Man(pages::ManArgs),
}

/// Runs the command line of this process; returns its exit code.
pub fn run() -> u8 {
    run_words(std::env::args_os())
}

/// Runs a command line, the program's name first, as if it had been typed; returns its exit code.
pub fn run_words(words: impl IntoIterator<Item = OsString>) -> u8 {
    let words: Vec<OsString> = words.into_iter().collect();
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(help) => {
            // Where nobody can be told, the code still says how it went.
            let _ = help.print();
            return u8::try_from(help.exit_code()).unwrap_or(2);
        }
    };
    let caller = Caller {
        words: words.into_iter().skip(1).collect(),
        ear: Ear::Terminal {
            is_quiet: cli.quiet,
        },
    };
    let as_json = cli.json;
    let done = cli.log.start().and_then(|()| execute(cli, &caller));
    match done.and_then(|done| print(done, as_json)) {
        Ok(code) => code,
        Err(error) => {
            let failure = failure(&error);
            tell(&format!("error: {}", failure.message));
            tell(&format!("hint: {}", failure.hint));
            2
        }
    }
}

/// Does one command for a program; `words` are those after the program's name. Nothing is printed
/// and no signal is listened for; flags of the log and of printing have no effect.
///
/// # Errors
/// [`Failure`], with the same text that a terminal would show.
pub fn call(words: Vec<OsString>, listener: Arc<dyn Listener>) -> Result<Done, Failure> {
    let all = [OsString::from("vlmq")].into_iter().chain(words.clone());
    let cli = Cli::try_parse_from(all).map_err(|wrong| Failure {
        message: without_head(&wrong.to_string()).to_owned(),
        hint: "see `vlmq help` for the allowed values".into(),
    })?;
    let caller = Caller {
        words,
        ear: Ear::Listener(listener),
    };
    execute(cli, &caller).map_err(|error| failure(&error))
}

/// What the parser of flags says, without the word that a terminal's line begins with.
fn without_head(text: &str) -> &str {
    text.strip_prefix("error: ").unwrap_or(text).trim_end()
}

fn print(done: Done, as_json: bool) -> anyhow::Result<u8> {
    match done.json.filter(|_| as_json) {
        Some(json) => say(&(serde_json::to_string(&json)? + "\n"))?,
        None => say(&done.text)?,
    }
    Ok(u8::from(!done.is_good))
}

fn failure(error: &anyhow::Error) -> Failure {
    let known = error.downcast_ref::<Error>();
    Failure {
        message: message(error),
        hint: known.map_or("see `vlmq help`", |e| e.hint()).to_owned(),
    }
}

/// The error and its causes, those left out that the error's own words end with.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Does the command, on its own threads if it is to have a number of them.
fn execute(cli: Cli, caller: &Caller) -> anyhow::Result<Done> {
    let Some(n) = cli.threads else {
        return dispatch(&cli.command, caller);
    };
    if !(1..=MAX_THREADS).contains(&n) {
        return Err(Error::Invalid {
            what: format!("--threads {n}"),
            why: format!("1 to {MAX_THREADS} expected"),
        }
        .into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
    pool.context("--threads")?
        .install(|| dispatch(&cli.command, caller))
}

fn dispatch(command: &Command, caller: &Caller) -> anyhow::Result<Done> {
    match command {
        Command::Inspect(args) => inspect::run(args),
        Command::Quantize(args) => quantize::run(args, caller),
        Command::Calibrate(args) => calibrate::run(args, caller),
        Command::Merge(args) => merge::run(args),
        Command::Export(args) => export::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Rotate(args) => rotate::run(args),
        Command::Pad(args) => pad::run(args),
        Command::Eval(args) => eval::run(args, caller),
        Command::Score(args) => score::run(args),
        Command::Report(args) => report::run(args),
        Command::Compare(args) => compare::run(args, caller),
        Command::Generate(args) => generate::run(args, caller),
        Command::Trace(args) => trace::run(args),
        Command::Completions(args) => pages::completions(args),
        Command::Man(args) => pages::man(args),
    }
}

fn open_model(dir: &Path) -> anyhow::Result<ModelSource> {
    open_model_on(dir, candle_core::Device::Cpu)
}

fn open_model_on(dir: &Path, device: impl Into<ModelDevice>) -> anyhow::Result<ModelSource> {
    let checkpoint = Checkpoint::open(dir)?;
    Ok(families::open_model(checkpoint, device)?)
}

/// Writes to stdout. A reader that has seen enough, as in `vlmq … | head`, is no error.
fn say(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("cannot write to stdout"),
        _ => Ok(()),
    }
}

/// Writes a line to stderr. Where nobody can be told, work goes on untold.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The folder of a model, shared by all commands that read one.
#[derive(clap::Args)]
struct ModelArg {
    /// Folder with config.json, *.safetensors (or vlmq's *.gguf), tokenizer.json and the processor's files
    #[arg(value_name = "MODEL")]
    model: PathBuf,
}
