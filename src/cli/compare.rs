//! `vlmq compare`

use super::progress::Progress;
use super::quantize::scale_dtype;
use super::{SCHEMA, open_model, print_json, say};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use vlmq::Error;
use vlmq::dataset::open_samples;
use vlmq::eval::open_tasks;
use vlmq::families::open_processor;
use vlmq::model::LoadedModel;
use vlmq::pipeline::Observer;
use vlmq::run::SampleChoice;
use vlmq::sweep::{Sweep, SweepRow, TaskScore, quantize_in_memory, score_original, score_tasks};

#[derive(clap::Args)]
pub struct Args {
    /// What to run: model, calibration, tasks, seeds, methods, bits, group_sizes
    #[arg(value_name = "SWEEP.toml")]
    sweep: PathBuf,
    /// File to which each line is added as soon as it is measured; lines that it has are kept
    #[arg(long, value_name = "FILE.jsonl")]
    output: PathBuf,
}

pub fn run(args: &Args, json: bool) -> anyhow::Result<ExitCode> {
    let sweep = Sweep::read(&args.sweep)?;
    let rows = measure(&sweep, &args.output)?;
    match json {
        true => {
            print_json(serde_json::json!({"schema": SCHEMA, "command": "compare", "rows": rows}))?
        }
        false => say(&table(&rows))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// All lines of the sweep, those that `output` has and those that it lacked.
fn measure(sweep: &Sweep, output: &PathBuf) -> anyhow::Result<Vec<SweepRow>> {
    let model = open_model(&sweep.model)?;
    let runs = sweep.runs(scale_dtype(&model))?;
    let mut rows = read_rows(output)?;
    let processor = open_processor(&sweep.model)?;
    let tasks = open_tasks(&sweep.tasks, &processor, sweep.limit, sweep.max_tokens)?;
    let samples = open_samples(&sweep.calibration)?;
    let mut loaded = LoadedModel::load(open_model(&sweep.model)?)?;
    let (original, references) = score_original(&loaded, &tasks)?;
    if !rows.iter().any(|r| r.method == original.method) {
        add_row(output, &mut rows, original)?;
    }
    let progress = Progress::start()?;
    let n_runs = runs.len();
    for (recipe, seed) in runs {
        progress.step("runs", n_runs);
        if progress.is_cancelled() {
            return Err(Error::Interrupted.into());
        }
        if rows.iter().any(|row| row.is_of(&recipe, seed)) {
            continue;
        }
        let choice = seed.map(|seed| SampleChoice {
            set: samples.clone(),
            n_samples: sweep.samples,
            seed,
            max_tokens: sweep.max_tokens,
        });
        let began = Instant::now();
        let within = WithinRun(&progress);
        let quantized = quantize_in_memory(&model, &recipe, choice.as_ref(), &within)?;
        let seconds = began.elapsed().as_secs_f64();
        loaded.set_layers(quantized.layers)?;
        let scores = score_tasks(&loaded, &tasks, &references)?;
        let mut row = SweepRow::new(&recipe, seed, scores, seconds);
        row.tuning = quantized.tuning;
        add_row(output, &mut rows, row)?;
    }
    progress.finish();
    Ok(rows)
}

/// One run of many: its layers are not shown, but Ctrl-C ends it.
struct WithinRun<'a>(&'a Progress);

impl Observer for WithinRun<'_> {
    fn on_layer(&self, _: usize, _: usize) {}

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

fn read_rows(path: &PathBuf) -> anyhow::Result<Vec<SweepRow>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    let rows = text.lines().enumerate().map(|(i, line)| {
        serde_json::from_str(line)
            .map_err(|e| Error::format(path, format!("line {}", i + 1), e.to_string()))
    });
    Ok(rows.collect::<vlmq::Result<_>>()?)
}

fn add_row(path: &PathBuf, rows: &mut Vec<SweepRow>, row: SweepRow) -> anyhow::Result<()> {
    use std::io::Write;
    let io = |e| Error::io(path, "add a line", e);
    let mut file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(io)?;
    writeln!(file, "{}", serde_json::to_string(&row)?).map_err(io)?;
    rows.push(row);
    Ok(())
}

/// Mean and, over seeds, lowest to highest of each task, as Markdown: accuracy of questions,
/// perplexity of texts.
fn table(rows: &[SweepRow]) -> String {
    let mut groups: BTreeMap<(u8, usize, usize), Vec<&SweepRow>> = BTreeMap::new();
    let mut methods: Vec<&str> = Vec::new();
    for row in rows {
        let place = methods
            .iter()
            .position(|m| *m == row.method)
            .unwrap_or_else(|| {
                methods.push(&row.method);
                methods.len() - 1
            });
        // Falling bits: the original, which has none, comes first.
        let key = (
            u8::MAX - row.bits.unwrap_or(u8::MAX),
            row.group_size.unwrap_or(0),
            place,
        );
        groups.entry(key).or_default().push(row);
    }
    let tasks: Vec<&String> = rows
        .first()
        .map(|r| r.tasks.keys().collect())
        .unwrap_or_default();
    let is_text = |task: &String| {
        rows.iter()
            .any(|r| r.tasks.get(task).is_some_and(|s| s.perplexity.is_some()))
    };
    let with_questions = !tasks.iter().all(|task| is_text(task));
    let mut text = table_head(&tasks, is_text, with_questions);
    for rows in groups.values() {
        let first = rows[0];
        let show = |n: Option<usize>| n.map_or(String::new(), |n| n.to_string());
        text += &format!(
            "| {} | {} | {} | {} |",
            first.method,
            show(first.bits.map(usize::from)),
            show(first.group_size),
            rows.len()
        );
        for task in &tasks {
            let digits = if is_text(task) { 3 } else { 1 };
            text += &format!(" {} |", spread(rows, digits, |r| main_score(r, task)));
        }
        let over = |r: &SweepRow, f: fn(&TaskScore) -> Option<f64>| {
            let values: Vec<f64> = r.tasks.values().filter_map(f).collect();
            values.iter().sum::<f64>() / values.len().max(1) as f64
        };
        if with_questions {
            text += &format!(" {} |", spread(rows, 1, |r| over(r, |t| t.accuracy)));
        }
        text += &format!(" {} |\n", spread(rows, 4, |r| over(r, |t| Some(t.kl))));
    }
    text
}

/// The line of names and the one below it.
fn table_head(
    tasks: &[&String],
    is_text: impl Fn(&String) -> bool,
    with_questions: bool,
) -> String {
    let mut text = String::from("| method | bits | group | seeds |");
    for task in tasks {
        let unit = if is_text(task) { " (perplexity)" } else { "" };
        text += &format!(" {task}{unit} |");
    }
    text += if with_questions {
        " mean accuracy |"
    } else {
        ""
    };
    text += " mean KL |\n|---|---|---|---|";
    text += &"---|".repeat(tasks.len() + 1 + usize::from(with_questions));
    text.push('\n');
    text
}

/// Not a number where the line is of other tasks.
fn main_score(row: &SweepRow, task: &str) -> f64 {
    let main = |score: &TaskScore| score.accuracy.or(score.perplexity);
    row.tasks.get(task).and_then(main).unwrap_or(f64::NAN)
}

fn spread(rows: &[&SweepRow], digits: usize, value: impl Fn(&SweepRow) -> f64) -> String {
    let values: Vec<f64> = rows.iter().map(|r| value(r)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match values.len() {
        1 => format!("{mean:.digits$}"),
        _ => format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})"),
    }
}
