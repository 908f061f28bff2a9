//! `vlmq compare`

mod table;

use super::progress::Progress;
use super::quantize::scale_dtype;
use super::{Caller, Done, SCHEMA, open_model};
use crate::Error;
use crate::dataset::open_samples;
use crate::eval::{TaskRows, open_tasks};
use crate::families::open_processor;
use crate::model::LoadedModel;
use crate::pipeline::Observer;
use crate::run::SampleChoice;
use crate::sweep::{
    PreparedSamples, Sweep, SweepRow, quantize_in_memory, score_original, score_tasks,
};
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
pub struct Args {
    /// What to run: model, calibration, tasks, seeds, methods, bits, group_sizes
    #[arg(value_name = "SWEEP.toml")]
    sweep: PathBuf,
    /// File to which each line is added as soon as it is measured; lines that it has are kept
    #[arg(long, value_name = "FILE.jsonl")]
    output: PathBuf,
}

pub fn run(args: &Args, caller: &Caller) -> anyhow::Result<Done> {
    let sweep = Sweep::read(&args.sweep)?;
    let rows = measure(&sweep, &args.output, caller)?;
    let baseline = sweep.baseline.as_deref();
    let json = serde_json::json!({
        "schema": SCHEMA,
        "command": "compare",
        "rows": rows,
        "paired": crate::sweep::paired::paired(&rows, baseline),
    });
    Ok(Done::new(json, table::tables(&rows, baseline)))
}

/// All lines of the sweep, those that `output` has and those that it lacked.
fn measure(sweep: &Sweep, output: &PathBuf, caller: &Caller) -> anyhow::Result<Vec<SweepRow>> {
    let model = open_model(&sweep.model)?;
    let runs = sweep.runs(scale_dtype(&model))?;
    let mut rows = read_rows(output)?;
    let processor = open_processor(&sweep.model)?;
    let task_rows = TaskRows {
        skip: sweep.skip,
        limit: sweep.limit,
    };
    let tasks = open_tasks(&sweep.tasks, &processor, task_rows, sweep.max_tokens)?;
    let set = open_samples(&sweep.calibration)?;
    let mut loaded = LoadedModel::load(open_model(&sweep.model)?)?;
    let (original, references) = score_original(&loaded, &tasks)?;
    if !rows.iter().any(|r| r.method == original.method) {
        add_row(output, &mut rows, original)?;
    }
    let choice = |seed| SampleChoice {
        set: set.clone(),
        n_samples: sweep.samples,
        seed,
        max_tokens: sweep.max_tokens,
    };
    let mut prepared = PreparedSamples::default();
    let progress = Progress::start(caller)?;
    for run in &runs {
        progress.step("runs", 1, runs.len());
        if progress.is_cancelled() {
            return Err(Error::Interrupted.into());
        }
        if rows.iter().any(|row| row.is_of(run)) {
            continue;
        }
        let within = WithinRun(&progress);
        let samples = prepared.of(&model, run, choice, &within)?;
        let began = Instant::now();
        let quantized = quantize_in_memory(&model, &run.recipe, samples, &within)?;
        let seconds = began.elapsed().as_secs_f64();
        loaded.set_layers(quantized.layers)?;
        let scores = score_tasks(&loaded, &tasks, &references)?;
        let mut row = SweepRow::new(run, scores, seconds);
        row.tuning = quantized.tuning;
        row.allocated = quantized.allocation.map(Into::into);
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
    Ok(rows.collect::<crate::Result<_>>()?)
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
