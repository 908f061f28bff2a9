//! Flags to plans, results to text. Data goes to stdout, everything else to stderr; the exit code
//! is 0 for done, 1 for a quality gate missed, 2 for an error.

mod compare;
mod eval;
mod export;
mod generate;
mod inspect;
mod log;
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

use anyhow::Context;
use clap::{Parser, Subcommand};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vlmq::Error;
use vlmq::checkpoint::Checkpoint;
use vlmq::families;
use vlmq::model::ModelSource;

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
    /// Write a quantized folder once more, in another format
    Export(export::Args),
    /// Read a quantized folder as its readers will, and compare it with its source
    Verify(verify::Args),
    /// Turn a model's residual stream by an orthogonal matrix, its function kept, into a new folder
    Rotate(rotate::Args),
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

/// Runs the command line and says how it ended.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            tell(&format!("error: {}", message(&error)));
            let known = error.downcast_ref::<Error>();
            let hint = known.map_or("see `vlmq help`", |e| e.hint());
            tell(&format!("hint: {hint}"));
            ExitCode::from(2)
        }
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

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    cli.log.start()?;
    progress::be_quiet(cli.quiet);
    if let Some(n) = cli.threads {
        if !(1..=MAX_THREADS).contains(&n) {
            return Err(Error::Invalid {
                what: format!("--threads {n}"),
                why: format!("1 to {MAX_THREADS} expected"),
            }
            .into());
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build_global()
            .context("--threads")?;
    }
    match cli.command {
        Command::Inspect(args) => inspect::run(&args, cli.json),
        Command::Quantize(args) => quantize::run(&args, cli.json),
        Command::Export(args) => export::run(&args, cli.json),
        Command::Verify(args) => verify::run(&args, cli.json),
        Command::Rotate(args) => rotate::run(&args, cli.json),
        Command::Eval(args) => eval::run(&args, cli.json),
        Command::Score(args) => score::run(&args, cli.json),
        Command::Report(args) => report::run(&args, cli.json),
        Command::Compare(args) => compare::run(&args, cli.json),
        Command::Generate(args) => generate::run(&args, cli.json),
        Command::Trace(args) => trace::run(&args, cli.json),
        Command::Completions(args) => pages::completions(&args),
        Command::Man(args) => pages::man(&args),
    }
}

fn open_model(dir: &Path) -> anyhow::Result<ModelSource> {
    let checkpoint = Checkpoint::open(dir)?;
    Ok(families::open_model(checkpoint, candle_core::Device::Cpu)?)
}

fn print_json(value: serde_json::Value) -> anyhow::Result<()> {
    say(&(serde_json::to_string(&value)? + "\n"))
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
