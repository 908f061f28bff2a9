//! `vlmq eval`

use super::progress::Progress;
use super::{ModelArg, SCHEMA, open_model, print_json, say};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use vlmq::Error;
use vlmq::eval::{Accuracy, Divergence, Task, answer_all, open_tasks};
use vlmq::families::open_processor;
use vlmq::model::LoadedModel;
use vlmq::sweep::compare_with_reference;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
    /// File of questions, or a folder of such files
    #[arg(long, value_name = "FILE_OR_FOLDER")]
    task: PathBuf,
    /// Questions of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// The original model, to measure the divergence from it
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// Folder to make, with all answers
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
    let tasks = open_tasks(&args.task, &processor, args.limit)?;
    let model = LoadedModel::load(open_model(&args.model.model)?)?;
    let reference = args.reference.as_deref().map(open_model).transpose()?;
    let reference = reference.map(LoadedModel::load).transpose()?;
    let progress = Progress::silent_about_signals();
    let n: usize = tasks.iter().map(|t| t.items.len()).sum();
    let mut results = BTreeMap::new();
    let mut all = BTreeMap::new();
    for task in &tasks {
        let step = || progress.step(&task.name, n);
        let predictions = answer_all(&model, &processor, task, &step)?;
        let divergence = reference
            .as_ref()
            .map(|r| compare_with_reference(r, &model, task));
        let divergence = divergence.transpose()?;
        results.insert(task.name.clone(), summary(&predictions, divergence));
        all.insert(task.name.clone(), predictions);
    }
    progress.finish();
    if let Some(output) = &args.output {
        let io = |e| Error::io(output, "write the answers", e);
        std::fs::create_dir(output).map_err(io)?;
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

fn summary(predictions: &[vlmq::eval::Prediction], divergence: Option<Divergence>) -> Value {
    let mut row = json!({
        "accuracy": Accuracy::of(predictions.iter().map(|p| p.correct)),
        "by_category": Accuracy::by_category(predictions),
    });
    if let Some(d) = divergence {
        let n = d.n_tokens.max(1) as f64;
        row["kl_per_answer_token"] = json!(d.kl_sum / n);
        row["same_top_percent"] = json!(100.0 * d.n_same_top as f64 / n);
    }
    row
}

fn table(tasks: &[Task], results: &BTreeMap<String, Value>) -> String {
    let mut text = format!(
        "{:<14} {:>6} {:>9} {:>15} {:>10}\n",
        "task", "n", "exact %", "95 %", "KL"
    );
    for task in tasks {
        let row = &results[&task.name];
        let accuracy = &row["accuracy"];
        let bound = |i: usize| accuracy["interval"][i].as_f64().unwrap_or_default();
        let kl = row["kl_per_answer_token"].as_f64();
        text += &format!(
            "{:<14} {:>6} {:>9.1} {:>7.1}-{:<7.1} {:>10}\n",
            task.name,
            accuracy["n"],
            accuracy["percent"].as_f64().unwrap_or_default(),
            bound(0),
            bound(1),
            kl.map_or(String::new(), |kl| format!("{kl:.4}")),
        );
    }
    text
}
