//! `vlmq eval`

use super::progress::Progress;
use super::{ModelArg, SCHEMA, open_model, print_json, say};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use vlmq::Error;
use vlmq::eval::{
    Accuracy, Divergence, EvalItem, Prediction, Task, TaskItems, TaskRows, TextItem, TextReference,
    TextScore, answer_all, open_tasks, perplexity, score_texts,
};
use vlmq::families::open_processor;
use vlmq::model::LoadedModel;
use vlmq::processor::{MAX_TEXT_TOKENS, Processor};
use vlmq::sweep::compare_with_reference;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// File of questions or of raw texts, or a folder of such files
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    task: PathBuf,
    /// Questions or texts of each task left out before the first
    #[arg(long, default_value_t = 0, value_name = "N")]
    skip: usize,
    /// Questions or texts of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Raw texts are read in pieces of at most so many tokens
    #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS)]
    max_tokens: usize,
    /// The original model, to measure the divergence from it
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// Folder to make, with all answers, and with what each text adds to the sums
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub fn run(args: &Args, as_json: bool) -> anyhow::Result<ExitCode> {
    if let Some(output) = args.output.as_deref().filter(|o| o.exists()) {
        return Err(Error::Exists {
            path: output.to_path_buf(),
        }
        .into());
    }
    let processor = open_processor(&args.model.model)?;
    let rows = TaskRows {
        skip: args.skip,
        limit: args.limit,
    };
    let tasks = open_tasks(&args.task, &processor, rows, args.max_tokens)?;
    let model = LoadedModel::load(open_model(&args.model.model)?)?;
    let reference = args.reference.as_deref().map(open_model).transpose()?;
    let evaluation = Evaluation {
        processor,
        model,
        reference: reference.map(LoadedModel::load).transpose()?,
        progress: Progress::silent_about_signals(),
        n: tasks.iter().map(|t| t.items.len()).sum(),
    };
    let mut results = BTreeMap::new();
    let mut all = BTreeMap::new();
    for task in &tasks {
        let (result, rows) = match &task.items {
            TaskItems::Questions(items) => evaluation.questions(&task.name, items)?,
            TaskItems::Texts(items) => evaluation.texts(&task.name, items)?,
        };
        results.insert(task.name.clone(), result);
        all.insert(task.name.clone(), rows);
    }
    evaluation.progress.finish();
    if let Some(output) = &args.output {
        let io = |e| Error::io(output, "write the answers", e);
        std::fs::create_dir_all(output).map_err(io)?;
        let text = serde_json::to_vec_pretty(&all).context("answers")?;
        std::fs::write(output.join("predictions.json"), text).map_err(io)?;
    }
    if as_json {
        let head = json!({"schema": SCHEMA, "command": "eval", "tasks": results});
        print_json(head)?;
    } else {
        say(&table(&tasks, &results))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What all tasks need. Each gives its summary, and its rows one by one.
struct Evaluation {
    processor: Processor,
    model: LoadedModel,
    reference: Option<LoadedModel>,
    progress: Progress,
    /// Rows of all tasks.
    n: usize,
}

impl Evaluation {
    fn questions(&self, name: &str, items: &[EvalItem]) -> anyhow::Result<(Value, Value)> {
        let step = || self.progress.step(name, self.n);
        let predictions = answer_all(&self.model, &self.processor, items, &step)?;
        let reference = self.reference.as_ref();
        let divergence = reference.map(|r| compare_with_reference(r, &self.model, items));
        let summary = summary(&predictions, divergence.transpose()?);
        Ok((summary, serde_json::to_value(predictions)?))
    }

    fn texts(&self, name: &str, items: &[TextItem]) -> anyhow::Result<(Value, Value)> {
        let step = || self.progress.step(name, self.n);
        let reference = self.reference.as_ref();
        let reference = reference
            .map(|r| TextReference::read(r, items))
            .transpose()?;
        let scores = score_texts(&self.model, items, reference.as_ref(), &step)?;
        let original = reference.map(|r| r.scores(items)).transpose()?;
        let summary = text_summary(&scores, original.as_deref());
        Ok((summary, serde_json::to_value(scores)?))
    }
}

fn summary(predictions: &[Prediction], divergence: Option<Divergence>) -> Value {
    let mut row = json!({
        "accuracy": Accuracy::of(predictions.iter().map(|p| p.correct)),
        "by_category": Accuracy::by_category(predictions),
    });
    if let Some(d) = divergence {
        row["kl_per_answer_token"] = json!(d.kl_per_token());
        row["same_top_percent"] = json!(d.same_top_percent());
    }
    row
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
fn table(tasks: &[Task], results: &BTreeMap<String, Value>) -> String {
    let (questions, texts): (Vec<&Task>, Vec<&Task>) = tasks
        .iter()
        .partition(|task| matches!(task.items, TaskItems::Questions(_)));
    let rows = |tasks: &[&Task], head: String, row: fn(&str, &Value) -> String| {
        let rows = tasks
            .iter()
            .map(|task| row(&task.name, &results[&task.name]));
        match tasks.is_empty() {
            true => String::new(),
            false => head + &rows.collect::<String>(),
        }
    };
    let question_head = format!(
        "{:<14} {:>6} {:>9} {:>15} {:>10}\n",
        "task", "n", "exact %", "95 %", "KL"
    );
    let text_head = format!(
        "{:<14} {:>6} {:>9} {:>11} {:>11} {:>10} {:>11}\n",
        "task", "texts", "tokens", "perplexity", "original's", "KL", "same top %"
    );
    rows(&questions, question_head, question_row) + &rows(&texts, text_head, text_row)
}

/// A number, or nothing where there is none.
fn shown(value: &Value, digits: usize) -> String {
    let number = value.as_f64();
    number.map_or(String::new(), |v| format!("{v:.digits$}"))
}

fn question_row(name: &str, row: &Value) -> String {
    let accuracy = &row["accuracy"];
    let bound = |i: usize| accuracy["interval"][i].as_f64().unwrap_or_default();
    format!(
        "{name:<14} {:>6} {:>9} {:>7.1}-{:<7.1} {:>10}\n",
        accuracy["n"],
        shown(&accuracy["percent"], 1),
        bound(0),
        bound(1),
        shown(&row["kl_per_answer_token"], 4),
    )
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
