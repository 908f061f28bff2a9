//! `vlmq eval`

mod answers;
mod output;

use self::answers::Models;
use self::output::{Output, fingerprint};
use super::progress::Progress;
use super::{Caller, Done, ModelArg, SCHEMA, open_model};
use crate::Error;
use crate::eval::benchmark::Benchmark;
use crate::eval::metric::Protocol;
use crate::eval::{
    Divergence, QuestionSource, Task, TaskItems, TaskRows, TextItem, TextReference, TextScore,
    open_tasks, perplexity, score_texts, task_files,
};
use crate::families::open_processor;
use crate::model::LoadedModel;
use crate::processor::{MAX_TEXT_TOKENS, Processor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// File of questions or of raw texts, or a folder of such files. With a benchmark before it, as
    /// in docvqa=FOLDER, one set by that benchmark's prompts and metric: chartqa, docvqa, textvqa,
    /// vizwiz, mme-realworld, mme-realworld-cn, scienceqa, seedbench-2-plus, ocrbench
    #[arg(
        long = "task",
        required = true,
        value_name = "[BENCHMARK=]FILE_OR_FOLDER"
    )]
    tasks: Vec<PathBuf>,
    /// Whose prompts and metrics benchmarks follow
    #[arg(long, value_enum, default_value = "lmms-eval")]
    protocol: ProtocolArg,
    /// Questions or texts of each task left out before the first
    #[arg(long, default_value_t = 0, value_name = "N")]
    skip: usize,
    /// Questions or texts of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Longest answer in tokens, in place of each benchmark's own limit
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Raw texts are read in pieces of at most so many tokens
    #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS)]
    max_tokens: usize,
    /// The original model, or another: its answers, who answers better, the questions that flipped,
    /// and the divergence from it
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// Seed of the resampling that intervals come from
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Folder to make, with every answer and its score; a run that was stopped goes on in it
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// Spellings on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProtocolArg {
    /// Prompts, limits and metrics of lmms-eval
    LmmsEval,
    /// Those of VLMEvalKit
    #[value(name = "vlmevalkit")]
    VlmEvalKit,
}

impl From<ProtocolArg> for Protocol {
    fn from(arg: ProtocolArg) -> Self {
        match arg {
            ProtocolArg::LmmsEval => Self::LmmsEval,
            ProtocolArg::VlmEvalKit => Self::VlmEvalKit,
        }
    }
}

/// A task whose rows have all been looked at.
enum Planned {
    Questions {
        name: String,
        source: QuestionSource,
        n: usize,
    },
    Texts(Task),
}

impl Planned {
    fn name(&self) -> &str {
        match self {
            Self::Questions { name, .. } | Self::Texts(Task { name, .. }) => name,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Questions { n, .. } => *n,
            Self::Texts(task) => task.items.len(),
        }
    }
}

pub fn run(args: &Args, caller: &Caller) -> anyhow::Result<Done> {
    let about = match &args.output {
        Some(folder) => Some((folder.as_path(), describe(args)?)),
        None => None,
    };
    if let Some((folder, about)) = &about {
        Output::is_begun(folder, about)?;
    }
    let processor = open_processor(&args.model.model)?;
    let tasks = plan(args, &processor)?;
    let model = LoadedModel::load(open_model(&args.model.model)?)?;
    let reference = args.reference.as_deref().map(open_model).transpose()?;
    let models = Models {
        processor,
        model,
        reference: reference.map(LoadedModel::load).transpose()?,
        progress: Progress::silent_about_signals(caller),
        n: tasks.iter().map(Planned::len).sum(),
    };
    // Only now, so that a run that cannot begin leaves no folder.
    let output = about.map(|(folder, about)| Output::open(folder, &about));
    let output = output.transpose()?;
    let (mut results, mut all) = (BTreeMap::new(), BTreeMap::new());
    for task in &tasks {
        let (result, rows) = match task {
            Planned::Questions { name, source, n } => {
                let answers = models.answers(name, source, *n, output.as_ref())?;
                if let (Some(output), Protocol::VlmEvalKit, Some(_)) =
                    (&output, source.protocol, source.benchmark)
                {
                    output.write_table(name, &answers)?;
                }
                let summary = answers::summary(source, &answers, args.seed);
                (summary, answers::predictions(&answers))
            }
            Planned::Texts(task) => texts(&models, task)?,
        };
        results.insert(task.name().to_owned(), result);
        all.insert(task.name().to_owned(), rows);
    }
    models.progress.finish();
    let report = json!({"schema": SCHEMA, "command": "eval", "tasks": results});
    if let Some(output) = &output {
        output.finish(&json!(all), &report)?;
    }
    Ok(Done::new(report, table(&tasks, &results)))
}

/// All that the answers depend on.
fn describe(args: &Args) -> crate::Result<Value> {
    let reference = args.reference.as_deref().map(fingerprint).transpose()?;
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": fingerprint(&args.model.model)?,
        "reference": reference,
        "tasks": args.tasks.iter().map(|t| t.to_string_lossy()).collect::<Vec<_>>(),
        "protocol": Protocol::from(args.protocol),
        "skip": args.skip,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "max_tokens": args.max_tokens,
    }))
}

/// A benchmark before an equals sign, and the rest. A name that is none is part of the path.
pub(super) fn split(task: &Path) -> (Option<Benchmark>, PathBuf) {
    let text = task.to_string_lossy();
    let parts = text.split_once('=');
    let named = parts.and_then(|(name, rest)| Some((Benchmark::from_name(name).ok()?, rest)));
    match named {
        Some((benchmark, rest)) => (Some(benchmark), rest.into()),
        None => (None, task.to_path_buf()),
    }
}

fn plan(args: &Args, processor: &Processor) -> anyhow::Result<Vec<Planned>> {
    let rows = TaskRows {
        skip: args.skip,
        limit: args.limit,
    };
    let mut tasks: Vec<Planned> = Vec::new();
    for task in &args.tasks {
        let (benchmark, path) = split(task);
        // A benchmark may come in many files; without one, each file is a task.
        let files = match benchmark {
            Some(_) => vec![path],
            None => unsplit(task_files(&path), task)?,
        };
        for path in files {
            let source = QuestionSource {
                path,
                benchmark,
                protocol: args.protocol.into(),
                rows,
                max_new_tokens: args.max_new_tokens,
            };
            tasks.extend(planned(source, processor, args.max_tokens)?);
        }
    }
    let mut names: Vec<&str> = tasks.iter().map(Planned::name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::Invalid {
            what: format!("--task: two tasks called {}", pair[0]),
            why: "files of different names, and each benchmark once, expected".into(),
        }
        .into()),
        None => Ok(tasks),
    }
}

/// A file that is not there and whose name begins as a benchmark might: the name is the mistake.
fn unsplit(files: crate::Result<Vec<PathBuf>>, task: &Path) -> crate::Result<Vec<PathBuf>> {
    let text = task.to_string_lossy();
    match text.split_once('=') {
        Some((name, _)) if !task.exists() => Benchmark::from_name(name).and(files),
        _ => files,
    }
}

fn planned(
    source: QuestionSource,
    processor: &Processor,
    max_tokens: usize,
) -> crate::Result<Vec<Planned>> {
    if source.is_text()? {
        let tasks = open_tasks(&source.path, processor, source.rows, max_tokens)?;
        return Ok(tasks.into_iter().map(Planned::Texts).collect());
    }
    let stem = source.path.file_stem().unwrap_or_default();
    let name = source.benchmark.map_or_else(
        || stem.to_string_lossy().into_owned(),
        |benchmark| benchmark.name().to_owned(),
    );
    let n = source.count()?;
    Ok(vec![Planned::Questions { name, source, n }])
}

fn texts(models: &Models, task: &Task) -> anyhow::Result<(Value, Value)> {
    let TaskItems::Texts(items) = &task.items else {
        return Ok((Value::Null, Value::Null));
    };
    let items: &[TextItem] = items;
    let step = || {
        models.progress.step(&task.name, 1, models.n);
        models.progress.go_on()
    };
    let reference = models.reference.as_ref();
    let reference = reference
        .map(|r| TextReference::read(r, items))
        .transpose()?;
    let scores = score_texts(&models.model, items, reference.as_ref(), &step)?;
    let original = reference.map(|r| r.scores(items)).transpose()?;
    let summary = text_summary(&scores, original.as_deref());
    Ok((summary, serde_json::to_value(scores)?))
}

fn text_summary(scores: &[TextScore], original: Option<&[TextScore]>) -> Value {
    let mut row = json!({
        "n_texts": scores.len(),
        "n_tokens": scores.iter().map(|s| s.n_tokens).sum::<usize>(),
        "perplexity": perplexity(scores),
    });
    if let Some(original) = original {
        let divergence = Divergence::total(scores.iter().filter_map(|s| s.divergence));
        row["reference_perplexity"] = json!(perplexity(original));
        row["kl_per_token"] = json!(divergence.kl_per_token());
        row["same_top_percent"] = json!(divergence.same_top_percent());
    }
    row
}

/// Questions and texts in a table each, those that there are.
fn table(tasks: &[Planned], results: &BTreeMap<String, Value>) -> String {
    let (questions, texts): (Vec<&Planned>, Vec<&Planned>) = tasks
        .iter()
        .partition(|task| matches!(task, Planned::Questions { .. }));
    let names = questions.iter().map(|task| task.name());
    let width = name_width(names.map(|name| (name, &results[name])));
    let rows = |tasks: &[&Planned], head: String, row: &dyn Fn(&str, &Value) -> String| {
        let rows = tasks
            .iter()
            .map(|task| row(task.name(), &results[task.name()]));
        match tasks.is_empty() {
            true => String::new(),
            false => head + &rows.collect::<String>(),
        }
    };
    let question_head = score_head("task", width);
    let question_rows = |name: &str, row: &Value| question_rows(name, row, width);
    let text_head = format!(
        "{:<14} {:>6} {:>9} {:>11} {:>11} {:>10} {:>11}\n",
        "task", "texts", "tokens", "perplexity", "original's", "KL", "same top %"
    );
    rows(&questions, question_head, &question_rows) + &rows(&texts, text_head, &text_row)
}

/// A number, or nothing where there is none.
fn shown(value: &Value, digits: usize) -> String {
    let number = value.as_f64();
    number.map_or(String::new(), |v| format!("{v:.digits$}"))
}

/// Characters that the longest name needs, sub-scores indented.
pub(super) fn name_width<'a>(rows: impl Iterator<Item = (&'a str, &'a Value)>) -> usize {
    let groups = |row: &Value| {
        let names = row["groups"].as_object().into_iter().flatten();
        names.map(|(name, _)| name.chars().count() + 2).max()
    };
    let widths = rows.map(|(name, row)| name.chars().count().max(groups(row).unwrap_or(0)));
    widths.max().unwrap_or(0).max(16)
}

pub(super) fn score_head(name: &str, width: usize) -> String {
    let [n, score, interval, kl] = ["n", "score %", "95 %", "KL"];
    format!("{name:<width$} {n:>6} {score:>9} {interval:>15} {kl:>10}\n")
}

/// A task, its sub-scores, and who answers better.
pub(super) fn question_rows(name: &str, row: &Value, width: usize) -> String {
    let mut text = score_row(name, &row["score"], &row["kl_per_answer_token"], width);
    for (group, score) in row["groups"].as_object().into_iter().flatten() {
        if !group.is_empty() {
            text += &score_row(&format!("  {group}"), score, &Value::Null, width);
        }
    }
    if !row["first_token"].is_null() {
        text += &score_row("  by first token", &row["first_token"], &Value::Null, width);
    }
    text + &pairs_rows(row)
}

fn score_row(name: &str, score: &Value, kl: &Value, width: usize) -> String {
    let bound = |i: usize| score["interval"][i].as_f64().unwrap_or_default();
    format!(
        "{name:<width$} {:>6} {:>9} {:>7.1}-{:<7.1} {:>10}\n",
        score["n"],
        shown(&score["percent"], 1),
        bound(0),
        bound(1),
        shown(kl, 4),
    )
}

/// McNemar's test in words, and the questions that flipped.
fn pairs_rows(row: &Value) -> String {
    let pairs = &row["pairs"];
    if pairs.is_null() {
        return String::new();
    }
    let bound = |i: usize| shown(&pairs["difference_interval"][i], 1);
    let mut text = format!(
        "  against the reference: {} points ({} to {}); only this one right {}, only the other {}; \
         McNemar p = {}\n",
        shown(&pairs["difference"], 1),
        bound(0),
        bound(1),
        pairs["n_only_first"],
        pairs["n_only_second"],
        shown(&pairs["p_value"], 4),
    );
    for flip in row["flipped"].as_array().into_iter().flatten() {
        text += &format!(
            "  flipped {}: {} instead of {}; right: {}\n",
            flip["id"], flip["answer"], flip["reference_answer"], flip["expected"]
        );
    }
    text
}

fn text_row(name: &str, row: &Value) -> String {
    format!(
        "{name:<14} {:>6} {:>9} {:>11} {:>11} {:>10} {:>11}\n",
        row["n_texts"],
        row["n_tokens"],
        shown(&row["perplexity"], 3),
        shown(&row["reference_perplexity"], 3),
        shown(&row["kl_per_token"], 4),
        shown(&row["same_top_percent"], 1),
    )
}
