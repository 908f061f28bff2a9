//! What the models answered: accuracies with their intervals, and answers side by side.

use crate::dataset::{Question, Rows, open_rows};
use crate::eval::{Accuracy, task_files};
use crate::report::importance::{fit, png_base64};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Name of the file in the folder that `vlmq eval --output` makes.
const PREDICTIONS_FILE: &str = "predictions.json";

/// Questions that are shown.
const N_SHOWN: usize = 12;

/// Longest side of their pictures, in pixels.
const MAX_SIDE: usize = 320;

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
    correct: bool,
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
    questions: HashMap<(String, String), Question>,
    /// Of the questions that are shown, by task and id.
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

    fn accuracy(&self, task: &str) -> Option<Accuracy> {
        let accuracy = Accuracy::of(self.answers(task).map(|row| row.correct));
        (accuracy.n > 0).then_some(accuracy)
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
    /// Those of the quantized model, and of the original on the same questions.
    pub fn new(quantized: Predictions, original: Option<Predictions>) -> Self {
        Self {
            quantized,
            original,
            ..Self::default()
        }
    }

    /// The same with the questions of `task`, a file or a folder of files, and with the pictures of
    /// those that will be shown.
    ///
    /// # Errors
    /// The readers'.
    pub fn with_questions(mut self, task: &Path) -> Result<Self> {
        for file in task_files(task)? {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            if !self.quantized.0.contains_key(&*name) {
                continue;
            }
            if let Rows::Questions(questions) = open_rows(&file)? {
                let keyed = questions.into_iter();
                let keyed = keyed.map(|q| ((name.to_string(), q.id.clone()), q));
                self.questions.extend(keyed);
            }
        }
        for (task, row) in self.shown() {
            let key = (task.to_owned(), row.id.clone());
            let image = self.questions.get(&key).and_then(|q| q.images.first());
            if let Some(image) = image {
                let image = fit(&image.load()?, MAX_SIDE)?;
                self.images.insert(key, png_base64(&image)?);
            }
        }
        Ok(self)
    }

    /// The questions to show: those whose answer turned wrong, those whose answer turned right, then
    /// others, of the tasks in turn.
    fn shown(&self) -> Vec<(String, AnswerRow)> {
        let mut all = Vec::new();
        for task in self.quantized.0.keys() {
            let original = self.original_by_id(task);
            let mut own: Vec<(usize, usize, &AnswerRow)> = Vec::new();
            for (i, row) in self.quantized.answers(task).enumerate() {
                let before = original.get(row.id.as_str()).map(|row| row.correct);
                own.push((rank(before, row.correct), i, row));
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
        let quantized = self.quantized.accuracy(task)?;
        let original = self.original.as_ref();
        let before = self.original_by_id(task);
        let pairs = self.quantized.answers(task).filter_map(|row| {
            let original = before.get(row.id.as_str())?;
            Some((original.correct, row.correct))
        });
        let flips = pairs.fold([0, 0], |[lost, gained], (before, now)| {
            [
                lost + usize::from(before && !now),
                gained + usize::from(!before && now),
            ]
        });
        Some(TaskRow {
            task: task.to_owned(),
            n: quantized.n,
            quantized: quantized.into(),
            original: original.and_then(|o| o.accuracy(task)).map(Share::from),
            lost: flips[0],
            gained: flips[1],
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
            question: self.questions.get(&key).map(|q| q.question.clone()),
            image: self.images.get(&key).cloned(),
            expected: row.expected.join(" / "),
            quantized: row.answer.clone(),
            is_right: row.correct,
            original: original.map(|o| o.answer.clone()),
            was_right: original.map(|o| o.correct),
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
    /// Right with the original alone, and with the quantized model alone.
    lost: usize,
    gained: usize,
}

/// A share in percent with its 95 % interval.
#[derive(Serialize)]
struct Share {
    percent: String,
    interval: String,
    /// The three as numbers, for the drawing.
    at: [f64; 3],
}

impl From<Accuracy> for Share {
    fn from(accuracy: Accuracy) -> Self {
        let [low, high] = accuracy.interval;
        Self {
            percent: format!("{:.1}", accuracy.percent),
            interval: format!("{low:.1} to {high:.1}"),
            at: [low, accuracy.percent, high],
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
        assert_eq!((task.n, task.lost, task.gained), (4, 1, 1));
        assert_eq!(task.quantized.percent, "50.0");
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
