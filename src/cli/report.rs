//! `vlmq report`

use super::eval::split;
use super::{Done, SCHEMA};
use crate::Error;
use crate::eval::benchmark::Benchmark;
use crate::report::importance::ImportanceFile;
use crate::report::page::{Answers, PAGE_FILE, Page, Predictions};
use crate::report::{REPORT_FILE, RunReport};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    /// Folder that `vlmq quantize` made
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// File to write, in place of any that is there: report.html in DIR if absent
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write Markdown, to stdout without --output
    #[arg(long)]
    markdown: bool,
    /// What `vlmq eval --output` wrote of this model, for scores and answers
    #[arg(long, value_name = "FILE_OR_DIR")]
    evaluation: Option<PathBuf>,
    /// The same of the original model, for answers side by side
    #[arg(long, value_name = "FILE_OR_DIR", requires = "evaluation")]
    original: Option<PathBuf>,
    /// A task that was evaluated, as `vlmq eval --task` had it, for the questions and their pictures
    #[arg(
        long = "task",
        value_name = "[BENCHMARK=]FILE_OR_FOLDER",
        requires = "evaluation"
    )]
    tasks: Vec<PathBuf>,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let report = RunReport::read(&args.folder)?.ok_or_else(|| Error::Missing {
        what: REPORT_FILE.into(),
        place: args.folder.display().to_string(),
    })?;
    let importance = ImportanceFile::read(&args.folder)?;
    let answers = answers(args)?;
    let whole = args.folder.canonicalize();
    let folder = whole.as_deref().unwrap_or(&args.folder);
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let mut page = Page::new(&name, &report, importance.as_ref());
    if let Some(answers) = &answers {
        page = page.with_answers(answers);
    }
    let (text, output) = match (args.markdown, &args.output) {
        (false, output) => {
            let output = output.clone();
            (page.html(), output.or(Some(args.folder.join(PAGE_FILE))))
        }
        (true, output) => (page.markdown(), output.clone()),
    };
    if let Some(output) = &output {
        replace(output, text.as_bytes())?;
    }
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "report",
        "output": output,
        "markdown": (args.markdown && output.is_none()).then_some(&text),
    });
    let text = output.map_or(text, |output| format!("wrote {}\n", output.display()));
    Ok(Done::new(json, text))
}

fn answers(args: &Args) -> crate::Result<Option<Answers>> {
    let Some(evaluation) = &args.evaluation else {
        return Ok(None);
    };
    let quantized = Predictions::read(evaluation)?;
    let original = args
        .original
        .as_deref()
        .map(Predictions::read)
        .transpose()?;
    let mut answers = Answers::new(quantized, original);
    for task in &args.tasks {
        let (benchmark, path) = split(task);
        answers = answers.with_questions(benchmark.map(Benchmark::name), &path)?;
    }
    Ok(Some(answers))
}

/// Writes a whole file, or leaves what was there.
fn replace(path: &Path, bytes: &[u8]) -> crate::Result<()> {
    let io = |e| Error::io(path, "write", e);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".{name}.unfinished"));
    let mut file = File::create(&unfinished).map_err(io)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let placed = written.and_then(|()| std::fs::rename(&unfinished, path));
    placed.map_err(|e| {
        // What is left is of no use, and the first error is the one to tell.
        let _ = std::fs::remove_file(&unfinished);
        io(e)
    })
}
