//! The folder of a run's answers, which a later run of the same command goes on with.

use crate::eval::metric::Protocol;
use crate::eval::{AnsweredQuestion, QUESTIONS_AT_ONCE};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// What the answers were made of.
const RUN: &str = "run.json";
/// All answers in one, written last.
const PREDICTIONS: &str = "predictions.json";
/// What is printed with `--json`.
const RESULTS: &str = "results.json";

pub struct Output {
    folder: PathBuf,
}

impl Output {
    /// Whether `folder` holds what a run of `run` began and did not finish.
    ///
    /// # Errors
    /// [`Error::Exists`] for a finished run or another folder; [`Error::OtherAnswers`] if it was
    /// begun with something else; [`Error::Io`].
    pub fn is_begun(folder: &Path, run: &Value) -> Result<bool> {
        let written = folder.join(RUN);
        if !folder.exists() {
            return Ok(false);
        }
        if !written.is_file() || folder.join(PREDICTIONS).exists() {
            return Err(Error::Exists {
                path: folder.to_path_buf(),
            });
        }
        let text = std::fs::read_to_string(&written);
        let text = text.map_err(|e| Error::io(&written, "read", e))?;
        let found: Value = serde_json::from_str(&text)
            .map_err(|e| Error::format(&written, "JSON", e.to_string()))?;
        let keys = run.as_object().into_iter().flat_map(|run| run.keys());
        match keys.into_iter().find(|key| found[*key] != run[*key]) {
            Some(key) => Err(Error::OtherAnswers {
                path: folder.to_path_buf(),
                what: key.clone(),
            }),
            None => Ok(true),
        }
    }

    /// Makes the folder, or takes one that a run of `run` began and did not finish.
    ///
    /// # Errors
    /// As [`Output::is_begun`].
    pub fn open(folder: &Path, run: &Value) -> Result<Self> {
        if !Self::is_begun(folder, run)? {
            let written = folder.join(RUN);
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create", e))?;
            std::fs::write(&written, format!("{run:#}\n"))
                .map_err(|e| Error::io(&written, "write", e))?;
        }
        Ok(Self {
            folder: folder.to_path_buf(),
        })
    }

    /// The answers that a task has already, and a file to add to. What a stopped run left beyond
    /// whole portions is cut off and asked again, so that the same questions are read together.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] naming the line that is no answer.
    pub fn answers(&self, task: &str, n: usize) -> Result<(Vec<AnsweredQuestion>, Answers)> {
        let path = self.folder.join(format!("samples_{task}.jsonl"));
        let io = |e| Error::io(&path, "read and add to", e);
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(io)?;
        let (mut answers, mut ends) = (Vec::new(), vec![0]);
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n_bytes = reader.read_until(b'\n', &mut line).map_err(io)?;
            // A line without its end was being written when the run was stopped.
            if n_bytes == 0 || !line.ends_with(b"\n") {
                break;
            }
            let at = format!("line {}", ends.len());
            let answer = serde_json::from_slice(&line)
                .map_err(|e| Error::format(&path, at, format!("an answer expected: {e}")))?;
            answers.push(answer);
            ends.push(ends[ends.len() - 1] + n_bytes as u64);
        }
        let n_kept = match answers.len() >= n {
            true => n,
            false => answers.len() / QUESTIONS_AT_ONCE * QUESTIONS_AT_ONCE,
        };
        answers.truncate(n_kept);
        file.set_len(ends[n_kept]).map_err(io)?;
        Ok((answers, Answers { path, file }))
    }

    /// Everything at once, when all is done.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&self, predictions: &Value, results: &Value) -> Result<()> {
        for (name, value) in [(RESULTS, results), (PREDICTIONS, predictions)] {
            let (path, part) = (self.folder.join(name), self.folder.join("part"));
            std::fs::write(&part, format!("{value:#}\n"))
                .and_then(|()| std::fs::rename(&part, &path))
                .map_err(|e| Error::io(&path, "write the answers", e))?;
        }
        Ok(())
    }

    /// The answers as VLMEvalKit's own programs read them: the rows of its table, lists in
    /// brackets, with a column `prediction`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_table(&self, task: &str, answers: &[AnsweredQuestion]) -> Result<()> {
        let path = self.folder.join(format!("{task}.tsv"));
        let io = |e: csv::Error| Error::io(&path, "write", e.into());
        let mut columns: Vec<&String> = Vec::new();
        for key in answers.iter().flat_map(|answer| answer.doc.keys()) {
            if !columns.contains(&key) {
                columns.push(key);
            }
        }
        let mut table = csv::WriterBuilder::new()
            .delimiter(b'\t')
            .from_path(&path)
            .map_err(io)?;
        let heads = columns.iter().map(|key| key.as_str());
        table
            .write_record(heads.chain(["prediction"]))
            .map_err(io)?;
        for answer in answers {
            let cells = columns.iter().map(|key| match answer.doc.get(*key) {
                None | Some(Value::Null) => String::new(),
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
            });
            let cells = cells.chain([answer.answer().to_owned()]);
            table.write_record(cells).map_err(io)?;
        }
        table.flush().map_err(|e| Error::io(&path, "write", e))
    }
}

/// The file of a task's answers.
pub struct Answers {
    path: PathBuf,
    file: File,
}

impl Answers {
    /// Adds answers in one write.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, answers: &[AnsweredQuestion], metric: &str) -> Result<()> {
        let lines: String = answers.iter().map(|a| a.line(metric) + "\n").collect();
        let written = self.file.write_all(lines.as_bytes());
        written.map_err(|e| Error::io(&self.path, "write", e))
    }
}

/// What tells a model's folder from another: the names, sizes and times of its files.
///
/// # Errors
/// [`Error::Io`].
pub fn fingerprint(model: &Path) -> Result<Value> {
    let io = |e| Error::io(model, "list", e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(model).map_err(io)? {
        let entry = entry.map_err(io)?;
        let about = std::fs::metadata(entry.path()).map_err(io)?;
        let time = about.modified().ok();
        let since = time.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        files.push((
            entry.file_name().to_string_lossy().into_owned(),
            about.len(),
            since.map_or(0, |t| t.as_nanos() as u64),
        ));
    }
    files.sort();
    let folder = model.canonicalize().map_err(io)?;
    Ok(json!({"folder": folder.to_string_lossy(), "files": files}))
}

/// The metric's name, or that of plain comparison.
pub fn metric(
    benchmark: Option<crate::eval::benchmark::Benchmark>,
    protocol: Protocol,
) -> &'static str {
    benchmark.map_or("exact", |benchmark| benchmark.metric(protocol))
}
