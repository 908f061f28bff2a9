//! What the models answered: scores with their intervals, who answers better, and answers side by side.

use crate::dataset::read_rows;
use crate::eval::{Accuracy, Pairs, Score, task_files};
use crate::report::importance::{fit, png_base64};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// Name of the file in the folder that `vlmq eval --output` makes.
const PREDICTIONS_FILE: &str = "predictions.json";

/// Questions that are shown.
const N_SHOWN: usize = 12;

/// Longest side of their pictures, in pixels.
const MAX_SIDE: usize = 320;

/// Seed of the resampling that intervals come from, as `vlmq eval` has it.
const SEED: u64 = 0;

/// Answers of one model, by task.
#[derive(Clone, Debug, Default)]
pub struct Predictions(BTreeMap<String, Vec<Row>>);

/// An answered question, or what a raw text adds to the perplexity.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Row {
    Answer(AnswerRow),
    Text(TextRow),
}

#[derive(Clone, Debug, Deserialize)]
struct AnswerRow {
    id: String,
    answer: String,
    #[serde(default)]
    expected: Vec<String>,
    #[serde(flatten)]
    worth: Worth,
    /// What the model answered that this one was held against.
    #[serde(default)]
    reference: Option<ReferenceRow>,
}

#[derive(Clone, Debug, Deserialize)]
struct ReferenceRow {
    answer: String,
    #[serde(flatten)]
    worth: Worth,
}

/// What an answer counts.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Worth {
    correct: bool,
    /// By a benchmark's metric, from 0 to 1.
    #[serde(default)]
    score: Option<f64>,
}

impl Worth {
    fn score(self) -> f64 {
        self.score.unwrap_or(f64::from(u8::from(self.correct)))
    }
}

#[derive(Clone, Debug, Deserialize)]
struct TextRow {
    n_tokens: usize,
    negative_log_likelihood: f64,
}

/// The answers of the quantized model, those of the original if they are known, and the questions.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    quantized: Predictions,
    original: Option<Predictions>,
    /// Of the questions that are shown, by task and id.
    questions: HashMap<(String, String), String>,
    images: HashMap<(String, String), String>,
}

impl Predictions {
    /// Reads the predictions that `vlmq eval --output` wrote: the file, or its folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if they have another form.
    pub fn read(path: &Path) -> Result<Self> {
        let file = match path.is_dir() {
            true => path.join(PREDICTIONS_FILE),
            false => path.to_path_buf(),
        };
        let bytes = std::fs::read(&file).map_err(|e| Error::io(&file, "read", e))?;
        let tasks = serde_json::from_slice(&bytes);
        tasks
            .map(Self)
            .map_err(|e| Error::format(&file, "predictions", e.to_string()))
    }

    fn answers(&self, task: &str) -> impl Iterator<Item = &AnswerRow> {
        let rows = self.0.get(task).into_iter().flatten();
        rows.filter_map(|row| match row {
            Row::Answer(answer) => Some(answer),
            Row::Text(_) => None,
        })
    }

    /// Answers that are right or wrong have Wilson's interval: where all are the same, resampling
    /// shows none.
    fn score(&self, task: &str) -> Option<Score> {
        let scores: Vec<f64> = self.answers(task).map(|row| row.worth.score()).collect();
        let mut score = (!scores.is_empty()).then(|| Score::of(&scores, SEED))?;
        if scores.iter().all(|score| [0.0, 1.0].contains(score)) {
            score.interval = Accuracy::of(scores.iter().map(|score| *score == 1.0)).interval;
        }
        Some(score)
    }

    /// The answers that these were held against, if they were.
    fn references(&self) -> Option<Self> {
        let mut tasks = BTreeMap::new();
        for task in self.0.keys() {
            let rows = self.answers(task).filter_map(|row| {
                let other = row.reference.as_ref()?;
                Some(Row::Answer(AnswerRow {
                    id: row.id.clone(),
                    answer: other.answer.clone(),
                    expected: row.expected.clone(),
                    worth: other.worth,
                    reference: None,
                }))
            });
            let rows: Vec<Row> = rows.collect();
            if !rows.is_empty() {
                tasks.insert(task.clone(), rows);
            }
        }
        (!tasks.is_empty()).then_some(Self(tasks))
    }

    fn perplexity(&self, task: &str) -> Option<f64> {
        let rows = self.0.get(task)?.iter().filter_map(|row| match row {
            Row::Text(text) => Some((text.negative_log_likelihood, text.n_tokens)),
            Row::Answer(_) => None,
        });
        let (sum, n) = rows.reduce(|a, b| (a.0 + b.0, a.1 + b.1))?;
        Some((sum / n.max(1) as f64).exp())
    }
}

impl Answers {
    /// Those of the quantized model, and of the original on the same questions; without them those
    /// that the quantized model's were held against with `--reference`.
    pub fn new(quantized: Predictions, original: Option<Predictions>) -> Self {
        Self {
            original: original.or_else(|| quantized.references()),
            quantized,
            ..Self::default()
        }
    }

    /// The same with the questions that will be shown and their pictures, from a file or a folder of
    /// files: each is the task that bears its name, or all are the one that `name` says.
    ///
    /// # Errors
    /// The readers'.
    pub fn with_questions(mut self, name: Option<&str>, path: &Path) -> Result<Self> {
        let files = match name {
            Some(_) => vec![path.to_path_buf()],
            None => task_files(path)?,
        };
        for file in files {
            let stem = file.file_stem().unwrap_or_default().to_string_lossy();
            let task = name.unwrap_or(&stem);
            let mut wanted: HashSet<String> = self.shown_of(task).collect();
            if wanted.is_empty() {
                continue;
            }
            for row in read_rows(&file)? {
                let row = row?;
                if row.is_text() || !wanted.remove(&row.id()) {
                    continue;
                }
                let key = (task.to_owned(), row.id());
                let question = row.into_question()?;
                if let Some(image) = question.images.first() {
                    let image = fit(&image.load()?, MAX_SIDE)?;
                    self.images.insert(key.clone(), png_base64(&image)?);
                }
                self.questions.insert(key, question.question);
            }
        }
        Ok(self)
    }

    /// Of a task's questions those that will be shown.
    fn shown_of(&self, task: &str) -> impl Iterator<Item = String> {
        let shown = self.shown().into_iter();
        shown.filter_map(move |(of, row)| (of == task).then_some(row.id))
    }

    /// The questions to show: those whose answer turned wrong, those whose answer turned right, then
    /// others, of the tasks in turn.
    fn shown(&self) -> Vec<(String, AnswerRow)> {
        let mut all = Vec::new();
        for task in self.quantized.0.keys() {
            let original = self.original_by_id(task);
            let mut own: Vec<(usize, usize, &AnswerRow)> = Vec::new();
            for (i, row) in self.quantized.answers(task).enumerate() {
                let before = original.get(row.id.as_str());
                let before = before.map(|row| row.worth.correct);
                own.push((rank(before, row.worth.correct), i, row));
            }
            own.sort_by_key(|(rank, i, _)| (*rank, *i));
            let ranked = own.into_iter().enumerate();
            all.extend(ranked.map(|(turn, (rank, _, row))| (rank, turn, task, row)));
        }
        all.sort_by_key(|(rank, turn, _, _)| (*rank, *turn));
        let shown = all.into_iter().take(N_SHOWN);
        shown
            .map(|(_, _, task, row)| (task.clone(), row.clone()))
            .collect()
    }

    fn original_by_id(&self, task: &str) -> HashMap<&str, &AnswerRow> {
        let rows = self.original.iter().flat_map(|o| o.answers(task));
        rows.map(|row| (row.id.as_str(), row)).collect()
    }

    pub(super) fn section(&self) -> AnswerSection {
        let tasks = self.quantized.0.keys();
        AnswerSection {
            has_original: self.original.is_some(),
            tasks: tasks
                .clone()
                .filter_map(|task| self.task_row(task))
                .collect(),
            texts: tasks.filter_map(|task| self.text_row(task)).collect(),
            shown: self
                .shown()
                .iter()
                .map(|(task, row)| self.card(task, row))
                .collect(),
        }
    }

    fn task_row(&self, task: &str) -> Option<TaskRow> {
        let quantized = self.quantized.score(task)?;
        let original = self.original.as_ref();
        let before = self.original_by_id(task);
        let pairs = self.quantized.answers(task).filter_map(|row| {
            let original = before.get(row.id.as_str())?;
            Some((row.worth.score(), original.worth.score()))
        });
        let pairs: Vec<(f64, f64)> = pairs.collect();
        Some(TaskRow {
            task: task.to_owned(),
            n: quantized.n,
            quantized: quantized.into(),
            original: original.and_then(|o| o.score(task)).map(Share::from),
            pairs: (!pairs.is_empty()).then(|| Pairs::of(&pairs, SEED).into()),
        })
    }

    fn text_row(&self, task: &str) -> Option<TextRowShown> {
        let shown = |p: f64| format!("{p:.3}");
        Some(TextRowShown {
            task: task.to_owned(),
            quantized: shown(self.quantized.perplexity(task)?),
            original: self
                .original
                .as_ref()
                .and_then(|o| o.perplexity(task))
                .map(shown),
        })
    }

    fn card(&self, task: &str, row: &AnswerRow) -> AnswerCard {
        let key = (task.to_owned(), row.id.clone());
        let original = self.original_by_id(task).get(row.id.as_str()).copied();
        AnswerCard {
            task: task.to_owned(),
            id: row.id.clone(),
            question: self.questions.get(&key).cloned(),
            image: self.images.get(&key).cloned(),
            expected: row.expected.join(" / "),
            quantized: row.answer.clone(),
            is_right: row.worth.correct,
            original: original.map(|o| o.answer.clone()),
            was_right: original.map(|o| o.worth.correct),
        }
    }
}

/// How soon a question is shown.
fn rank(before: Option<bool>, now: bool) -> usize {
    match (before, now) {
        (Some(true), false) => 0,
        (Some(false), true) => 1,
        (None, false) => 2,
        (_, false) => 3,
        (_, true) => 4,
    }
}

/// What the page shows of answers.
#[derive(Serialize)]
pub(super) struct AnswerSection {
    has_original: bool,
    tasks: Vec<TaskRow>,
    texts: Vec<TextRowShown>,
    shown: Vec<AnswerCard>,
}

#[derive(Serialize)]
struct TaskRow {
    task: String,
    n: usize,
    quantized: Share,
    original: Option<Share>,
    /// Both models on the questions that both answered.
    pairs: Option<PairsShown>,
}

#[derive(Serialize)]
struct PairsShown {
    /// Right with the original alone, and with the quantized model alone.
    lost: usize,
    gained: usize,
    /// Points that the quantized model has more, with their 95 % interval.
    difference: String,
    interval: String,
    /// McNemar's.
    p_value: String,
}

impl From<Pairs> for PairsShown {
    fn from(pairs: Pairs) -> Self {
        let [low, high] = pairs.difference_interval;
        Self {
            lost: pairs.n_only_second,
            gained: pairs.n_only_first,
            difference: format!("{:+.1}", pairs.difference),
            interval: format!("{low:+.1} to {high:+.1}"),
            p_value: match pairs.p_value {
                p if p < 0.001 => "< 0.001".into(),
                p => format!("{p:.3}"),
            },
        }
    }
}

/// A mean score in percent with its 95 % interval.
#[derive(Serialize)]
struct Share {
    percent: String,
    interval: String,
    /// The three as numbers, for the drawing.
    at: [f64; 3],
}

impl From<Score> for Share {
    fn from(score: Score) -> Self {
        let [low, high] = score.interval;
        Self {
            percent: format!("{:.1}", score.percent),
            interval: format!("{low:.1} to {high:.1}"),
            at: [low, score.percent, high],
        }
    }
}

#[derive(Serialize)]
struct TextRowShown {
    task: String,
    quantized: String,
    original: Option<String>,
}

#[derive(Serialize)]
struct AnswerCard {
    task: String,
    id: String,
    question: Option<String>,
    image: Option<String>,
    expected: String,
    quantized: String,
    is_right: bool,
    original: Option<String>,
    was_right: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predictions(text: &str) -> Predictions {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(PREDICTIONS_FILE), text).unwrap();
        Predictions::read(dir.path()).unwrap()
    }

    fn answers(rows: &[(&str, bool)]) -> Predictions {
        let row = |(id, correct): &(&str, bool)| {
            format!(
                r#"{{"id":"{id}","category":null,"answer":"a","expected":["b"],"correct":{correct}}}"#
            )
        };
        let rows: Vec<String> = rows.iter().map(row).collect();
        predictions(&format!(r#"{{"t":[{}]}}"#, rows.join(",")))
    }

    #[test]
    fn answers_that_turned_wrong_come_first() {
        let now = answers(&[("1", true), ("2", true), ("3", false), ("4", false)]);
        let before = answers(&[("1", true), ("2", false), ("3", false), ("4", true)]);
        let section = Answers::new(now, Some(before)).section();
        let order: Vec<&str> = section.shown.iter().map(|card| card.id.as_str()).collect();
        assert_eq!(order, ["4", "2", "3", "1"]);
        let task = &section.tasks[0];
        let pairs = task.pairs.as_ref().unwrap();
        assert_eq!((task.n, pairs.lost, pairs.gained), (4, 1, 1));
        assert_eq!(
            (pairs.difference.as_str(), pairs.p_value.as_str()),
            ("+0.0", "1.000")
        );
        assert_eq!(task.quantized.percent, "50.0");
    }

    #[test]
    fn answers_that_were_held_against_others_bring_those_along() {
        let row = |id: usize, score: f64, other: f64| {
            format!(
                r#"{{"id":"{id}","category":null,"answer":"a","expected":["b"],"correct":{},"score":{score},
                    "reference":{{"answer":"o","correct":{},"score":{other}}}}}"#,
                score >= 0.5,
                other >= 0.5
            )
        };
        let rows: Vec<String> = (0..12).map(|i| row(i, 0.25, 0.75)).collect();
        let now = predictions(&format!(r#"{{"t":[{}]}}"#, rows.join(",")));
        let section = Answers::new(now, None).section();
        assert!(section.has_original);
        let task = &section.tasks[0];
        assert_eq!(task.quantized.percent, "25.0");
        assert_eq!(task.original.as_ref().unwrap().percent, "75.0");
        let pairs = task.pairs.as_ref().unwrap();
        assert_eq!((pairs.lost, pairs.gained), (12, 0));
        assert_eq!(
            (pairs.difference.as_str(), pairs.p_value.as_str()),
            ("-50.0", "< 0.001")
        );
        assert_eq!(section.shown[0].original.as_deref(), Some("o"));
    }

    #[test]
    fn texts_give_perplexities() {
        let rows = r#"{"w":[{"id":"1","n_tokens":2,"negative_log_likelihood":1.0,"divergence":null},
                            {"id":"2","n_tokens":2,"negative_log_likelihood":3.0,"divergence":null}]}"#;
        let section = Answers::new(predictions(rows), None).section();
        assert!(section.tasks.is_empty());
        assert_eq!(section.texts[0].quantized, "2.718");
    }

    #[test]
    fn another_form_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        std::fs::write(&file, "[1]").unwrap();
        assert!(matches!(
            Predictions::read(&file),
            Err(Error::Format { .. })
        ));
        assert!(matches!(
            Predictions::read(&dir.path().join("no")),
            Err(Error::Io { .. })
        ));
    }
}
